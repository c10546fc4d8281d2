"""Activation checkpointing: a block keeps only its input, and computes its activations again for the backward pass.

It takes about a third more time and a fraction of the memory; the results are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from edge_dfcil.model.backbones import batchnorm_layers


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network worth recomputing: the elements of its `nn.Sequential` modules, except single operations."""
    for child in module.children():
        if isinstance(module, nn.Sequential) and type(child) is not nn.Sequential:
            if any(True for _ in child.children()):
                yield child
        else:
            yield from blocks(child)


@contextmanager
def recomputing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the activations of every block of the modules are recomputed for the backward pass instead of kept."""
    found = [block for module in modules for block in blocks(module)]
    for block in found:
        block.forward = _recomputed(block, block.forward)
    try:
        yield
    finally:
        for block in found:
            del block.forward  # of the instance; the method of the class is used again


def _recomputed(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_as_they_are(block)), **kwargs
        )

    return run


@contextmanager
def _statistics_as_they_are(block: nn.Module) -> Iterator[None]:
    """The second pass over the same images must not move the running statistics again."""
    before = [(layer, layer.momentum) for layer in batchnorm_layers(block) if layer.training]
    for layer, _ in before:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in before:
            layer.momentum = momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked -= 1
