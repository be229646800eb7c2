"""Other people's trainers: what a window is becomes ours, everything else stays theirs. Each is imported on use."""
