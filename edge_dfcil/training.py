"""THE training loop. Generators, classifiers and heads are all trained by `fit`; a method only says what its loss is.

A task is learnt in stages: what the method prepares ("dream"), the learning itself ("learn"), and what it closes with
("refine"). Stages are made one at a time, so that what one needs is free before the next begins.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR

from edge_dfcil import devices
from edge_dfcil.backbones import batchnorm_layers
from edge_dfcil.errors import BudgetError, Cancelled, DataError, DivergedError
from edge_dfcil.recipe import Recipe
from edge_dfcil.recompute import recomputing
from edge_dfcil.results import StageReport, TaskReport

if TYPE_CHECKING:
    from edge_dfcil.data import Batch, RealBatches
    from edge_dfcil.dreaming.inversion import Dreams
    from edge_dfcil.methods.base import Method
    from edge_dfcil.network import Network

Terms = dict[str, Tensor]  # the named terms of a loss; their sum is minimised


class Callback:
    """Empty hooks, called in this order. Override the ones you want; raise to stop, and nothing is committed."""

    def on_plan_begin(self) -> None:
        """Before a memory budget is planned, which takes some seconds to a minute. Not called without a budget."""

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
    frozen
        Layers inside `trains` that stay in eval mode, as they are.
    at_once
        Images that go through the networks at once; a larger batch is split, and its gradients accumulate. None: all.
    recompute
        Whether the activations inside the blocks of `trains` are computed again for the backward pass instead of kept.
    look
        Called with the parts of a split batch before the first loss, for losses that need to know the whole batch.
    """

    name: str
    batches: Iterable[Any]
    steps: int
    loss: Callable[[Any], Terms]
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None = None
    trains: Sequence[nn.Module] = ()
    frozen: Sequence[nn.Module] = ()
    clip_gradient: float | None = None
    at_once: int | None = None
    recompute: bool = False
    look: Callable[[Sequence[Any]], None] | None = None

    @property
    def epochs(self) -> int:
        """Passes over the batches that `steps` come to; 1 when they have no length."""
        return math.ceil(self.steps / len(self.batches)) if isinstance(self.batches, Sized) and len(self.batches) else 1


def fit(
    stage: Stage,
    device: torch.device,
    callbacks: Sequence[Callback],
    cancelled: Callable[[], bool],
    too_much: Callable[[Stage], bool] = lambda stage: False,
) -> StageReport:
    """Runs a stage: the only place that steps an optimiser.

    `too_much` is asked before each step of the optimiser whether memory has run over its budget; the step is then made
    again with half as many images at once, as it is after a real lack of memory.

    Raises `Cancelled` between steps, `DivergedError` when a loss is not finite, `DataError` from the batches, and
    `BudgetError` when there is too little memory for two images.
    """
    for callback in callbacks:
        callback.on_stage_begin(stage)
    for module in stage.trains:
        module.train()
    for layer in stage.frozen:
        layer.eval()
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    begin, images, halvings = time.perf_counter(), 0, 0
    losses: Terms = {}
    for step, batch in enumerate(islice(_endless(stage.batches), stage.steps), start=1):
        if cancelled():
            raise Cancelled("learning was cancelled; the model is the one from before this task")
        losses, halvings = _within(stage, batch, device, too_much, halvings)
        # Reading a number waits for the device: every step on the CPU, now and then on an accelerator.
        total = torch.stack(list(losses.values())).sum()
        if (device.type == "cpu" or step % 20 == 0 or step == stage.steps) and not math.isfinite(total.item()):
            values = ", ".join(f"{name} {term.item():.4g}" for name, term in losses.items())
            raise DivergedError(
                f"the loss is not finite at step {step} of stage {stage.name!r} ({values}); lower the learning rate"
            )
        if stage.clip_gradient is not None:
            nn.utils.clip_grad_norm_(parameters, stage.clip_gradient)
        stage.optimizer.step()
        if stage.scheduler is not None:
            stage.scheduler.step()
        images += len(batch)
        for callback in callbacks:
            callback.on_step_end(stage, step, losses, len(batch))
    stage.optimizer.zero_grad(set_to_none=True)
    for module in stage.trains:
        module.eval()
    report = StageReport(
        stage.name,
        stage.steps,
        time.perf_counter() - begin,
        images,
        {k: v.item() for k, v in losses.items()},
        at_once=stage.at_once,
        recompute=stage.recompute,
        halvings=halvings,
    )
    for callback in callbacks:
        callback.on_stage_end(stage, report)
    return report


def _within(
    stage: Stage, batch: Any, device: torch.device, too_much: Callable[[Stage], bool], halvings: int
) -> tuple[Terms, int]:
    """`_backward` with as many images at once as memory allows: a step that took too much is made again with half."""
    while True:
        stage.optimizer.zero_grad(set_to_none=True)
        lack: Exception | None = None
        try:
            losses = _backward(stage, batch, device)
            if not too_much(stage):
                return losses, halvings
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            lack = error.with_traceback(None)  # which would keep the step's tensors alive
        at_once = min(stage.at_once or len(batch), len(batch))
        if at_once < 4:
            raise BudgetError(
                f"stage {stage.name!r} took more memory than it may with {at_once} images at once; nothing was committed. "
                "Smaller images or a smaller backbone need less"
            ) from lack
        stage.at_once, halvings = at_once // 2, halvings + 1


def _backward(stage: Stage, batch: Any, device: torch.device) -> Terms:
    """Gradients of a batch's loss, part by part; returns the detached terms of the whole."""
    parts = [batch] if stage.at_once is None or len(batch) <= stage.at_once else _split(batch, stage.at_once)
    losses: Terms = {}
    with momentum_of_parts(stage.trains, len(parts)), recomputing(stage.trains) if stage.recompute else nullcontext():
        if len(parts) > 1 and stage.look is not None:
            with devices.autocast(device):
                stage.look(parts)
        for part in parts:
            with devices.autocast(device):
                terms = stage.loss(part)
            share = len(part) / len(batch)
            terms = {name: share * term.float() for name, term in terms.items()}
            torch.stack(list(terms.values())).sum().backward()
            losses = {name: losses.get(name, 0) + term.detach() for name, term in terms.items()}
    return losses


def _split(batch: Any, at_once: int) -> list[Any]:
    """Parts as even as can be: BatchNorm learns little from a part of one image."""
    count = math.ceil(len(batch) / at_once)
    bounds = [len(batch) * part // count for part in range(count + 1)]
    return [batch[begin:end] for begin, end in itertools.pairwise(bounds)]


@contextmanager
def momentum_of_parts(modules: Sequence[nn.Module], parts: float) -> Iterator[None]:
    """Running statistics that move as far in `parts` forward passes as they would in one; not at all if they are infinite."""
    before = [(layer, layer.momentum) for module in modules for layer in batchnorm_layers(module)]
    try:
        for layer, momentum in before if parts > 1 else ():
            layer.momentum = momentum if momentum is None else 1 - (1 - momentum) ** (1 / parts)
        yield
    finally:
        for layer, momentum in before:
            layer.momentum = momentum


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
    """SGD on the student under the recipe's schedule; on all of it, unless the recipe freezes its first layers."""
    recipe, per_epoch = task.recipe, len(task.batches)
    epochs = recipe.epochs if task.teacher is not None else recipe.first_epochs or recipe.epochs
    steps = max(epochs * per_epoch, recipe.min_steps)
    frozen = _first_layers(task.student.backbone, recipe.freeze) if task.teacher is not None else []
    for layer in frozen:
        layer.requires_grad_(False)
    trained = [p for p in task.student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay)
    scheduler: LRScheduler
    if recipe.schedule == "step":
        scheduler = MultiStepLR(optimizer, [round(share * epochs) * per_epoch for share in recipe.milestones])
    else:
        scheduler = OneCycleLR(optimizer, recipe.learning_rate, total_steps=max(2, steps), cycle_momentum=False)
    set_batchnorm_momentum(task.student, recipe)
    term = method.loss if task.remembers else method.first_loss

    def loss(batch: Batch) -> Terms:
        return term(task, batch)

    return Stage(
        "learn", task.batches, steps, loss, optimizer, scheduler,
        trains=[task.student], frozen=frozen, clip_gradient=recipe.clip_gradient,
    )  # fmt: skip


def set_batchnorm_momentum(network: nn.Module, recipe: Recipe) -> None:
    """Makes a network's running statistics follow as fast as the recipe says, if it says so."""
    if recipe.batchnorm_momentum is not None:
        for layer in batchnorm_layers(network):
            layer.momentum = recipe.batchnorm_momentum


def _first_layers(backbone: nn.Module, share: float) -> list[nn.Module]:
    """The first share of the layers that have weights, in the order in which the backbone names them."""
    layers = [module for module in backbone.modules() if any(True for _ in module.parameters(recurse=False))]
    return layers[: round(share * len(layers))]


def check_finite(network: nn.Module) -> None:
    """Raises `DivergedError` if a weight or a running statistic is NaN or infinite."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DivergedError(f"{name} is not finite after training; nothing was committed. Lower the learning rate")
