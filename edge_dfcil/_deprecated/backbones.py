"""The old place of `edge_dfcil.model.backbones`, for one release."""

from edge_dfcil._moved import forward

forward(__name__, "edge_dfcil.model.backbones", "edge_dfcil.model.adoption", "edge_dfcil.model.contract")
