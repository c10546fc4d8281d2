"""The contract of a method: what it prepares before a task, and a step's loss. It contains no loop and no device code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from edge_dfcil.methods._calibration import calibration_stage
from edge_dfcil.methods.task import Task
from edge_dfcil.model.backbones import batchnorm_layers
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, StageSpec, Terms, set_batchnorm_momentum


class Method(ABC):
    """A way of learning new classes. Instances keep no data: what one task needs is in its `Task`, which is then discarded."""

    name: ClassVar[str]
    mu: ClassVar[float] = 1.0  # the published weight of the term against forgetting
    state: ClassVar[Mapping[str, str]] = {}  # class statistics that it keeps, by name, with their roles

    def closed_form(self, recipe: Recipe) -> bool:
        """Whether its head is computed from class statistics; features of several scales are then the default."""
        return False

    def stages(self, task: Task) -> Iterator[Stage]:
        """The stages of a task in order, each made when the one before has been run."""
        yield from self.prepare(task)
        yield learning_stage(task, self)
        task.student.rotations = None
        yield from self.refine(task)
        if not self.closed_form(task.recipe):
            yield from calibration_stage(task)

    def instant(self, task: Task) -> Iterator[Stage]:
        """Stages that learn a task within seconds without training the network; none if that is impossible, or if `stages` is
        no slower. They have a separate `Task`, and their model is committed before `stages` begins."""
        return iter(())

    def prepare(self, task: Task) -> Iterator[Stage]:
        """Stages before training; what they make is stored in `task`. Also called at the first task, with nothing to remember.

        Making a stage may draw random numbers and read the teacher and what earlier stages made, but not the student's
        weights: a task that resumes from a checkpoint has those of a later step.
        """
        return iter(())

    def first_loss(self, task: Task, batch: Batch) -> Terms:
        """One step's loss when there is nothing to remember: cross-entropy over the current classes, and over those of rotated
        images if the recipe asks for them."""
        student, n = task.student, len(batch)
        if student.rotations is None:
            return {"cross_entropy": F.cross_entropy(student.classify(batch.images), batch.targets)}
        turned = torch.cat([batch.images.rot90(quarters, (2, 3)) for quarters in range(4)])
        features = student.features(turned)  # (4B, F)
        targets = torch.cat([4 * batch.targets + quarters for quarters in range(4)])
        return {
            "cross_entropy": F.cross_entropy(student.head(features[:n]), batch.targets),
            "rotations": F.cross_entropy(student.rotations(features), targets),
        }

    @abstractmethod
    def loss(self, task: Task, batch: Batch) -> Terms:
        """One step's loss from the second task on, as named terms whose sum is minimised."""

    def weight(self, task: Task) -> float:
        """The weight of the term against forgetting: the recipe's, else the published one."""
        return self.mu if task.recipe.remember.mu is None else task.recipe.remember.mu

    def refine(self, task: Task) -> Iterator[Stage]:
        """Stages after training, at every task."""
        return iter(())


def learning_stage(task: Task, method: Method) -> Stage:
    """SGD on the student under the recipe's schedule; on all of it, unless the recipe freezes its first layers."""
    recipe, per_epoch = task.recipe, len(task.batches)
    epochs = recipe.schedule.epochs if task.teacher is not None else recipe.schedule.first_epochs or recipe.schedule.epochs
    steps = task.share_of(max(epochs * per_epoch, recipe.schedule.min_steps))
    frozen = _first_layers(task.student.backbone, recipe.schedule.freeze) if task.teacher is not None else []
    for layer in frozen:
        layer.requires_grad_(False)
    if task.teacher is not None and recipe.schedule.freeze_batchnorm:
        frozen = [*frozen, *batchnorm_layers(task.student)]
    rate = recipe.schedule.learning_rate
    if task.teacher is not None and recipe.schedule.later_learning_rate is not None:
        rate = recipe.schedule.later_learning_rate
    if recipe.augmentation.rotations and task.teacher is None:
        head = task.student.head
        task.student.rotations = nn.Linear(head.in_features, 4 * head.out_features).to(head.weight.device)
    trained = [p for p in task.student.parameters() if p.requires_grad]

    def optimizer() -> Optimizer:
        return torch.optim.SGD(trained, rate, recipe.schedule.momentum, weight_decay=recipe.schedule.weight_decay)

    def scheduler(optimizer: Optimizer) -> LRScheduler:
        if recipe.schedule.shape == "step":
            return MultiStepLR(
                optimizer, [task.share_of(round(share * epochs) * per_epoch) for share in recipe.schedule.milestones]
            )
        return OneCycleLR(optimizer, rate, total_steps=max(2, steps), cycle_momentum=False)

    set_batchnorm_momentum(task.student, recipe)
    term = method.loss if task.remembers else method.first_loss

    def loss(batch: Batch) -> Terms:
        return term(task, batch)

    return StageSpec(
        "learn",
        task.batches,
        steps,
        loss,
        optimizer,
        scheduler,
        trains=[task.student],
        frozen=frozen,
        clip_gradient=recipe.schedule.clip_gradient,
        mixed_precision=recipe.schedule.mixed_precision,
        resumable=True,
    )


def _first_layers(backbone: nn.Module, share: float) -> list[nn.Module]:
    """The first share of the layers that have weights, in the order in which the backbone names them."""
    layers = [module for module in backbone.modules() if any(True for _ in module.parameters(recurse=False))]
    return layers[: round(share * len(layers))]
