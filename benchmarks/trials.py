"""ABD with one part of another method each: does the second task end better, at the same number of steps?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import accuracy, files, machine, tables
from benchmarks.datasets import Data
from edge_dfcil import Learner
from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.inversion import Dream
from edge_dfcil.methods.abd import ABD
from edge_dfcil.methods.task import Task
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe, dotted, find_recipe
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, Terms

PROTOCOL = accuracy.changed(accuracy.find_preset("edge-5x4"), {"per_class": 150})
EDGE = find_recipe(PROTOCOL.recipe).changed(dotted(PROTOCOL.changes))
TASKS = 2


class FeatureMatrix(ABD):
    """Distances of features under the empirical feature matrix (EFC: Magistri et al., ICLR 2024, eqs. 4 and 7)."""

    def distillation(self, task: Task, features: Tensor, features_before: Tensor, dream: Dream) -> Tensor:
        before = _before(task, features_before, dream)
        with torch.no_grad():
            head = _teacher(task).head
            p = head(before).softmax(1)  # (2B, K)
            matrix = head.weight.T @ ((p.mean(0).diag() - p.T @ p / len(p)) @ head.weight)  # (F, F)
            matrix = 10 * matrix + 0.1 * torch.eye(len(matrix), device=matrix.device)
        d = features - before
        return ((d @ matrix) * d).sum(1).mean()


class PlainDistillation(ABD):
    """Mean squared difference of features, with the same weight as `Projector`."""

    times = 10.0

    def distillation(self, task: Task, features: Tensor, features_before: Tensor, dream: Dream) -> Tensor:
        return self.times * F.mse_loss(features, _before(task, features_before, dream))


class Projector(PlainDistillation):
    """Features are compared after a trainable projector (Gomez-Villa et al., CVPR-W 2022), which is dropped with the task."""

    width = 2048

    def prepare(self, task: Task) -> Iterator[Stage]:
        yield from super().prepare(task)
        if task.teacher is not None:
            size = task.student.head.in_features
            projector = nn.Sequential(nn.Linear(size, self.width), nn.ReLU(), nn.Linear(self.width, size))
            task.student.add_module("projector", projector.to(task.device))

    def distillation(self, task: Task, features: Tensor, features_before: Tensor, dream: Dream) -> Tensor:
        projected: Tensor = task.student.get_submodule("projector")(features)
        return super().distillation(task, projected, features_before, dream)

    def refine(self, task: Task) -> Iterator[Stage]:
        if task.teacher is not None:
            del task.student.projector
        yield from super().refine(task)


class SeparatePasses(ABD):
    """Real and generated images pass the student separately, so that BatchNorm mixes no statistics (Gao et al., ECCV 2022)."""

    def loss(self, task: Task, batch: Batch) -> Terms:
        apart: Any = _Apart(task.student, len(batch))
        return super().loss(replace(task, student=apart), batch)


class _Apart:
    """A network for a batch whose first images are real and whose others are generated."""

    def __init__(self, network: Network, real: int) -> None:
        self.head, self._network, self._real = network.head, network, real

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self._network.features(part) for part in (images[: self._real], images[self._real :])])


def _teacher(task: Task) -> Network:
    assert task.teacher is not None
    return task.teacher


@torch.no_grad()
def _before(task: Task, features_before: Tensor, dream: Dream) -> Tensor:
    """The teacher's features of all images of a step (2B, F)."""
    return torch.cat([features_before, _teacher(task).features(dream.images)])


@contextmanager
def averaged_statistics(share: float = 0.9) -> Iterator[None]:
    """Inside, the generator matches a running average of its batches' statistics (Fast Meta-DFKD: Fang et al., AAAI 2022)."""
    whole, last = objective.statistics_alignment, list[tuple[Tensor, Tensor]]()

    def alignment(statistics: Sequence[objective.LayerStatistics]) -> Tensor:
        if last:
            statistics = [
                (m, r, share * old_u + (1 - share) * u, share * old_v + (1 - share) * v)
                for (m, r, u, v), (old_u, old_v) in zip(statistics, last, strict=True)
            ]
        last[:] = [(u.detach(), v.detach()) for _, _, u, v in statistics]
        return whole(statistics)

    objective.statistics_alignment = alignment
    try:
        yield
    finally:
        objective.statistics_alignment = whole


@dataclass(frozen=True)
class Trial:
    """A part to try: a method that has it, changes of the recipe, or a context in which the task is learnt."""

    method: Callable[[], ABD] = ABD
    changes: dict[str, Any] = field(default_factory=dict)
    within: Callable[[], AbstractContextManager[None]] = nullcontext


TRIALS = {
    "as it is": Trial(),
    "EFC's feature matrix": Trial(FeatureMatrix),
    "distillation through a projector": Trial(Projector),
    "the same weight without a projector": Trial(PlainDistillation),
    "separate passes": Trial(SeparatePasses),
    "BatchNorm frozen": Trial(changes={"schedule.freeze_batchnorm": True}),
    "learning rate of the second task 0.02": Trial(changes={"schedule.later_learning_rate": 0.02}),
    "three times the distillation": Trial(changes={"remember.mu": 3 * (EDGE.remember.mu or ABD.mu)}),
    "twice as many dreams": Trial(changes={"remember.pool": 2 * EDGE.remember.pool}),
    # A running average passes on a tenth of the gradient, which ten times the weight makes up for.
    "averaged statistics in inversion": Trial(
        changes={"inversion.statistics": 10 * EDGE.inversion.statistics}, within=averaged_statistics
    ),
}


def run(
    data: Data,
    seed: int,
    out: Path,
    say: Callable[[str], None],
    names: Sequence[str] = tuple(TRIALS),
    protocol: accuracy.Protocol = PROTOCOL,
    recipe: Recipe = EDGE,
) -> dict[str, Any]:
    """Learns the first task once and the second with every trial, all from the same model; trials already in `out` are kept."""
    path = out / f"trials-{seed}.json"
    result = files.read(path)
    missing = [name for name in names if result is None or name not in result["trials"]]
    if result is not None and not missing:
        return dict(result)
    tasks = accuracy.tasks_of(protocol, data, seed)[:TASKS]
    first = accuracy.new_learner(protocol, "abd", seed, recipe, "cpu")
    accuracy.learn(first, protocol, data, tasks[:1], seed)
    if result is None:
        made = machine.provenance(torch.device("cpu"))
        result = {"protocol": asdict(protocol), "seed": seed, "recipe": recipe.to_dict(), **made, "trials": {}}
    machine.go_on(result)
    for name in missing:
        trial = TRIALS[name]
        changed = recipe.changed(trial.changes)
        learner = Learner.of(first.model, method=trial.method(), recipe=changed, seed=seed, precision="float32")
        with trial.within():
            seconds = accuracy.learn(learner, protocol, data, tasks[1:], seed)
        test = data.part("test", [number for task in tasks for number in task], 500)
        found = learner.evaluate(test, data.names)
        result["trials"][name] = {"accuracy": found.accuracy, "per_task": list(found.per_task), "seconds": seconds}
        say(f"{protocol.name} seed {seed}, {name}: {found.accuracy:.1%}, {seconds / 60:.1f} minutes")
        files.write(path, result)
    return result


def describe(folder: Path) -> str:
    """Markdown, a row for each trial; empty if there is no result."""
    runs = list(files.read_all(folder, "trials-*.json").values())
    rows = []
    for name in TRIALS:
        pairs = [(run["trials"][name], run["trials"]["as it is"]) for run in runs if name in run["trials"]]
        if pairs:
            gains = [trial["accuracy"] - base["accuracy"] for trial, base in pairs]
            minutes = mean(trial["seconds"] / base["seconds"] for trial, base in pairs)
            each = " / ".join(f"{100 * gain:+.1f}" for gain in gains)
            figures = [tables.over_seeds([trial["accuracy"] for trial, _ in pairs], 100), each, f"{minutes:.2f}"]
            rows.append([name, *(figures if name != "as it is" else [figures[0], "", ""])])
    note = (
        f"ABD with the recipe `{PROTOCOL.recipe}` and a trained head on {PROTOCOL.name}, accuracy after {TASKS} tasks, seeds "
        f"{', '.join(str(run['seed']) for run in runs)}. Every second task begins with the same model and takes the same steps; "
        "a row with fewer gains has the first seeds alone. Seconds are of runs that may have shared their machine. "
        "`python -m benchmarks trials` runs it."
    )
    return f"{note}\n\n{tables.table(['part', 'accuracy, %', 'gain by seed, points', 'times the seconds'], rows)}" if rows else ""
