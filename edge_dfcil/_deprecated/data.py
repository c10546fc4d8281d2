"""The old place of `edge_dfcil.training.data` and `edge_dfcil.model.inputs`, for one release."""

from edge_dfcil._moved import forward

forward(__name__, "edge_dfcil.training.data", "edge_dfcil.model.inputs")
