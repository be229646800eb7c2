"""The user's data, made into batches of any size."""
