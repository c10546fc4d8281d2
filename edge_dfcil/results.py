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
class StagePlan:
    """What one stage of a task's learning is expected to hold, measured in a rehearsal of a few steps.

    Attributes
    ----------
    at_once
        Images that go through the networks at once; a larger batch is split and its gradients accumulate.
    recompute
        Whether activations inside the network's blocks are computed again for the backward pass instead of kept.
    peak_bytes
        The most.
    items
        What it is made of, in bytes.
    """

    name: str
    at_once: int
    recompute: bool
    peak_bytes: int
    items: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """How a task's memory is kept under a budget; all bytes are above what is held when `learn_task` is called.

    Attributes
    ----------
    budget
        In bytes; None when there is none, and then whole batches are planned.
    stages
        In order.
    changes
        Numbers of the recipe that had to be made smaller: the pool of dreams, then the generator. These are the only
        settings that change what is learnt, so they are the last resort.
    """

    budget: int | None
    stages: tuple[StagePlan, ...]
    changes: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The highest of the stages' peaks."""
        return max((stage.peak_bytes for stage in self.stages), default=0)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes}

    def __str__(self) -> str:
        """A table: an item a line, a stage a column, in MB."""
        items = list(dict.fromkeys(item for stage in self.stages for item in stage.items))
        rows = [["MB", *(stage.name for stage in self.stages)]]
        rows += [[item, *(f"{stage.items.get(item, 0) / 1e6:.1f}" for stage in self.stages)] for item in items]
        rows += [["peak", *(f"{stage.peak_bytes / 1e6:.1f}" for stage in self.stages)]]
        rows += [["images at once", *(str(stage.at_once) for stage in self.stages)]]
        rows += [["recomputes", *("yes" if stage.recompute else "no" for stage in self.stages)]]
        width = max(len(row[0]) for row in rows)
        lines = [row[0].ljust(width) + "".join(cell.rjust(9) for cell in row[1:]) for row in rows]
        lines += [f"{name} {value}: smaller than the recipe's, to fit" for name, value in self.changes.items()]
        return "\n".join([*lines, "no budget" if self.budget is None else f"budget {self.budget / 1e6:.1f} MB"])


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
    at_once
        Images that went through the networks at once at the end; None: whole batches.
    recompute
        Whether activations inside blocks were computed again instead of kept.
    halvings
        How often `at_once` was halved because a step took too much memory; the step was made again.
    peak_bytes
        Most memory held above the level at the call, what the stage was made from included; None if nobody looked.
    """

    name: str
    steps: int
    seconds: float
    images: int
    losses: dict[str, float]
    at_once: int | None = None
    recompute: bool = False
    halvings: int = 0
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DistillReport:
    """What one `distill` did.

    Attributes
    ----------
    teacher, student
        The names of the backbones.
    parameters
        Of the teacher and of the student.
    dreams
        How many were made, and thrown away.
    agreement
        Share of dreams, made for this and not learnt from, for which both answer alike.
    accuracy
        Of teacher and student on the images to measure on; None without any.
    stages
        In order.
    """

    teacher: str
    student: str
    parameters: tuple[int, int]
    dreams: int
    agreement: float
    accuracy: tuple[float, float] | None
    seconds: float
    stages: tuple[StageReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PruneReport:
    """What one `prune` did.

    Attributes
    ----------
    filters, parameters, flops
        Before and after; floating-point operations for one image.
    milliseconds
        For one image in ONNX Runtime with one thread on this machine, before and after, measured in turns.
    table_milliseconds
        What the convolutions come to by the table that pruning went by.
    channels
        How many each pruned layer has left, by the layer's name.
    accuracy
        Before, pruned, and repaired, on the images to measure on; None without any.
    agreement
        After the repair: share of fresh dreams for which both answer alike; None without a repair.
    """

    filters: tuple[int, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    milliseconds: tuple[float, float]
    table_milliseconds: tuple[float, float]
    channels: dict[str, int]
    accuracy: tuple[float, float, float] | None
    agreement: float | None
    seconds: float
    stages: tuple[StageReport, ...]

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
    plan
        How the memory budget was to be kept; None without a budget.
    peak_bytes
        Most memory held above the level at the call, planning included.
    """

    task: int
    method: str
    new_classes: tuple[str, ...]
    relearned_classes: tuple[str, ...]
    classes: tuple[str, ...]
    images: int
    seconds: float
    stages: tuple[StageReport, ...]
    plan: MemoryPlan | None = None
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_dict() if self.plan is not None else None}
