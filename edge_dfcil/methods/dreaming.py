"""What every method that remembers through dreams has in common."""

from __future__ import annotations

from collections.abc import Iterator

from edge_dfcil.dreaming.inversion import Dreamer, Dreams
from edge_dfcil.methods.base import Method
from edge_dfcil.training import Stage, Task


class DreamingMethod(Method):
    """Trains a generator on the teacher before a task and leaves its dreams in the task; both are gone with it."""

    def prepare(self, task: Task) -> Iterator[Stage]:
        if not task.remembers:
            return
        assert task.teacher is not None
        dreamer = Dreamer(task.teacher, task.old, task.recipe)
        stage = dreamer.stage()
        yield stage
        task.dreams = Dreams(dreamer, stage.at_once)
