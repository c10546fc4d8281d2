"""The old place of `edge_dfcil.model.network` and `edge_dfcil.model.preprocessing`, for one release."""

from edge_dfcil._moved import forward

forward(__name__, "edge_dfcil.model.network", "edge_dfcil.model.preprocessing")
