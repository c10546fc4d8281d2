"""What the public calls return. Plain dataclasses, free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edge_dfcil.errors import SettingError
from exporters.predictions import Prediction as Prediction

SHOWN = 5  # names listed in a line of text, at most


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on labelled images, with all known classes as candidates.

    Attributes
    ----------
    accuracy
        Share of images classified correctly, in [0, 1].
    n
        Number of images.
    per_class
        Accuracy by class name, for the classes that had images.
    per_task
        Accuracy by task, in the order learnt; None for a task without images.
    classes
        Names of the rows and columns of `confusion`.
    confusion
        Image counts, a row for each true class and a column for each predicted one.
    calibration_error
        Expected calibration error, in [0, 1]: how far the probability of the answer is from the share of correct answers, over
        15 bins of probability (Guo et al., ICML 2017); None where only counts are known.
    """

    accuracy: float
    n: int
    per_class: dict[str, float]
    per_task: tuple[float | None, ...]
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float | None = None

    @property
    def macro_accuracy(self) -> float:
        """Mean of `per_class`, in [0, 1]: each class with images has the same weight, however many it has."""
        return sum(self.per_class.values()) / len(self.per_class)

    def to_frame(self) -> Any:
        """`confusion` as a pandas DataFrame: rows are true classes, columns predicted ones, values image counts.

        Raises `SettingError` when pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise SettingError("to_frame() needs pandas, which is not installed: pip install pandas") from error
        rows, columns = pd.Index(self.classes, name="true"), pd.Index(self.classes, name="predicted")
        return pd.DataFrame([list(row) for row in self.confusion], index=rows, columns=columns)

    def __str__(self) -> str:
        """Overall accuracy, accuracy by task, and the classes with the lowest accuracy."""
        lines = [f"accuracy {self.accuracy:.1%} on {_count(self.n, 'image')}, mean of the classes {self.macro_accuracy:.1%}"]
        if len(self.per_task) > 1:
            lines.append("by task: " + ", ".join("-" if task is None else f"{task:.1%}" for task in self.per_task))
        worst = sorted(self.per_class, key=lambda name: self.per_class[name])[:SHOWN]
        if len(self.per_class) > 1:
            lines.append("lowest: " + ", ".join(f"{name} {self.per_class[name]:.1%}" for name in worst))
        if self.calibration_error is not None:
            lines.append(f"expected calibration error {self.calibration_error:.1%}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "macro_accuracy": self.macro_accuracy}


@dataclass(frozen=True)
class StagePlan:
    """The memory that one stage of a task is expected to take, measured in a rehearsal of a few steps.

    Attributes
    ----------
    name
        The stage's name, such as "learn".
    at_once
        The micro-batch: images that go through the networks together. A larger batch is split, with gradient accumulation.
    recompute
        Whether activations inside the network's blocks are recomputed for the backward pass (activation checkpointing).
    peak_bytes
        Peak memory.
    items
        The parts of the peak, in bytes.
    """

    name: str
    at_once: int
    recompute: bool
    peak_bytes: int
    items: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """How a task keeps to its memory budget. All bytes are above what is held when `learn_task` is called.

    Attributes
    ----------
    budget
        In bytes; None: no budget, and whole batches are planned.
    stages
        In order.
    changes
        Recipe settings that had to be reduced: the pool of dreams, then the generator. Only these changes affect what is
        learnt, so they are the last resort.
    """

    budget: int | None
    stages: tuple[StagePlan, ...]
    changes: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The highest of the stages' peaks."""
        return max((stage.peak_bytes for stage in self.stages), default=0)

    def at_once(self, stage: str) -> int | None:
        """The micro-batch of a stage; None for one that was not planned."""
        return next((planned.at_once for planned in self.stages if planned.name == stage), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes}

    def __str__(self) -> str:
        """A table with a line for each item and a column for each stage, in MB."""
        items = list(dict.fromkeys(item for stage in self.stages for item in stage.items))
        rows = [["MB", *(stage.name for stage in self.stages)]]
        rows += [[item, *(f"{stage.items.get(item, 0) / 1e6:.1f}" for stage in self.stages)] for item in items]
        rows += [["peak", *(f"{stage.peak_bytes / 1e6:.1f}" for stage in self.stages)]]
        rows += [["micro-batch", *(str(stage.at_once) for stage in self.stages)]]
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
        Images processed, including dreams that the stage itself generated.
    losses
        Each term of the loss at the last step, by name.
    at_once
        The micro-batch at the end, in images; None: whole batches.
    recompute
        Whether activations inside blocks were recomputed instead of kept.
    halvings
        How often `at_once` was halved because a step took too much memory; the step was then repeated.
    peak_bytes
        Peak memory above the level at the call, including the stage's inputs, such as the pool of dreams; None: not measured.
    history
        The mean of each term of the loss over an epoch, by name; one entry per epoch.
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
    history: tuple[dict[str, float], ...] = ()

    def __str__(self) -> str:
        """One line: "learn: 120 steps in 12.3 s, 3,840 images, loss 0.41 (hard 0.30, distill 0.11)"."""
        parts = [f"{self.name}: {_count(self.steps, 'step')} in {self.seconds:.1f} s, {_count(self.images, 'image')}"]
        if self.losses:
            terms = ", ".join(f"{name} {value:.3g}" for name, value in self.losses.items())
            parts.append(f"loss {sum(self.losses.values()):.3g} ({terms})" if len(self.losses) > 1 else f"loss {terms}")
        if self.peak_bytes is not None:
            parts.append(f"at most {self.peak_bytes / 1e6:.1f} MB")
        if self.at_once is not None:
            parts.append(f"micro-batches of {_count(self.at_once, 'image')}")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DistillReport:
    """The result of one `distill` call.

    Attributes
    ----------
    teacher, student
        The names of the backbones.
    parameters
        Of the teacher and of the student.
    dreams
        How many were generated, and deleted afterwards.
    agreement
        Share of generated images, not used in training, for which both give the same answer.
    accuracy
        Of teacher and student on the images passed for measuring; None without them.
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

    def __str__(self) -> str:
        """Student and teacher, how often they agree, and the accuracy of both."""
        before, after = self.parameters
        lines = [f"{self.student} with {after:,} parameters from {self.teacher} with {before:,}, in {self.seconds:.1f} s"]
        lines.append(
            f"answers as its teacher for {self.agreement:.1%} of fresh dreams, after {self.dreams:,} dreams to learn from"
        )
        if self.accuracy is not None:
            lines.append("accuracy {:.1%} as teacher, {:.1%} as student".format(*self.accuracy))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PruneReport:
    """The result of one `prune` call.

    Attributes
    ----------
    filters, parameters, flops
        Before and after; floating-point operations for one image.
    milliseconds
        For one image in ONNX Runtime with one thread on this machine, before and after, measured alternately.
    table_milliseconds
        Of the convolutions, before and after, by the latency table that pruning used.
    channels
        Channels left in each pruned layer, by the layer's name.
    accuracy
        Before, pruned, and repaired, on the images passed for measuring; None without them.
    agreement
        After the repair: share of fresh dreams that both networks answer alike; None without a repair.
    """

    filters: tuple[int, int]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    milliseconds: tuple[float, float] | None
    table_milliseconds: tuple[float, float]
    channels: dict[str, int]
    accuracy: tuple[float, float, float] | None
    agreement: float | None
    seconds: float
    stages: tuple[StageReport, ...]

    def __str__(self) -> str:
        """What was left of the network, how fast it is, and its accuracy."""
        lines = [
            "{1:,} of {0:,} filters".format(*self.filters)
            + ", {1:,} of {0:,} parameters".format(*self.parameters)
            + ", {1:.3g} of {0:.3g} operations for one image".format(*self.flops),
            *([] if (ms := self.milliseconds) is None else [f"{ms[0]:.2f} ms for one image before, {ms[1]:.2f} ms after"]),
        ]
        if self.accuracy is not None:
            lines.append("accuracy {:.1%} before, {:.1%} pruned, {:.1%} repaired".format(*self.accuracy))
        if self.agreement is not None:
            lines.append(f"answers as before for {self.agreement:.1%} of fresh dreams")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Computing:
    """How the training stages of a task compute. Closed-form stages are always in float32 or more.

    Attributes
    ----------
    precision
        Of the layers that autocast covers; weights, gradients and saved tensors are always float32.
    threads
        Of torch on the CPU; None: torch's current number.
    channels_last
        Whether images are in the channels-last memory format.
    measured
        Expected seconds of training by setting, as the setting is printed. Empty: nothing was measured.
    """

    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    channels_last: bool = True
    measured: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """In short: "bfloat16, contiguous, 2 threads"; defaults are left out."""
        parts = [self.precision, *([] if self.channels_last else ["contiguous"])]
        return ", ".join([*parts, *([] if self.threads is None else [_count(self.threads, "thread")])])


@dataclass(frozen=True)
class Commit:
    """One replacement of the current model by a task.

    Attributes
    ----------
    kind
        "instant": the backbone is unchanged; "adapted": the network was trained in this task.
    seconds
        From the call to the commit.
    """

    kind: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind} after {self.seconds:.1f} s"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TaskReport:
    """The result of one `learn_task` call.

    Attributes
    ----------
    task
        The task's number, from 1; the number of the last task when classes were only refreshed.
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
        The memory plan; None without a budget.
    peak_bytes
        Peak memory above the level at the call, including planning.
    left_out
        Images left out of an epoch, because their batches were too small.
    resumed
        Whether the task was resumed from a checkpoint.
    fitted
        How `time_budget` shortened the schedule, by name; None without one.
    computing
        Precision, number of threads and memory format of the training stages, and whether they were chosen by measurement;
        None in reports of earlier versions.
    commits
        In order. An instant one is the last if the adapted model is expected to be less accurate, or the time is up.
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
    left_out: int = 0
    resumed: bool = False
    fitted: dict[str, Any] | None = None
    computing: Computing | None = None
    commits: tuple[Commit, ...] = ()

    def __str__(self) -> str:
        """The classes learnt, the method and the images, then one line per stage."""
        what = [f"learnt {_names(self.new_classes)}"] if self.new_classes else []
        what += [f"refreshed {_names(self.relearned_classes)}"] if self.relearned_classes else []
        left_out = f" ({self.left_out:,} left out of an epoch)" if self.left_out else ""
        lines = [
            f"task {self.task} ({self.method}): {' and '.join(what)} from {_count(self.images, 'image')}{left_out} "
            f"in {self.seconds:.1f} s{', resumed' if self.resumed else ''}; {_count(len(self.classes), 'class', 'classes')} known"
        ]
        if self.plan is not None and self.plan.budget is not None:
            lines.append(f"memory: at most {self.peak_bytes / 1e6:.1f} MB of {self.plan.budget / 1e6:.1f} MB")
        if self.fitted:
            lines.append("fitted to the time: " + ", ".join(f"{name} {value}" for name, value in self.fitted.items()))
        if len(self.commits) > 1:
            lines.append("committed: " + ", ".join(map(str, self.commits)))
        if self.computing is not None and self.computing.measured:
            timed = ", ".join(f"{setting} {seconds:.3g} s" for setting, seconds in self.computing.measured.items())
            lines.append(f"computed in {self.computing} (measured: {timed})")
        return "\n".join([*lines, *(f"  {stage}" for stage in self.stages)])

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_dict() if self.plan is not None else None}


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
