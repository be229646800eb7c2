"""Pooled running statistics: one update of each layer a window, as the large batch would leave them."""
