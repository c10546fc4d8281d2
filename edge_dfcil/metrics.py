"""Metrics of class-incremental learning, from counts and per-task accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edge_dfcil.errors import DataError
from edge_dfcil.results import Evaluation


def evaluation(
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    tasks: Sequence[Sequence[str]],
    calibration_error: float | None = None,
) -> Evaluation:
    """An `Evaluation` from image counts [true][predicted]. Raises `DataError` when there are none."""
    if not any(count for row in confusion for count in row):
        raise DataError("no image was counted, so there is no accuracy; evaluate on at least one image")
    right = {name: confusion[i][i] for i, name in enumerate(classes)}
    n = {name: sum(confusion[i]) for i, name in enumerate(classes)}
    per_task = []
    for task in tasks:
        images = sum(n[name] for name in task)
        per_task.append(sum(right[name] for name in task) / images if images else None)
    return Evaluation(
        accuracy=sum(right.values()) / sum(n.values()),
        n=sum(n.values()),
        per_class={name: right[name] / n[name] for name in classes if n[name]},
        per_task=tuple(per_task),
        classes=tuple(classes),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        calibration_error=calibration_error,
    )


class CalibrationError:
    """Expected calibration error over bins of probability of equal width (Guo et al., ICML 2017), one answer at a time."""

    def __init__(self, bins: int = 15) -> None:
        self._bins = bins
        self._lead = [0.0] * bins  # sum of probabilities minus the number of right answers
        self._n = 0

    def add(self, probability: float, right: bool) -> None:
        """Adds an answer with this probability, in [0, 1]."""
        # Bins are open below and closed above.
        self._lead[min(max(math.ceil(probability * self._bins) - 1, 0), self._bins - 1)] += probability - right
        self._n += 1

    @property
    def value(self) -> float:
        """In [0, 1]; 0 before the first answer."""
        return sum(map(abs, self._lead)) / max(self._n, 1)


def average_incremental_accuracy(accuracies: Sequence[float]) -> float:
    """Mean over tasks of the accuracy on all classes seen so far (Rebuffi et al., CVPR 2017)."""
    return sum(accuracies) / len(accuracies)


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """Mean, over all tasks but the last, of a task's best accuracy minus its final one (Chaudhry et al., ECCV 2018).

    ``matrix[i][j]`` is the accuracy on task j after task i, for j up to i. 0 for a single task.
    """
    last = len(matrix) - 1
    if last == 0:
        return 0.0
    drops = [max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)]
    return sum(drops) / last


def omega(accuracies: Sequence[float], offline: Sequence[float]) -> float:
    """Mean over tasks of accuracy relative to a network trained offline on the same classes, x100 (ABD, section 6)."""
    return 100 * sum(a / o for a, o in zip(accuracies, offline, strict=True)) / len(accuracies)
