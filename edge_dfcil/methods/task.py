"""What a method may use while one task is learnt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edge_dfcil.dreaming.inversion import Dreams
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.data import RealBatches


@dataclass
class Task:
    """Everything a method may use while one task is learnt. It dies with the task, and with it all that was dreamt.

    Attributes
    ----------
    student
        The network in training, grown to all seen classes.
    teacher
        A frozen copy of the network before this task; None at the first task.
    current
        Outputs (C,) of the classes that have real images now: the new ones, and those relearnt.
    old
        Outputs (K,) of the classes to remember, which have none. Empty when there is nothing to remember.
    counts
        Real images by output (n_seen,) in one pass.
    batches
        The real images: augmented, normalised, on the device; one pass is an epoch. `plain()` gives them as they are.
    dreams
        What `prepare` left for `loss`.
    """

    student: Network
    teacher: Network | None
    current: Tensor
    old: Tensor
    counts: Tensor
    batches: RealBatches
    recipe: Recipe
    device: torch.device
    dreams: Dreams | None = None

    @property
    def remembers(self) -> bool:
        """Whether there is an old class to keep."""
        return self.teacher is not None and len(self.old) > 0

    @property
    def memory(self) -> tuple[Network, Dreams]:
        """The teacher and its dreams, for methods whose `prepare` made some."""
        assert self.teacher is not None and self.dreams is not None, "the method's prepare() left no dreams"
        return self.teacher, self.dreams

    @property
    def rho(self) -> float:
        """n_old / n_seen (ABD, section 5): the share of seen classes that have no real image now."""
        return len(self.old) / self.student.n_classes
