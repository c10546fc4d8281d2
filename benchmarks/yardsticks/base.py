"""What yardsticks have in common: they keep something from task to task, and say how much."""

from __future__ import annotations

from torch import Tensor

from edge_dfcil.methods import Method


class Yardstick(Method):
    """A method that may keep tensors between tasks.

    Attributes
    ----------
    kept
        These tensors, by name: what a stopped run needs to continue, and what is counted as bytes kept.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    @property
    def bytes_kept(self) -> int:
        """Bytes at rest, without those of the model."""
        return sum(tensor.nbytes for tensor in self.kept.values())
