"""The old place of `edge_dfcil.budget.meter`, for one release."""

from edge_dfcil._moved import forward

forward(__name__, "edge_dfcil.budget.meter")
