"""The old place of `edge_dfcil.model.pictures` and `edge_dfcil.dreaming.sheet`, for one release."""

from edge_dfcil._moved import forward

forward(__name__, "edge_dfcil.model.pictures", "edge_dfcil.dreaming.sheet")
