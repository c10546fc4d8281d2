"""Stages: their definitions (`StageSpec`, `ClosedFormSpec`) and their progress (`StageState`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from edge_dfcil.model.backbones import batchnorm_layers
from edge_dfcil.recipe import Recipe

Terms = dict[str, Tensor]  # the named terms of a loss; their sum is minimised


@dataclass(frozen=True)
class StageSpec:
    """A training stage: a loss to minimise for a number of steps. Its progress is in `StageState`.

    Attributes
    ----------
    batches
        Re-iterable; repeated until `steps` are done.
    loss
        Maps one batch to the named terms of the loss.
    optimizer, scheduler
        Called once, when the stage begins.
    trains
        The modules in train mode while it runs; all others are in eval mode.
    frozen
        Layers inside `trains` that stay in eval mode.
    micro_batch
        Images that go through the networks together; a larger batch is split (gradient accumulation). None: whole batches.
    recompute
        Whether the activations inside the blocks of `trains` are recomputed for the backward pass (activation checkpointing).
    before_parts
        Called with the parts of a split batch before the first loss, for losses that depend on the whole batch.
    over_budget
        Called after the gradients of a step are computed, before the optimizer step: whether the step took too much memory. If
        so, it is repeated with half the micro-batch, as after an out-of-memory error.
    mixed_precision
        Whether losses are computed under autocast if the device has bf16.
    resumable
        Whether a checkpoint can continue inside the stage: its parameters are those of the network that is learning.
        Other stages generate images, which no checkpoint may contain; they are run again from the same random state.
    """

    name: str
    batches: Iterable[Any]
    steps: int
    loss: Callable[[Any], Terms]
    optimizer: Callable[[], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    trains: Sequence[nn.Module] = ()
    frozen: Sequence[nn.Module] = ()
    clip_gradient: float | None = None
    micro_batch: int | None = None
    recompute: bool = False
    before_parts: Callable[[Sequence[Any]], None] | None = None
    over_budget: Callable[[StageState], bool] | None = None
    resumable: bool = False
    mixed_precision: bool = True

    @property
    def per_epoch(self) -> int:
        """Steps of one pass over the batches; `steps` when they have no length."""
        return len(self.batches) if isinstance(self.batches, Sized) and len(self.batches) else self.steps

    @property
    def epochs(self) -> int:
        """Passes over the batches that `steps` amount to."""
        return math.ceil(self.steps / self.per_epoch) if self.steps else 0


class Sums(Protocol):
    """The sums of a closed-form stage."""

    def add(self, batch: Any) -> None:
        """Adds a batch; called without gradients, all modules in eval mode."""

    def solve(self) -> None:
        """Called after the last batch: computes the solution from the sums."""


@dataclass(frozen=True)
class ClosedFormSpec:
    """A closed-form stage: one pass that sums over batches, and a solution that is computed from the sums.

    Attributes
    ----------
    batches
        Read once; again from the start when the stage was interrupted.
    sums
        Creates empty sums.
    micro_batch
        As for `StageSpec`: a larger batch is added in parts.
    """

    name: str
    batches: Iterable[Any]
    sums: Callable[[], Sums]
    micro_batch: int | None = None

    @property
    def steps(self) -> int:
        """Batches of the pass; 0 when their number is not known."""
        return len(self.batches) if isinstance(self.batches, Sized) else 0

    @property
    def epochs(self) -> int:
        return 1


Stage = StageSpec | ClosedFormSpec


@dataclass
class StageState:
    """The progress of a training stage.

    Attributes
    ----------
    step
        Steps of the optimizer that are done.
    consumed
        Batches that have been read in the current pass.
    pass_random
        The random state before the current pass began: the order of a shuffled loader follows from it.
    micro_batch, halvings
        The current micro-batch, and how often it was halved.
    history
        The mean of each term of the loss, for each pass.
    """

    step: int = 0
    consumed: int = 0
    pass_random: dict[str, Tensor] = field(default_factory=dict)
    micro_batch: int | None = None
    halvings: int = 0
    images: int = 0
    seconds: float = 0.0
    losses: Terms = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    scheduler: LRScheduler | None = None
    # For a stage that continues in the same process: batches of the current pass that have been read are not read again.
    iterator: Iterator[Any] | None = None

    @classmethod
    def at_start(cls, stage: StageSpec) -> StageState:
        """Before the first step."""
        optimizer = stage.optimizer()
        scheduler = stage.scheduler(optimizer) if stage.scheduler is not None else None
        return cls(optimizer=optimizer, scheduler=scheduler, micro_batch=stage.micro_batch)


def set_batchnorm_momentum(network: nn.Module, recipe: Recipe) -> None:
    """Sets the momentum of a network's running statistics, if the recipe has one."""
    if recipe.schedule.batchnorm_momentum is not None:
        for layer in batchnorm_layers(network):
            layer.momentum = recipe.schedule.batchnorm_momentum


@contextmanager
def momentum_of_parts(modules: Sequence[nn.Module], parts: float) -> Iterator[None]:
    """Inside, running statistics move as far in `parts` forward passes as otherwise in one; not at all if `parts` is infinite."""
    before = [(layer, layer.momentum) for module in modules for layer in batchnorm_layers(module)]
    try:
        for layer, momentum in before if parts > 1 else ():
            layer.momentum = momentum if momentum is None else 1 - (1 - momentum) ** (1 / parts)
        yield
    finally:
        for layer, momentum in before:
            layer.momentum = momentum
