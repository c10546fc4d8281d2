"""Inverts a frozen classifier: the objectives, the generator, pixel optimisation, and the use of the generated images."""
