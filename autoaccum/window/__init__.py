"""One window, exactly right: the accumulation, its sums over micro-batches and ranks, its record."""
