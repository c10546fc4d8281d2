"""What is trained for a number of steps, and the named terms of its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from edge_dfcil.model.backbones import batchnorm_layers
from edge_dfcil.recipe import Recipe

Terms = dict[str, Tensor]  # the named terms of a loss; their sum is minimised


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


def set_batchnorm_momentum(network: nn.Module, recipe: Recipe) -> None:
    """Makes a network's running statistics follow as fast as the recipe says, if it says so."""
    if recipe.schedule.batchnorm_momentum is not None:
        for layer in batchnorm_layers(network):
            layer.momentum = recipe.schedule.batchnorm_momentum


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
