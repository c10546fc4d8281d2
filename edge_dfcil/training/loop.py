"""THE training loop. Generators, classifiers and heads are all trained by `fit`; a stage only says what its loss is."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn

from edge_dfcil import devices
from edge_dfcil.errors import BudgetError, Cancelled, DataError, DivergedError
from edge_dfcil.results import StageReport
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.checkpointing import recomputing
from edge_dfcil.training.stage import Stage, Terms, momentum_of_parts


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


def check_finite(network: nn.Module) -> None:
    """Raises `DivergedError` if a weight or a running statistic is NaN or infinite."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DivergedError(f"{name} is not finite after training; nothing was committed. Lower the learning rate")
