"""Many windows: the loop, what it tells the world, what it survives."""
