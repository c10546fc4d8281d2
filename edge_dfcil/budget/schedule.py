"""The time budget: a schedule that ends in time, fitted to the speed of a step on this device."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from edge_dfcil import devices
from edge_dfcil.errors import SettingError
from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.recipe import Recipe
from edge_dfcil.training import loop
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.stage import Stage, StageSpec

STEPS = 4  # of each stage that are timed, after a warm-up step
POOL = 64  # generated images that are timed
MARGIN = 0.1  # of the time, left free: a device slows down as it heats up
LEAST = 1e-4  # smallest share of the schedule
UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def parse(budget: float | str | None) -> float | None:
    """A time budget in seconds, from a number or a string such as "90s", "10min" or "2h". Raises `SettingError` for others."""
    if budget is None:
        return None
    text = "" if isinstance(budget, bool) else str(budget).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip()
    try:
        seconds = float(number) * UNITS[unit]
    except (KeyError, ValueError):
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise SettingError(f"time_budget={budget!r} is not a time; pass seconds, or a string such as '90s', '10min' or '2h'")
    return seconds


class _Clock(Callback):
    """Seconds of each step of a stage, except the first."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.seconds = device, list[float]()

    def on_stage_begin(self, stage: Stage) -> None:
        self._last = 0.0

    def on_step_end(self, stage: Stage, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        devices.synchronize(self._device)
        now = time.perf_counter()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


def fit(
    begin: Callable[[], Task], method: Method, seconds: float, changes: Mapping[str, Any], check: Callable[[], object]
) -> dict[str, Any]:
    """How to shorten a task to end within `seconds`: the `share` of the steps of its stages, and `changes` to its recipe.

    The result also contains the measurements: the seconds of a step of each stage (`step_seconds`), of one generated image,
    and of the whole recipe. Nothing is changed when the whole recipe fits.
    """
    task = begin()
    recipe = task.recipe.changed(changes)
    speeds, image_seconds = _speeds(begin(), copy.deepcopy(method), recipe, check)

    generates = task.remembers or "dream" in speeds  # a first task may generate images, too

    def expected(share: float) -> float:
        steps = {"dream": _dream_steps(recipe, share), **steps_of(task, recipe, share)}
        pool = _shortened(recipe, share)["remember.pool"] if generates else 0
        return sum(speed * steps.get(name, len(task.batches)) for name, speed in speeds.items()) + image_seconds * pool

    whole, allowed = expected(1.0), max(0.0, seconds) * (1 - MARGIN)
    low, high = LEAST, 1.0
    if whole <= allowed:
        low = 1.0
    else:
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if expected(middle) <= allowed else (low, middle)
    return {
        "share": low,
        "changes": _shortened(recipe, low) if low < 1.0 and generates else {},
        "seconds": seconds,
        "whole_recipe_seconds": whole,
        "expected_seconds": expected(low),
        "step_seconds": speeds,
        "generated_image_seconds": image_seconds,
    }


def _shortened(recipe: Recipe, share: float) -> dict[str, int]:
    """Recipe settings to reduce, besides the steps that train the student."""
    pool = recipe.remember.pool
    return {
        "generator.steps": max(1, round(share * recipe.generator.steps)),
        "pixels.steps": max(1, round(share * recipe.pixels.steps)),
        "remember.pool": max(min(pool, 64), round(share * pool)),
    }


def steps_of(task: Task, recipe: Recipe, share: float) -> dict[str, int]:
    """Steps of each kind of stage under a share of the schedule."""
    schedule, refine, per_epoch = recipe.schedule, recipe.refine, len(task.batches)
    epochs = schedule.epochs if task.teacher is not None else schedule.first_epochs or schedule.epochs
    steps = {"learn": max(epochs * per_epoch, schedule.min_steps)}
    if task.remembers and refine.epochs:
        steps["refine"] = max(refine.epochs * per_epoch, refine.min_steps)
    found = {name: max(1, round(share * count)) for name, count in steps.items()}
    if task.remembers:
        found["dream"] = _dream_steps(recipe, share)
    return found


def _dream_steps(recipe: Recipe, share: float) -> int:
    batches = -(-recipe.remember.pool // recipe.pixels.batch) if recipe.remember.dreams == "pixels" else 1
    key = "pixels.steps" if recipe.remember.dreams == "pixels" else "generator.steps"
    return batches * _shortened(recipe, share)[key]


def _speeds(task: Task, method: Method, recipe: Recipe, check: Callable[[], object]) -> tuple[dict[str, float], float]:
    """Seconds of a step of each stage, and of one generated image, measured on a temporary task."""
    task.make_short(recipe, STEPS + 1, POOL)
    speeds: dict[str, float] = {}
    image_seconds, ended = 0.0, 0.0
    for stage in method.stages(task):
        devices.synchronize(task.device)
        if ended and stage.name == "learn" and task.dreams is not None and task.recipe.remember.pool:
            image_seconds = (time.perf_counter() - ended) / task.recipe.remember.pool
        clock = _Clock(task.device)
        short = loop.run(_short(stage), task.device, [clock], check)
        seconds = median(clock.seconds) if clock.seconds else short.seconds
        speeds[stage.name] = max(speeds.get(stage.name, 0.0), seconds)
        ended = time.perf_counter()
    return speeds, image_seconds


def _short(stage: Stage) -> Stage:
    return replace(stage, steps=min(stage.steps, STEPS + 1)) if isinstance(stage, StageSpec) else stage
