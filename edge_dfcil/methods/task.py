"""What a method may use while one task is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_dfcil.dreaming.inversion import Dreams
from edge_dfcil.model.calibration import Calibration
from edge_dfcil.model.network import Network
from edge_dfcil.model.statistics import Statistic
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.data import RealBatches
from edge_dfcil.training.rehearsal import short


@dataclass
class Task:
    """Everything a method may use while one task is learnt. It is discarded after the task, with all generated images.

    Attributes
    ----------
    student
        The network in training, grown to all seen classes.
    teacher
        A frozen copy of the network before this task; None at the first task.
    current
        Outputs (C,) of the classes that have real images now: the new ones, and those refreshed.
    old
        Outputs (K,) of the classes to remember: all that the teacher knows, including those that are refreshed. Empty when
        there is nothing to remember.
    counts
        Real images by output (n_seen,) in one pass.
    batches
        The real images: augmented, normalised, on the device; one pass is an epoch. `plain()` does not augment them.
    dreams
        Made by `prepare` for `loss`.
    statistics
        The class statistics of the model before this task.
    kept
        The class statistics of the model after it, as the method declares them in `state`; committed with the network.
    calibration
        Of the final head; None if there is nothing to calibrate on.
    share
        The share of the recipe's steps that are made: below 1 when a time budget asks for a shorter schedule.
    pretrained
        Whether the backbone had been trained before the first task.
    compared
        Whether its model is compared with that of another task on the same images: `expected_error` is then needed.
    expected_error
        An upper bound for the error of the final head, from held-out images and class statistics, for the comparison of two
        tasks on the same images; None if it is not known.
    micro_batches
        The micro-batch at the end of each stage so far, by its name; None: whole batches.
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
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    kept: dict[str, Statistic] = field(default_factory=dict)
    calibration: Calibration | None = None
    share: float = 1.0
    pretrained: bool = False
    compared: bool = False
    expected_error: float | None = None
    micro_batches: dict[str, int | None] = field(default_factory=dict)

    def share_of(self, steps: int) -> int:
        """The number of steps in this task for a number of steps in the recipe."""
        return steps if self.share == 1.0 else max(1, round(self.share * steps))

    def make_short(self, recipe: Recipe, steps: int, pool: int) -> None:
        """For a temporary task: the sizes of `recipe`, but few batches, few steps and a small pool."""
        self.batches = self.batches.first()
        self.recipe = short(recipe, steps, pool)

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
        """n_old / n_seen (ABD, section 5), which gives all classes the same weight. A refreshed class counts twice: among the
        classes to remember, and among those with real images."""
        return len(self.old) / (len(self.old) + len(self.current))
