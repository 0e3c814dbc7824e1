"""A checkpoint -> answers."""
