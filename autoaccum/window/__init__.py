"""One window, exactly right: calls, denominators, BatchNorm, precision, snapshots and the accumulation itself."""
