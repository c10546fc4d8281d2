"""Preparing dreams of the old classes: shared by every method that remembers through them."""

from __future__ import annotations

from collections.abc import Iterator

from edge_dfcil.dreaming.inversion import Dream, Dreamer, Dreams
from edge_dfcil.training import Stage, Task

__all__ = ["Dream", "prepare"]


def prepare(task: Task) -> Iterator[Stage]:
    """Trains a generator on the teacher and leaves its dreams in `task.dreams`; both are gone with the task."""
    assert task.teacher is not None
    dreamer = Dreamer(task.teacher, task.old, task.recipe)
    yield dreamer.stage()
    task.dreams = Dreams(dreamer)
