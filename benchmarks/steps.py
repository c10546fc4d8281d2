"""Single steps of ABD, ours and as published, on the same networks and images, and how to time them in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from demos import abd_in_one_file as one_file
from edge_dfcil import RECIPES, Learner, devices
from edge_dfcil.dreaming.generator import Generator
from edge_dfcil.dreaming.inversion import Dreamer, Dreams
from edge_dfcil.methods import base
from edge_dfcil.methods.abd import ABD
from edge_dfcil.methods.task import Task
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training import loop
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import StageSpec, StageState, Terms


@dataclass(frozen=True)
class Setting:
    """What is timed: a step with `n_old` known and `n_new` new classes; `images` is the size of a whole task."""

    backbone: str
    batch: int
    n_old: int
    n_new: int
    images: int
    rounds: int
    recipe: Recipe


FULL = Setting("resnet32", 128, 50, 10, 10_000, 7, RECIPES["paper"])
QUICK = Setting(
    "resnet8", 4, 3, 2, 16, 2, RECIPES["paper"].changed({"generator.latent": 8, "generator.width": 8, "generator.batch": 4})
)


class Published:
    """The two steps of `demos/abd_in_one_file.py`, which are the published ones without our savings, on copies of
    given networks, in torch's default memory order."""

    def __init__(self, teacher: Network, student: Network, generator: Generator) -> None:
        self.teacher, self.student = one_file.Teacher(classifier_of(teacher)), classifier_of(student).train()
        self.generator = generator_of(generator)
        self.adam = torch.optim.Adam(self.generator.parameters(), lr=1e-3)
        self.sgd = torch.optim.SGD(
            self.student.parameters(), one_file.LEARNING_RATE, one_file.MOMENTUM, weight_decay=one_file.WEIGHT_DECAY
        )

    def generator_step(self, n: int) -> dict[str, float]:
        """One step of the generator on `n` images; returns the terms of its loss."""
        return one_file.descend(self.adam, one_file.inversion_losses(self.teacher, self.generator.train().sample(n)))

    def classifier_step(self, images: Tensor, targets: Tensor) -> dict[str, float]:
        """One step of the student on real images (B, 3, S, S), targets (B,), and B generated images."""
        with torch.no_grad():
            dreams = self.generator.eval().sample(len(images))
        return one_file.descend(self.sgd, one_file.learning_losses(self.student, self.teacher, images, targets, dreams))


def classifier_of(network: Network) -> one_file.Classifier:
    """A copy of a network in the form of the one-file demo."""
    contiguous: Any = torch.contiguous_format
    copied = copy.deepcopy(network).to(memory_format=contiguous).requires_grad_(True)
    return one_file.Classifier(copied.backbone, copied.head)


def generator_of(generator: Generator) -> one_file.Generator:
    """A generator of the one-file demo with the same weights: it doubles first and then convolves."""
    other = one_file.Generator(generator.image_size, generator.latent, generator.width)
    other.load_state_dict(dict(zip(other.state_dict(), generator.state_dict().values(), strict=True)))
    return other.to(next(generator.parameters()).device)


class Bench:
    """One task's networks, twice: as published and as ours, with the same weights."""

    def __init__(self, setting: Setting, device: torch.device, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.setting, self.device, self.recipe = setting, device, recipe
        teacher = Learner(setting.backbone, device=device, mean=(0.5,) * 3, std=(0.25,) * 3, multiscale=False).network.grown(
            setting.n_old
        )
        self._settle(teacher)
        self.teacher = teacher.frozen()
        images = torch.randn(setting.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        targets = torch.randint(setting.n_old, setting.n_old + setting.n_new, (setting.batch,), device=device)
        self.batch = Batch(images, targets)
        self.student = teacher.grown(setting.n_new)
        self.dreamer = Dreamer(self.teacher, torch.arange(setting.n_old, device=device), recipe)

    def _settle(self, network: Network) -> None:
        """Sets running statistics by some passes, so that no loss is extreme."""
        network.train()
        with torch.no_grad():
            for _ in range(20):
                network.features(torch.randn(32, 3, 32, 32, device=self.device))

    def _task(self, student: Network, dreams: Dreams) -> Task:
        s = self.setting
        counts = torch.zeros(s.n_old + s.n_new, device=self.device)
        counts[s.n_old :] = s.images / s.n_new
        current, old = torch.arange(s.n_old, s.n_old + s.n_new), torch.arange(s.n_old)
        batches: Any = [self.batch]
        return Task(
            student, self.teacher, current.to(self.device), old.to(self.device), counts, batches, self.recipe, self.device,
            dreams,
        )  # fmt: skip

    def published(self) -> Published:
        return Published(self.teacher, self.student, self.dreamer.generator)

    def classifier(self, student: Network | None = None, dreams: Dreams | None = None) -> StageSpec:
        """Our learning stage, one step long; with this student and these dreams, if they are given."""
        task = self._task(self.student if student is None else student, Dreams.of(self.dreamer) if dreams is None else dreams)
        stage = base.learning_stage(task, ABD())
        assert isinstance(stage, StageSpec)
        return replace(stage, steps=1)

    def generator(self) -> StageSpec:
        return replace(self.dreamer.stage(), steps=1)

    def finetuning(self, n: int) -> StageSpec:
        """The floor: plain cross-entropy on as many images as a step of ABD sees."""
        student = copy.deepcopy(self.student)
        images, targets = self.batch.images.repeat(n // len(self.batch), 1, 1, 1), self.batch.targets.repeat(n // len(self.batch))

        def loss(batch: Batch) -> Terms:
            return {"cross_entropy": F.cross_entropy(student.classify(batch.images), batch.targets)}

        def optimizer() -> torch.optim.Optimizer:
            return torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=2e-4)

        return StageSpec("finetune", [Batch(images, targets)], 1, loss, optimizer, trains=[student])

    def step(self, stage: StageSpec) -> Callable[[], dict[str, float]]:
        """A stage as a step that can be run repeatedly."""
        state = StageState.at_start(stage)

        def one_more() -> dict[str, float]:
            return loop.fit(replace(stage, steps=state.step + 1), self.device, state=state).losses

        return one_more


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each step; each round takes all of them once. The first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            devices.synchronize(device)
            begin = time.perf_counter()
            step()
            devices.synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: median(found[1:]) for name, found in seconds.items()}
