"""What a device has, and what a training step uses of it."""
