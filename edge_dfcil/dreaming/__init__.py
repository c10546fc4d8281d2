"""Inverts a frozen classifier: the objectives, the generator, pixels, and what becomes of the generated images."""
