"""The memory budget: what it means, a meter that watches it, and how a task is run within it.

`memory_budget` bounds what `learn_task` adds to the memory that is held when it is called. On the CPU that is the
process's resident set, with all that torch and its libraries allocate; on CUDA and MPS what torch's allocator reserves
on the device. What the loader itself holds is not counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import psutil
import torch

from edge_dfcil.errors import SettingError
from edge_dfcil.methods import Method
from edge_dfcil.methods.base import stages
from edge_dfcil.methods.task import Task
from edge_dfcil.results import MemoryPlan, StageReport
from edge_dfcil.training import loop as training
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.stage import Stage

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse(budget: int | str | None) -> int | None:
    """A budget in bytes: a number of them, or text such as "512MB" or "0.5 GiB". Raises `SettingError` for anything else."""
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(budget).strip()) if not isinstance(budget, bool) else None
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise SettingError(f"memory_budget={budget!r} is no size; pass bytes, or text such as '512MB', or None for no budget")
    return int(float(found[1]) * UNITS[found[2].upper()])


def show(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size < 100e6 else f"{size / 1e6:.0f} MB"


# Measuring

SAMPLING = 0.005  # seconds between two looks at the process


class Meter:
    """The memory held above the level at which it was entered: the most since the last `reset`, and the most ever.

    On CPU and MPS a thread samples it; CUDA's allocator keeps its own peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.level = self._peak = self._highest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Meter:
        give_back(self._device)
        self._froze = not gc.get_freeze_count()
        if self._froze:
            gc.freeze()  # what is there now is not searched again at every `reset`: torch alone is half a second's worth
        self.level = held(self._device)
        if self._device.type != "cuda":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._froze:
            gc.unfreeze()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def peak(self) -> int:
        """Most bytes above the level since `reset`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) - self.level
        self._peak = max(self._peak, held(self._device) - self.level)
        return self._peak

    @property
    def highest(self) -> int:
        """Most bytes above the level ever."""
        return max(self._highest, self.peak)

    @property
    def now(self) -> int:
        """Bytes above the level that remain when all that is free has been given back."""
        give_back(self._device)
        return held(self._device) - self.level

    def reset(self) -> None:
        """Forgets the peak, and gives back to the system what is free, so that the next one is its own."""
        self._highest = self.highest
        give_back(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._peak = held(self._device) - self.level

    def exclude(self) -> None:
        """Counts what is held now as not ours."""
        give_back(self._device)
        self.level = max(self.level, held(self._device))
        self._peak = self._highest = 0

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING):
            self._peak = max(self._peak, held(self._device) - self.level)


def held(device: torch.device) -> int:
    """Bytes held now: the process's resident set, or what torch reserves on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(_process(os.getpid()).memory_info().rss)


@cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)


def give_back(device: torch.device) -> None:
    """Returns what is free to the system: glibc keeps it otherwise, and torch's allocators do."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


# Holding

M_MMAP_THRESHOLD = -3  # of mallopt
LARGE = 1 / 64  # of a budget: a tensor that takes so much is returned to the system when it is freed
USUAL = 32 * 2**20  # what glibc lets its own threshold grow to, as tensors come and go


@contextmanager
def returned_at_once(budget: int | None) -> Iterator[None]:
    """Under a budget glibc returns large tensors to the system as soon as they are freed.

    Else its threshold for that grows with what is freed, and its heap keeps holes: a fifth more memory for the same steps,
    and how much is not known beforehand. For small tensors that would save little, and a new mapping for each costs time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or budget is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, int(LARGE * budget))
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, int(os.environ.get("MALLOC_MMAP_THRESHOLD_", USUAL)))


NEAR = 0.97  # of the budget: from here on fewer images go through at once, before it is too late


def run(
    task: Task,
    method: Method,
    callbacks: Sequence[Callback],
    cancelled: Callable[[], bool],
    meter: Meter,
    plan: MemoryPlan | None,
) -> list[StageReport]:
    """Runs a task's stages under a plan and measures them. A step that takes more than the budget is made again with half
    as many images at once, before the optimiser takes it."""
    planned = {stage.name: stage for stage in plan.stages} if plan is not None else {}
    if plan is not None:
        task.recipe = task.recipe.changed(plan.changes)
    budget = plan.budget if plan is not None else None

    def too_much(stage: Stage) -> bool:
        """Whether the step must be made again. One that came near goes through, and those after it take half the images."""
        if budget is None or meter.peak <= NEAR * budget:
            return False
        over = meter.peak > budget
        meter.reset()
        if not over and stage.at_once is not None:
            stage.at_once = max(2, stage.at_once // 2)
        return over

    reports = []
    with capped(meter, task.device, budget):
        for stage in measured(stages(task, method), meter):
            if stage.name in planned:
                stage.at_once, stage.recompute = planned[stage.name].at_once, planned[stage.name].recompute
            report = training.fit(stage, task.device, callbacks, cancelled, too_much)
            reports.append(replace(report, peak_bytes=meter.peak))
    return reports


def measured(stages: Iterator[Stage], meter: Meter) -> Iterator[Stage]:
    """Each stage with a peak of its own, what it is made from included: a pool of dreams is made before the learning."""
    while True:
        meter.reset()
        stage = next(stages, None)
        if stage is None:
            return
        yield stage


@contextmanager
def capped(meter: Meter, device: torch.device, budget: int | None) -> Iterator[None]:
    """CUDA's allocator refuses what is above the budget, which then counts as out of memory."""
    if budget is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (meter.level + budget) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
