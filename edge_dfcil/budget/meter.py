"""The memory budget: its definition, and a meter that measures it.

`memory_budget` limits what `learn_task` adds to the memory in use when it is called. On the CPU that is the process's
resident set, with all that torch and its libraries allocate; on CUDA and MPS it is what torch's allocator reserves on
the device. Memory of the loader itself is not counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import sys
import threading
from functools import cache

import psutil
import torch

from edge_dfcil.errors import SettingError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse(budget: int | str | None) -> int | None:
    """A budget in bytes, from a number of bytes or a string such as "512MB" or "0.5 GiB". Raises `SettingError` for others."""
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(budget).strip()) if not isinstance(budget, bool) else None
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise SettingError(f"memory_budget={budget!r} is not a size; pass bytes, a string such as '512MB', or None for no budget")
    size = float(found[1]) * UNITS[found[2].upper()]
    if size > 2**60:
        raise SettingError(f"memory_budget={str(budget)[:40]} is more than any machine has; pass None for no budget")
    return int(size)


def show(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / 1e6:.1f} MB" if size < 100e6 else f"{size / 1e6:.0f} MB"


# Measuring

SAMPLING = 0.005  # seconds between two samples


class Meter:
    """Memory above the level at which the meter was first entered: the peak since the last `reset`, and the peak overall.

    On CPU and MPS a thread samples it; CUDA's allocator records its own peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.level = self._peak = self._highest = 0
        self._entered, self._stop = False, threading.Event()
        self._lock = threading.Lock()  # the sampling thread and `reset` both write the peak
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        """Starts to measure. When the meter is entered again, it keeps the first level."""
        give_back(self._device)
        self._froze = not gc.get_freeze_count()
        if self._froze:
            gc.freeze()  # existing objects are not scanned again at every `reset`: torch's alone take half a second
        if not self._entered:
            self.level, self._entered = held(self._device), True
        self._stop.clear()
        if self._device.type != "cuda":
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._froze:
            gc.unfreeze()
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def peak(self) -> int:
        """Peak bytes above the level since `reset`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device) - self.level
        return self._measure()

    @property
    def highest(self) -> int:
        """Peak bytes above the level since the meter was first entered."""
        return max(self._highest, self.peak)

    @property
    def now(self) -> int:
        """Bytes above the level after free memory has been returned to the system."""
        give_back(self._device)
        return held(self._device) - self.level

    def reset(self) -> None:
        """Clears the peak, and returns free memory to the system, so that the next peak does not include it."""
        give_back(self._device)
        with self._lock:
            self._highest = max(self._highest, self._peak)
            self._peak = held(self._device) - self.level
        if self._device.type == "cuda":
            self._highest = max(self._highest, torch.cuda.max_memory_reserved(self._device) - self.level)
            torch.cuda.reset_peak_memory_stats(self._device)

    def exclude(self) -> None:
        """Excludes what is held now from the count."""
        give_back(self._device)
        with self._lock:
            self.level = max(self.level, held(self._device))
            self._peak = self._highest = 0

    def _measure(self) -> int:
        with self._lock:
            self._peak = max(self._peak, held(self._device) - self.level)
            return self._peak

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING):
            self._measure()


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
    """Returns free memory to the system: otherwise glibc and torch's allocators keep it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
