"""What the public calls answer. Plain dataclasses, free of torch: `exporters` shares them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """One image's answer.

    Attributes
    ----------
    label
        The most probable class name.
    score
        Its probability, in [0, 1].
    top
        The `top_k` most probable names with their probabilities, best first.
    """

    label: str
    score: float
    top: tuple[tuple[str, float], ...]

    def to_dict(self) -> dict[str, Any]:
        return {"label": self.label, "score": self.score, "top": [list(pair) for pair in self.top]}


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on labelled images, every seen class competing for each of them.

    Attributes
    ----------
    accuracy
        Share of images named right, in [0, 1].
    n
        Number of images.
    per_class
        Accuracy by class name, for the classes that had images.
    per_task
        Accuracy by task, in the order learnt; None for a task without images.
    classes
        Names of the rows and columns of `confusion`.
    confusion
        Image counts, [true class][predicted class].
    """

    accuracy: float
    n: int
    per_class: dict[str, float]
    per_task: tuple[float | None, ...]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StageReport:
    """One stage of a task's learning: "dream", "learn" or "refine".

    Attributes
    ----------
    steps, seconds
        Optimiser steps done and the time they took.
    images
        Images that went through, dreams made by the stage itself included.
    losses
        Each term of the loss at the last step, by name.
    """

    name: str
    steps: int
    seconds: float
    images: int
    losses: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TaskReport:
    """What one `learn_task` did.

    Attributes
    ----------
    task
        Its number, from 1; that of the last task when classes were only refreshed.
    method
        The method's name.
    new_classes, relearned_classes
        Names learnt for the first time, and names refreshed.
    classes
        Every name the learner knows now, in the order of its outputs.
    images
        Images in one pass over the loader.
    seconds
        From the call to the commit.
    stages
        Its stages, in order.
    """

    task: int
    method: str
    new_classes: tuple[str, ...]
    relearned_classes: tuple[str, ...]
    classes: tuple[str, ...]
    images: int
    seconds: float
    stages: tuple[StageReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
