"""Finds how a task computes fastest on this CPU: it times a few steps with each setting alternately, on temporary copies.

No rule predicts the result: on an Intel Xeon with AMX a bf16 step of resnet32 takes 0.46 of the time of a float32 one, and one of
mobilenet_v3_small three times as long; on an AMD EPYC bf16 is 15 times slower.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edge_dfcil import devices
from edge_dfcil.budget import schedule
from edge_dfcil.budget.meter import give_back
from edge_dfcil.errors import BudgetError, DivergedError
from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import Computing, MemoryPlan
from edge_dfcil.training import loop
from edge_dfcil.training.stage import StageSpec, StageState

logger = logging.getLogger("edge_dfcil")

LEAST_STEPS = 200  # of a task's training stages: with fewer, measuring takes more time than it saves
MARGIN = 0.8  # of the time: another setting must take less than this, so that the choice rarely differs between runs
TOO_SLOW = 5.0  # times a usual step: a setting whose first step takes longer is not tried again
SLOWER = 1.5  # times a usual step: a setting that takes longer after the warm-up is not repeated
REPEATS = 2  # of a step that are timed, after a warm-up step; the fastest counts
SHARE = 0.05  # of the expected time: after this much measuring no other setting is tried
MINOR = 0.1  # of the expected steps: stages with fewer are not timed
POOL = 16  # generated images of a measurement
SCHEDULED = 64  # steps of the learning-rate schedule in a measurement: more than are run


def timed(setting: Computing, step: Callable[[], object]) -> float:
    """Seconds of one step with a setting. All timing goes through here."""
    with devices.computing(setting):
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin


def is_worth_measuring(begin: Callable[[], Task], method: Method, device: torch.device) -> bool:
    """Whether measuring can pay: on a CPU, for a task that begins with a training stage and has many steps in total."""
    if device.type != "cpu":
        return False
    task = begin()
    if sum(schedule.steps_of(task, task.recipe, 1.0).values()) < LEAST_STEPS:
        return False
    trains = isinstance(next(copy.deepcopy(method).stages(task), None), StageSpec)
    del task
    give_back(device)
    return trains


def choose(
    begin: Callable[[], Task],
    method: Method,
    recipe: Recipe,
    usual: Computing,
    plan: MemoryPlan | None,
    seconds: float | None,
    check: Callable[[], object],
) -> Computing:
    """The fastest setting for a task on the CPU; the usual one unless another is faster by a clear margin.

    One setting at a time: the precision, then half the threads as long as that helps, then the memory format. Steps take as
    much memory as `plan` allows; under a plan the memory format is not tried, because that takes a second copy of the networks.

    Parameters
    ----------
    begin
        Creates a temporary task.
    recipe, usual, plan, seconds
        The recipe with the changes of the plan, the setting to compare with, the plan, and the time budget of the task.
    check
        Called between steps; it may raise.
    """
    trial = _Trial(begin, method, recipe, plan, check, float("inf") if seconds is None else SHARE * seconds)
    best, limit = usual, trial.limit
    tried = [_in_bfloat16, _with_half_the_threads, *([] if plan is not None else [_contiguous])]
    while tried:
        other = tried[0](best, trial.recipe)
        if other is None or trial.spent > limit:
            tried.pop(0)
            continue
        before, after = trial.compare(best, other)
        limit = min(limit, SHARE * before)
        if after < MARGIN * before:
            best = other
        else:
            tried.pop(0)
    return replace(best, measured={name: found for name, found in trial.found.items() if found < float("inf")})


def _in_bfloat16(setting: Computing, recipe: Recipe) -> Computing | None:
    return replace(setting, precision="bfloat16") if recipe.schedule.mixed_precision and setting.precision == "float32" else None


def _with_half_the_threads(setting: Computing, recipe: Recipe) -> Computing | None:
    """Never more threads than torch's current number: an app may need the others."""
    threads = setting.threads or torch.get_num_threads()
    return replace(setting, threads=threads // 2) if threads > 1 else None


def _contiguous(setting: Computing, recipe: Recipe) -> Computing | None:
    return replace(setting, channels_last=False) if setting.channels_last else None


class _Spent(Exception):
    """Raised when a time budget allows no more measuring."""


@dataclass
class _Trial:
    """Compares settings.

    Attributes
    ----------
    limit
        Seconds after which a comparison stops.
    found
        Expected seconds of the training stages by setting measured so far, as the setting is printed.
    spent
        Seconds spent on measuring.
    """

    begin: Callable[[], Task]
    method: Method
    recipe: Recipe
    plan: MemoryPlan | None
    check: Callable[[], object]
    limit: float
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.found: dict[str, float] = {}

    def compare(self, best: Computing, other: Computing) -> tuple[float, float]:
        """Expected seconds of the training stages with both settings, measured alternately; infinite for an `other` that fails
        or is far slower."""
        try:
            before, after = self._whole((best, other))
        except _Spent:
            before, after = self.found.get(str(best), float("inf")), float("inf")
        except (RuntimeError, BudgetError, DivergedError) as error:  # for example an operation without bf16
            logger.info("computing in %s was tried and failed: %s", other, error)
            before, after = self.found.get(str(best), float("inf")), float("inf")
        give_back(torch.device("cpu"))  # of the temporary tasks, before the next are made
        for setting, seconds in ((best, before), (other, after)):
            self.found[str(setting)] = min(seconds, self.found.get(str(setting), seconds))
        return before, after

    def _whole(self, settings: Sequence[Computing]) -> list[float]:
        tasks: dict[bool, _TrialTask] = {}  # both settings run the steps of one task, unless their memory formats differ
        for setting in settings:
            if setting.channels_last not in tasks:
                tasks[setting.channels_last] = _TrialTask(self, setting)
        totals = [0.0 for _ in settings]
        while True:
            for task in tasks.values():
                task.next_stage()
            if any(task.stage is None for task in tasks.values()):
                return totals
            task = tasks[settings[0].channels_last]
            if task.steps < MINOR * task.all_steps:  # run without timing: later stages need what it makes
                for one in tasks.values():
                    with devices.computing(one.setting):
                        one.step()
                continue
            seconds = self._in_turns(settings, tasks)
            totals = [total + task.steps * each for total, each in zip(totals, seconds, strict=True)]

    def _in_turns(self, settings: Sequence[Computing], tasks: Mapping[bool, _TrialTask]) -> list[float]:
        """Seconds of a step with each setting."""
        steps = [tasks[setting.channels_last].step for setting in settings]
        self._timed(settings[0], steps[0])
        fastest = [self._timed(settings[0], steps[0]), float("inf")]
        if self._timed(settings[1], steps[1]) > TOO_SLOW * fastest[0]:
            return fastest
        for _ in range(REPEATS):
            for n, (setting, step) in enumerate(zip(settings, steps, strict=True)):
                fastest[n] = min(fastest[n], self._timed(setting, step))
            if fastest[1] > SLOWER * fastest[0]:
                break
        return fastest

    def _timed(self, setting: Computing, step: Callable[[], object]) -> float:
        seconds = timed(setting, step)
        self.spent += seconds
        if self.spent > self.limit:
            raise _Spent
        return seconds


class _TrialTask:
    """A temporary task: some steps of each training stage, one stage after the other."""

    def __init__(self, trial: _Trial, setting: Computing) -> None:
        self._trial, self.setting = trial, setting
        with devices.computing(setting):
            self._task = trial.begin()
            self._planned = schedule.steps_of(self._task, trial.recipe, 1.0)
            self._task.make_short(trial.recipe, SCHEDULED, POOL)
        self._stages = copy.deepcopy(trial.method).stages(self._task)
        self.stage: StageSpec | None = None
        self._state = StageState()
        self.all_steps = sum(self._planned.values())

    @property
    def steps(self) -> int:
        """Steps of the stage in the whole task."""
        assert self.stage is not None
        return self._planned.get(self.stage.name, len(self._task.batches))

    def next_stage(self) -> None:
        """Moves to the next training stage; `stage` is None after the last one, and at a closed-form stage, which ends a task."""
        with devices.computing(self.setting):
            if self.stage is not None:
                self._task.micro_batches[self.stage.name] = self._state.micro_batch
            stage = next(self._stages, None)
        if not isinstance(stage, StageSpec):
            self.stage = None
            return
        stage = replace(stage, batches=_Largest(stage.batches))
        for planned in self._trial.plan.stages if self._trial.plan is not None else ():
            if planned.name == stage.name:
                stage = replace(stage, micro_batch=planned.at_once, recompute=planned.recompute)
        self.stage, self._state = stage, StageState.at_start(stage)

    def step(self) -> None:
        """One more step of the stage."""
        assert self.stage is not None
        self._state.consumed = 0  # the same batch again
        stage = replace(self.stage, steps=self._state.step + 1)
        loop.fit(stage, self._task.device, check=self._trial.check, state=self._state)


class _Largest:
    """The first batch of each pass, which is the largest in a shortened task."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._batches), 1)
