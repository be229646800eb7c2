"""How the user's model runs, and what it is put back to."""
