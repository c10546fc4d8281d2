"""In which precision, memory order and number of threads a training step is fastest here, and whether bf16 costs accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import machine
from benchmarks.datasets import Data, class_order
from benchmarks.steps import in_turns
from benchmarks.tables import processor, table
from edge_dfcil import RECIPES, Learner, devices
from edge_dfcil.methods.base import learning_stage
from edge_dfcil.methods.finetune import Finetune
from edge_dfcil.methods.task import Task
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import Computing
from edge_dfcil.training import loop
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import StageSpec, StageState

FILE = "precision.json"
RECIPE = RECIPES["edge"].changed({"schedule.first_epochs": 8, "schedule.min_steps": 0})


@dataclass(frozen=True)
class Setting:
    """`backbones` with their image sizes are timed at `batch` images; `accuracy_of` learns `classes` of CIFAR-100 by `recipe`,
    `per_class` images each."""

    backbones: tuple[tuple[str, int], ...] = (("resnet32", 32), ("resnet18", 32), ("mobilenet_v3_small", 64))
    batch: int = 32
    rounds: int = 5
    accuracy_of: str = "resnet8"
    recipe: Recipe = RECIPE
    classes: int = 4
    per_class: int = 200
    seeds: Sequence[int] = (0, 1, 2)


FULL = Setting()
QUICK = Setting((("resnet8", 16),), 4, 1, recipe=RECIPE.changed({"schedule.first_epochs": 1}), per_class=8, seeds=(0,))


def run(data: Data, setting: Setting, say: Callable[[str], None], remark: str | None = None) -> dict[str, Any]:
    """Makes all measurements, on the CPU; see `describe` for what they say."""
    cpu = torch.device("cpu")
    found: dict[str, Any] = {"seconds": {}, "accuracy": {}, "remark": remark, "batch": setting.batch}
    for backbone, side in setting.backbones:
        say(f"steps of {backbone}, in turns")
        steps = {str(computing): _step(backbone, side, setting, computing) for computing in choices()}
        found["seconds"][backbone] = in_turns(steps, setting.rounds, cpu)
    for seed in setting.seeds:
        for precision in ("float32", "bfloat16"):
            say(f"accuracy of {precision}, seed {seed}")
            found["accuracy"].setdefault(precision, []).append(_accuracy(data, setting, precision, seed))
    found["setting"] = {
        "backbone": setting.accuracy_of,
        "recipe": setting.recipe.differences(),
        "classes": setting.classes,
        "per_class": setting.per_class,
        "seeds": list(setting.seeds),
    }
    return {**found, **machine.provenance(cpu)}


def choices() -> list[Computing]:
    """The settings that a session chooses from."""
    threads = torch.get_num_threads()
    fewer = [Computing(threads=threads // 2)] if threads > 1 else []
    layouts = [replace(computing, channels_last=False) for computing in (Computing(), Computing("bfloat16"))]
    return [Computing(), Computing("bfloat16"), *layouts, *fewer]


def _step(backbone: str, side: int, setting: Setting, computing: Computing) -> Callable[[], object]:
    """A step of a first task's learning, which can be run repeatedly."""
    cpu, classes = torch.device("cpu"), 10
    with devices.computing(computing), devices.seeded(0, cpu):
        network = Learner(backbone, image_size=side, device=cpu, mean=(0.5,) * 3, std=(0.25,) * 3, multiscale=False).network
        student = devices.reordered(network, cpu).grown(classes)
        images = torch.randn(setting.batch, 3, side, side).contiguous(memory_format=devices.memory_format(cpu))
        everything = torch.arange(classes)
        batches: Any = [Batch(images, torch.randint(classes, (setting.batch,)))]
        counts = torch.full((classes,), 10.0)
        recipe = setting.recipe.changed({"schedule.min_steps": 1000})
        task = Task(student, None, everything, everything[:0], counts, batches, recipe, cpu)
        stage = learning_stage(task, Finetune())
        assert isinstance(stage, StageSpec)
        state = StageState.at_start(stage)

    def step() -> None:
        with devices.computing(computing):
            loop.fit(replace(stage, steps=state.step + 1), cpu, state=state)

    return step


def _accuracy(data: Data, setting: Setting, precision: str, seed: int) -> float:
    """Accuracy on a first task, in [0, 1]."""
    order = class_order(len(data.names), seed)[: setting.classes]
    learner = Learner(setting.accuracy_of, recipe=setting.recipe, precision=precision, device="cpu", seed=seed)
    learner.learn_task(data.part("train", order, setting.batch).few(setting.per_class, seed), data.names, progress=False)
    return learner.evaluate(data.part("test", order, 200), data.names).accuracy


def describe(found: dict[str, Any]) -> str:
    """Step times as shares of that with the usual settings, and accuracy by precision."""
    names = list(next(iter(found["seconds"].values())))
    rows = [
        [backbone, f"{1000 * seconds[names[0]]:.0f} ms", *(f"{seconds[name] / seconds[names[0]]:.2f}" for name in names[1:])]
        for backbone, seconds in found["seconds"].items()
    ]
    lines = [
        f"{processor(found['machine'])}, torch {found['versions']['torch']}; a step of "
        f"{found['batch']} images, in turns, and others as a share of it",
        *([found["remark"]] if found["remark"] else []),
        table(["backbone", *names], rows),
    ]
    for precision, values in found["accuracy"].items():
        each = ", ".join(f"{100 * value:.1f}" for value in values)
        lines.append(f"{precision}: {100 * statistics.mean(values):.1f} % of the first task's test images ({each})")
    return "\n".join(lines)
