"""A batch becomes a loss, and what that loss was divided by."""
