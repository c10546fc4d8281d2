"""The contract of a method: what it prepares before a task, and what a step's loss is. It owns no loop and no device code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch.nn.functional as F

from edge_dfcil.data import Batch
from edge_dfcil.training import Stage, Task, Terms


class Method(ABC):
    """A way of learning new classes. Instances hold no data: what one task needs lives in the `Task` and dies with it."""

    name: ClassVar[str]
    mu: ClassVar[float] = 1.0  # the published weight of the term that remembers

    def prepare(self, task: Task) -> Iterator[Stage]:
        """Stages before the learning; what they make is left in `task`. The first task, with nothing to remember, has it too."""
        return iter(())

    def first_loss(self, task: Task, batch: Batch) -> Terms:
        """One step's loss when there is nothing to remember: cross-entropy over the current classes."""
        return {"cross_entropy": F.cross_entropy(task.student.classify(batch.images), batch.targets)}

    @abstractmethod
    def loss(self, task: Task, batch: Batch) -> Terms:
        """One step's loss from the second task on, as named terms whose sum is minimised."""

    def weight(self, task: Task) -> float:
        """The weight of the term that remembers: the recipe's, else the published one."""
        return self.mu if task.recipe.mu is None else task.recipe.mu

    def refine(self, task: Task) -> Iterator[Stage]:
        """Stages after the learning, at every task."""
        return iter(())
