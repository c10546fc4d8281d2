"""The class statistics that closed-form heads are made from, and when a task ends with such a head."""

from __future__ import annotations

from collections.abc import Mapping

from edge_dfcil.methods.task import Task

SUMS: Mapping[str, str] = {"mean": "class_mean", "count": "class_count", "covariance": "shared_covariance"}
STATE: Mapping[str, str] = {**SUMS, "frame": "head_frame"}  # older files have no frame


def closes(task: Task) -> bool:
    """Whether a task ends with a closed-form head: not when there are old classes and none of them has statistics."""
    known = task.teacher is None or task.statistics.keys() >= SUMS.keys()
    return task.recipe.remember.class_statistics and known


def stays_frozen(task: Task) -> bool:
    """Whether the backbone is not trained in this task, given a closed-form head."""
    adapt = task.recipe.schedule.adapt
    trained = task.pretrained or task.teacher is not None
    return adapt == "never" or (adapt == "first" and trained)
