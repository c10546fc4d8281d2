"""The training loop. Generators, classifiers and heads are all trained by `fit`; a stage only defines its loss."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edge_dfcil import devices
from edge_dfcil.errors import BudgetError, DataError, DivergedError
from edge_dfcil.model.backbones import batchnorm_layers
from edge_dfcil.results import StageReport
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.checkpointing import recomputing
from edge_dfcil.training.stage import ClosedFormSpec, Stage, StageSpec, StageState, Sums, Terms, momentum_of_parts


class StageEnded(Exception):
    """Raised by `check` to end a stage after the steps made so far."""


def run(
    stage: Stage,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
    check: Callable[[], object] = lambda: None,
    state: StageState | None = None,
) -> StageReport:
    """Runs a stage of either kind."""
    if isinstance(stage, ClosedFormSpec):
        return solve(stage, callbacks, check)
    return fit(stage, device, callbacks, check, state)


def fit(
    stage: StageSpec,
    device: torch.device,
    callbacks: Sequence[Callback] = (),
    check: Callable[[], object] = lambda: None,
    state: StageState | None = None,
) -> StageReport:
    """Runs a training stage from `state` to its end: the only place that steps an optimizer.

    `check` is called before each step and may raise: `StageEnded` ends the stage with what it has learnt. Any other exception
    leaves `state` between two steps, and the next call of `fit` continues from there.

    Raises `DivergedError` when a loss is not finite, `DataError` from the batches, and `BudgetError` when there is too
    little memory for two images.
    """
    state = StageState.at_start(stage) if state is None else state
    assert state.optimizer is not None
    for callback in callbacks:
        callback.on_stage_begin(stage)
    for module in stage.trains:
        module.train()
    for layer in stage.frozen:
        layer.eval()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    begin, before = time.perf_counter(), state.seconds
    try:
        for batch in _batches(stage, state, device, check):
            losses = _within_memory(stage, state, batch, device)
            _check_finite(stage, state, losses, device)
            if stage.clip_gradient is not None:
                nn.utils.clip_grad_norm_(parameters, stage.clip_gradient)
            state.optimizer.step()
            if state.scheduler is not None:
                state.scheduler.step()
            state.step, state.consumed = state.step + 1, state.consumed + 1
            state.images, state.losses = state.images + len(batch), losses
            state.seconds = before + time.perf_counter() - begin
            _note(stage, state, callbacks)
            for callback in callbacks:
                callback.on_step_end(stage, state.step, losses, len(batch))
    except StageEnded:
        pass
    state.optimizer.zero_grad(set_to_none=True)
    for module in stage.trains:
        module.eval()
    report = StageReport(
        stage.name,
        state.step,
        state.seconds,
        state.images,
        {name: value.item() for name, value in state.losses.items()},
        at_once=state.micro_batch,
        recompute=stage.recompute,
        halvings=state.halvings,
        history=tuple(state.history),
    )
    for callback in callbacks:
        callback.on_stage_end(stage, report)
    return report


@torch.no_grad()
def solve(stage: ClosedFormSpec, callbacks: Sequence[Callback], check: Callable[[], object]) -> StageReport:
    """Runs a closed-form stage: one pass over its batches, then the solution."""
    for callback in callbacks:
        callback.on_stage_begin(stage)
    begin, steps, images, sums = time.perf_counter(), 0, 0, stage.sums()
    for steps, batch in enumerate(stage.batches, start=1):
        check()
        for part in _split(batch, stage.micro_batch):
            _add_within_memory(stage, sums, part)
        images += len(batch)
        for callback in callbacks:
            callback.on_step_end(stage, steps, {}, len(batch))
    sums.solve()
    report = StageReport(stage.name, steps, time.perf_counter() - begin, images, {}, at_once=stage.micro_batch)
    for callback in callbacks:
        callback.on_stage_end(stage, report)
    return report


def _batches(stage: StageSpec, state: StageState, device: torch.device, check: Callable[[], object]) -> Iterator[Any]:
    """The batches from the current step of the stage to its last, pass after pass. `check` comes before a batch is read, so
    that none is lost when it raises."""
    if state.iterator is None and state.consumed:  # resumed in another process: read the current pass again up to here
        now = devices.random_state(device)
        devices.set_random_state(state.pass_random, device)
        state.iterator = iter(stage.batches)
        for _ in range(state.consumed):
            next(state.iterator, None)
        devices.set_random_state(now, device)
    while state.step < stage.steps:
        check()
        if state.iterator is None:
            state.pass_random, state.consumed = devices.random_state(device), 0
            state.iterator = iter(stage.batches)
        batch = next(state.iterator, None)
        if batch is not None:
            yield batch
        elif state.consumed == 0:
            raise DataError("the loader gave no batch on a later pass; pass a DataLoader or a list, which can be read repeatedly")
        else:
            state.iterator = None
    state.iterator = None


def _note(stage: StageSpec, state: StageState, callbacks: Sequence[Callback]) -> None:
    """Adds a step's losses to the mean of its pass; at the end of a pass, the mean is added to the history."""
    for name, value in state.losses.items():
        state.sums[name] = state.sums.get(name, 0.0) + value  # type: ignore[assignment]  # read once a pass
    into = (state.step - 1) % stage.per_epoch + 1
    if into < stage.per_epoch and state.step < stage.steps:
        return
    state.history.append({name: float(total) / into for name, total in state.sums.items()})
    state.sums = {}
    for callback in callbacks:
        callback.on_epoch_end(stage, len(state.history), state.history[-1])


def _check_finite(stage: StageSpec, state: StageState, losses: Terms, device: torch.device) -> None:
    """Raises `DivergedError`. Checks each step on the CPU, and every 20th elsewhere, because reading a number waits for the
    device."""
    step = state.step + 1
    if device.type != "cpu" and step % 20 and step != stage.steps:
        return
    if not math.isfinite(torch.stack(list(losses.values())).sum().item()):
        values = ", ".join(f"{name} {term.item():.4g}" for name, term in losses.items())
        raise DivergedError(f"the loss is not finite at step {step} of stage {stage.name!r} ({values}); lower the learning rate")


def _within_memory(stage: StageSpec, state: StageState, batch: Any, device: torch.device) -> Terms:
    """`_backward` with as large a micro-batch as memory allows: a step that took too much is repeated with half."""
    assert state.optimizer is not None
    statistics = [buffer for module in stage.trains for layer in batchnorm_layers(module) for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in statistics] if stage.over_budget is not None or device.type != "cpu" else []
    while True:
        state.optimizer.zero_grad(set_to_none=True)
        lack: Exception | None = None
        try:
            losses = _backward(stage, state, batch, device)
            if stage.over_budget is None or not stage.over_budget(state):
                return losses
        except (RuntimeError, MemoryError) as error:
            if not devices.is_out_of_memory(error):
                raise
            lack = error.with_traceback(None)  # the traceback would keep the step's tensors alive
        _restore(statistics, before)  # the repeated step must not move the running statistics twice
        micro_batch = min(state.micro_batch or len(batch), len(batch))
        if micro_batch < 4:
            raise BudgetError(
                f"stage {stage.name!r} took more memory than allowed with a micro-batch of {micro_batch} images; nothing was "
                "committed. Smaller images or a smaller backbone need less"
            ) from lack
        state.micro_batch, state.halvings = micro_batch // 2, state.halvings + 1


def _add_within_memory(stage: ClosedFormSpec, sums: Sums, part: Any) -> None:
    """A batch cannot be removed from sums again, so there is no second try with fewer images."""
    try:
        sums.add(part)
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise BudgetError(
            f"stage {stage.name!r} took more memory than allowed with a micro-batch of {len(part)} images; nothing was "
            "committed. Pass a loader with a smaller batch size"
        ) from error


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=False):
        tensor.copy_(value)


def _backward(stage: StageSpec, state: StageState, batch: Any, device: torch.device) -> Terms:
    """Gradients of a batch's loss, part by part; returns the detached terms of the whole."""
    parts = _split(batch, state.micro_batch)
    losses: Terms = {}
    precision = partial(devices.autocast, device) if stage.mixed_precision else nullcontext
    with momentum_of_parts(stage.trains, len(parts)), recomputing(stage.trains) if stage.recompute else nullcontext():
        if len(parts) > 1 and stage.before_parts is not None:
            with precision():
                stage.before_parts(parts)
        for part in parts:
            with precision():
                terms = stage.loss(part)
            share = len(part) / len(batch)
            terms = {name: share * term.float() for name, term in terms.items()}
            torch.stack(list(terms.values())).sum().backward()
            losses = {name: losses.get(name, 0) + term.detach() for name, term in terms.items()}
    return losses


def _split(batch: Any, micro_batch: int | None) -> list[Any]:
    """The batch in parts of nearly equal size, because BatchNorm learns little from a part of one image."""
    if micro_batch is None or len(batch) <= micro_batch:
        return [batch]
    count = math.ceil(len(batch) / micro_batch)
    bounds = [len(batch) * part // count for part in range(count + 1)]
    return [batch[begin:end] for begin, end in itertools.pairwise(bounds)]


def check_finite(network: nn.Module) -> None:
    """Raises `DivergedError` if a weight or a running statistic is NaN or infinite."""
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DivergedError(f"{name} is not finite after training; nothing was committed. Lower the learning rate")
