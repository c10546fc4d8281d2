"""ABD with one part of another method each: does the second task end better, at the same number of steps?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
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
from edge_dfcil.training.stage import Stage, StageSpec, Terms


@dataclass(frozen=True)
class Setting:
    """Where the parts are tried.

    Attributes
    ----------
    recipe
        Of the second task.
    first
        What the first task changes of it.
    """

    protocol: accuracy.Protocol
    recipe: Recipe
    first: Mapping[str, Any]


def _setting(preset: str, other: dict[str, Any], changes: Mapping[str, Any], first: Mapping[str, Any]) -> Setting:
    protocol = accuracy.changed(accuracy.find_preset(preset), other)
    return Setting(protocol, find_recipe(protocol.recipe).changed(dotted(protocol.changes | dict(changes))), first)


SETTINGS = {
    "edge-5x4": _setting("edge-5x4", {"per_class": 150}, {}, {}),
    # The head is closed-form: a trained one had forgotten 92 % of the first task after as few steps.
    "pretrained-signs": _setting(
        "pretrained-signs",
        {"image_size": 48, "recipe": "edge"},
        accuracy.VARIANTS["abd:drift"]
        | {"schedule.epochs": 6, "schedule.min_steps": 120, "schedule.later_learning_rate": 0.01}
        | {"generator.batch": 32, "generator.steps": 100, "remember.pool": 1024},
        {"schedule.adapt": "first"},
    ),
}
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


class GuidedInversion(ABD):
    """Generated images of each old class match its stored mean, and the variance within classes, in the teacher's last features.

    As in guided latent inversion (`latent`), but of images, and beside the statistics of BatchNorm. The class of a generated
    image is the one that the teacher sees.
    """

    fewest = 4  # images of a class in a batch from which its mean and variance are taken
    mean_weight = 5.0

    def prepare(self, task: Task) -> Iterator[Stage]:
        for stage in super().prepare(task):
            if isinstance(stage, StageSpec) and stage.name == "dream":
                stage = replace(stage, loss=self._guided(task, stage.loss))
            yield stage

    def _guided(self, task: Task, loss: Callable[[Any], Terms]) -> Callable[[Any], Terms]:
        head, size = _teacher(task).head, task.student.own_features
        means = task.statistics["mean"].values[:, :size].to(task.device)  # (K, F)
        within = task.statistics["covariance"].values.diagonal()[:size].to(task.device)
        floor = 0.3 * (within + means.var(0)).mean()  # many features hardly vary
        scale = within + floor

        def guided(noise: Tensor) -> Terms:
            seen = list[tuple[Tensor, Tensor]]()
            hook = head.register_forward_hook(lambda layer, inputs, logits: seen.append((inputs[0], logits)))
            try:
                terms = loss(noise)
            finally:
                hook.remove()
            ((features, logits),) = seen
            labels = logits.argmax(1)
            found = [k for k, n in enumerate(labels.bincount(minlength=len(means)).tolist()) if n >= self.fewest]
            for k in found:
                own = features[labels == k]
                away = ((own.mean(0) - means[k]).square() / scale).mean()
                spread = ((own.var(0) + floor) / scale).log().square().mean()
                terms["guide"] = terms.get("guide", torch.zeros(())) + (self.mean_weight * away + spread) / len(found)
            return terms

        return guided


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
    """A part to try: a method that has it, changes of the recipe, or a context in which the task is learnt.

    Attributes
    ----------
    closed_form
        Whether it needs a closed-form head, and the class statistics that are kept for it.
    """

    method: type[ABD] = ABD
    changes: Callable[[Recipe], dict[str, Any]] = lambda recipe: {}
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    closed_form: bool = False


AS_IT_IS = "as it is"
TRIALS = {
    AS_IT_IS: Trial(),
    "EFC's feature matrix": Trial(FeatureMatrix),
    "distillation through a projector": Trial(Projector),
    "the same weight without a projector": Trial(PlainDistillation),
    "separate passes": Trial(SeparatePasses),
    "BatchNorm frozen": Trial(changes=lambda recipe: {"schedule.freeze_batchnorm": True}),
    "learning rate of the second task 0.02": Trial(changes=lambda recipe: {"schedule.later_learning_rate": 0.02}),
    "three times the distillation": Trial(changes=lambda recipe: {"remember.mu": 3 * (recipe.remember.mu or ABD.mu)}),
    "twice as many dreams": Trial(changes=lambda recipe: {"remember.pool": 2 * recipe.remember.pool}),
    "guided inversion": Trial(GuidedInversion, closed_form=True),
    "a frozen network": Trial(changes=lambda recipe: {"schedule.adapt": "first"}, closed_form=True),
    # A running average passes on a tenth of the gradient, which ten times the weight makes up for.
    "averaged statistics in inversion": Trial(
        changes=lambda recipe: {"inversion.statistics": 10 * recipe.inversion.statistics}, within=averaged_statistics
    ),
}


def run(
    setting: Setting,
    data: Data,
    seed: int,
    out: Path,
    say: Callable[[str], None],
    names: Sequence[str] = tuple(TRIALS),
) -> dict[str, Any]:
    """Learns the first task once and the second with every trial, all from the same model; trials already in `out` are kept."""
    protocol, recipe = setting.protocol, setting.recipe
    path = out / f"trials-{protocol.name}-{seed}.json"
    names = [name for name in names if recipe.refine.head == "lda" or not TRIALS[name].closed_form]
    about = {"protocol": asdict(protocol), "seed": seed, "recipe": recipe.to_dict()}
    result, missing = machine.continued(path, "trials", names, **about)
    if not missing:
        return result
    tasks = accuracy.tasks_of(protocol, data, seed)[:TASKS]
    first = accuracy.new_learner(protocol, "abd", seed, recipe.changed(setting.first), "cpu")
    accuracy.learn(first, protocol, data, tasks[:1], seed)
    for name in missing:
        trial = TRIALS[name]
        changed = recipe.changed(trial.changes(recipe))
        learner = Learner.of(first.model, method=trial.method(), recipe=changed, seed=seed, precision="float32")
        with trial.within():
            seconds = accuracy.learn(learner, protocol, data, tasks[1:], seed, instant=False)
        test = data.part("test", [number for task in tasks for number in task], 500)
        found = learner.evaluate(test, data.names)
        result["trials"][name] = {"accuracy": found.accuracy, "per_task": list(found.per_task), "seconds": seconds}
        say(f"{protocol.name} seed {seed}, {name}: {found.accuracy:.1%}, {seconds / 60:.1f} minutes")
        files.write(path, result)
    return result


def describe(folder: Path) -> str:
    """Markdown, a table for each setting that has a result, a row for each trial."""
    runs = list(files.read_all(folder, "trials-*.json").values())
    names = dict.fromkeys(run["protocol"]["name"] for run in runs)
    return "\n\n".join(_described([run for run in runs if run["protocol"]["name"] == name]) for name in names)


def _described(runs: list[dict[str, Any]]) -> str:
    rows = []
    for name in TRIALS:
        pairs = [(run["trials"][name], run["trials"][AS_IT_IS]) for run in runs if {name, AS_IT_IS} <= run["trials"].keys()]
        if pairs:
            gains = [trial["accuracy"] - base["accuracy"] for trial, base in pairs]
            minutes = mean(trial["seconds"] / base["seconds"] for trial, base in pairs)
            each = " / ".join(f"{100 * gain:+.1f}" for gain in gains)
            figures = [tables.over_seeds([trial["accuracy"] for trial, _ in pairs], 100), each, f"{minutes:.2f}"]
            rows.append([name, *(figures if name != AS_IT_IS else [figures[0], "", ""])])
    recipe = runs[0]["recipe"]
    head = "a closed-form head, with drift-compensated statistics" if recipe["refine"]["head"] == "lda" else "a trained head"
    note = (
        f"ABD with the recipe `{recipe['preset']}` and {head} on {runs[0]['protocol']['name']}, accuracy after {TASKS} tasks, "
        f"seeds {', '.join(str(run['seed']) for run in runs)}. Every second task begins with the same model and "
        "trains the whole network for the same steps, unless the row says otherwise; a row with fewer gains has the first seeds "
        "alone. Seconds are of runs that may have shared their machine. `python -m benchmarks trials` runs it."
    )
    return f"{note}\n\n{tables.table(['part', 'accuracy, %', 'gain by seed, points', 'times the seconds'], rows)}"
