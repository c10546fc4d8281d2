"""Smaller models without data: a student with another backbone, or the same one with fewer channels, trained on dreams.

`distill` and `prune` take a learner and return another, which predicts, exports and learns its next task like any other.
"""

from edge_dfcil.compression.distillation import Distillation, distill
from edge_dfcil.compression.pruning import Pruning, prune

__all__ = ["Distillation", "Pruning", "distill", "prune"]
