"""The largest micro-batch that fits: forecast, run once, put everything back."""
