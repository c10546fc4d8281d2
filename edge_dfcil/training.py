"""THE training loop. Generators, classifiers and heads are all trained by `fit`; a method only says what its loss is.

A task is learnt in stages: what the method prepares ("dream"), the learning itself ("learn"), and what it closes with
("refine"). Stages are made one at a time, so that what one needs is free before the next begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from edge_dfcil import devices
from edge_dfcil.backbones import batchnorm_layers
from edge_dfcil.errors import Cancelled, DataError, DivergedError
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import StageReport, TaskReport

if TYPE_CHECKING:
    from edge_dfcil.data import Batch, RealBatches
    from edge_dfcil.dreaming.inversion import Dreams
    from edge_dfcil.methods.base import Method
    from edge_dfcil.network import Network

Terms = dict[str, Tensor]  # the named terms of a loss; their sum is minimised


class Callback:
    """Empty hooks, called in this order. Override the ones you want; raise to stop, and nothing is committed."""

    def on_task_begin(self, task: Task) -> None:
        """Before the first stage."""

    def on_stage_begin(self, stage: Stage) -> None:
        """Before a stage's first step."""

    def on_step_end(self, stage: Stage, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        """After each optimiser step, numbered from 1. `losses` are detached scalars; `images` went through this step."""

    def on_stage_end(self, stage: Stage, report: StageReport) -> None:
        """After a stage's last step."""

    def on_task_end(self, report: TaskReport) -> None:
        """After the commit: the new model answers now."""

    def on_exit(self) -> None:
        """However the task ended, errors included: the place to close what was opened."""


@dataclass
class Task:
    """Everything a method may use while one task is learnt. It dies with the task, and with it all that was dreamt.

    Attributes
    ----------
    student
        The network in training, grown to all seen classes.
    teacher
        A frozen copy of the network before this task; None at the first task.
    current
        Outputs (C,) of the classes that have real images now: the new ones, and those relearnt.
    old
        Outputs (K,) of the classes to remember, which have none. Empty when there is nothing to remember.
    counts
        Real images by output (n_seen,) in one pass.
    batches
        The real images: augmented, normalised, on the device; one pass is an epoch. `plain()` gives them as they are.
    dreams
        What `prepare` left for `loss`.
    """

    student: Network
    teacher: Network | None
    current: Tensor
    old: Tensor
    counts: Tensor
    batches: RealBatches
    recipe: Recipe
    device: torch.device
    dreams: Dreams | None = None

    @property
    def remembers(self) -> bool:
        """Whether there is an old class to keep."""
        return self.teacher is not None and len(self.old) > 0

    @property
    def memory(self) -> tuple[Network, Dreams]:
        """The teacher and its dreams, for methods whose `prepare` made some."""
        assert self.teacher is not None and self.dreams is not None, "the method's prepare() left no dreams"
        return self.teacher, self.dreams

    @property
    def rho(self) -> float:
        """n_old / n_seen (ABD, section 5): the share of seen classes that have no real image now."""
        return len(self.old) / self.student.n_classes


@dataclass
class Stage:
    """A loss to minimise for a number of steps.

    Attributes
    ----------
    batches
        Re-iterable; repeated until `steps` are done.
    loss
        One batch to the named terms of the loss.
    trains
        The modules in train mode meanwhile; all others are in eval mode.
    """

    name: str
    batches: Iterable[Any]
    steps: int
    loss: Callable[[Any], Terms]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    trains: Sequence[nn.Module] = ()
    clip_gradient: float | None = None

    @property
    def epochs(self) -> int:
        """Passes over the batches that `steps` come to; 1 when they have no length."""
        return math.ceil(self.steps / len(self.batches)) if isinstance(self.batches, Sized) and len(self.batches) else 1


def fit(stage: Stage, device: torch.device, callbacks: Sequence[Callback], cancelled: Callable[[], bool]) -> StageReport:
    """Runs a stage: the only place that steps an optimiser.

    Raises `Cancelled` between steps, `DivergedError` when a loss is not finite, and `DataError` from the batches.
    """
    for callback in callbacks:
        callback.on_stage_begin(stage)
    for module in stage.trains:
        module.train()
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    begin, images, losses = time.perf_counter(), 0, {}
    for step, batch in enumerate(islice(_endless(stage.batches), stage.steps), start=1):
        if cancelled():
            raise Cancelled("learning was cancelled; the model is the one from before this task")
        with devices.autocast(device):
            terms = stage.loss(batch)
        total = torch.stack([term.float() for term in terms.values()]).sum()
        # Reading a number waits for the device: every step on the CPU, now and then on an accelerator.
        if (device.type == "cpu" or step % 20 == 0 or step == stage.steps) and not math.isfinite(total.item()):
            values = ", ".join(f"{name} {term.item():.4g}" for name, term in terms.items())
            raise DivergedError(
                f"the loss is not finite at step {step} of stage {stage.name!r} ({values}); lower the learning rate"
            )
        stage.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if stage.clip_gradient is not None:
            nn.utils.clip_grad_norm_(parameters, stage.clip_gradient)
        stage.optimizer.step()
        if stage.scheduler is not None:
            stage.scheduler.step()
        losses = {name: term.detach() for name, term in terms.items()}
        images += len(batch)
        for callback in callbacks:
            callback.on_step_end(stage, step, losses, len(batch))
    stage.optimizer.zero_grad(set_to_none=True)
    for module in stage.trains:
        module.eval()
    report = StageReport(stage.name, stage.steps, time.perf_counter() - begin, images, {k: v.item() for k, v in losses.items()})
    for callback in callbacks:
        callback.on_stage_end(stage, report)
    return report


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise DataError(
                "the loader gave no batch on a later pass; pass a DataLoader or a list, which can be read again and again"
            )


def stages(task: Task, method: Method) -> Iterator[Stage]:
    """The stages of a task, each made when the one before has been run."""
    yield from method.prepare(task)
    yield learning_stage(task, method)
    yield from method.refine(task)


def learning_stage(task: Task, method: Method) -> Stage:
    """SGD on the whole student under the recipe's schedule."""
    recipe, per_epoch = task.recipe, len(task.batches)
    epochs = recipe.epochs if task.teacher is not None else recipe.first_epochs or recipe.epochs
    steps = max(epochs * per_epoch, recipe.min_steps)
    optimizer = torch.optim.SGD(
        task.student.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )
    scheduler: LRScheduler
    if recipe.schedule == "step":
        scheduler = MultiStepLR(optimizer, [round(share * epochs) * per_epoch for share in recipe.milestones])
    else:
        scheduler = OneCycleLR(optimizer, recipe.learning_rate, total_steps=max(2, steps), cycle_momentum=False)
    if recipe.batchnorm_momentum is not None:
        for layer in batchnorm_layers(task.student):
            layer.momentum = recipe.batchnorm_momentum
    term = method.loss if task.remembers else method.first_loss

    def loss(batch: Batch) -> Terms:
        return term(task, batch)

    return Stage("learn", task.batches, steps, loss, optimizer, scheduler, [task.student], recipe.clip_gradient)


def check_finite(network: nn.Module) -> None:
    """Raises `DivergedError` if a weight or a running statistic is NaN or infinite."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DivergedError(f"{name} is not finite after training; nothing was committed. Lower the learning rate")
