"""Pure arithmetic, without torch: a target batch and what fits at once -> the Plan."""
