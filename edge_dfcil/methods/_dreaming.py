"""The base class of methods that replay dreams."""

from __future__ import annotations

from collections.abc import Iterator

from edge_dfcil.dreaming.inversion import Dreamer, Dreams, Pool
from edge_dfcil.dreaming.pixels import paint
from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.training.stage import Stage


class DreamingMethod(Method):
    """Inverts the teacher before a task and stores its dreams in the `Task`; dreams and generator are discarded with it."""

    def prepare(self, task: Task) -> Iterator[Stage]:
        if not task.remembers:
            return
        assert task.teacher is not None
        if task.recipe.remember.dreams == "pixels":
            pool = Pool(task.recipe.remember.pool, task.teacher, task.device)
            yield from paint(pool, task.teacher, task.old, task.recipe)
            task.dreams = Dreams(pool)
            return
        dreamer = Dreamer(task.teacher, task.old, task.recipe)
        yield dreamer.stage()
        task.dreams = Dreams.of(dreamer, task.micro_batches.get("dream"))
