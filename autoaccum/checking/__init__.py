"""Is the accumulated gradient the large batch's? Asked of the user's own model, or of a trainer."""
