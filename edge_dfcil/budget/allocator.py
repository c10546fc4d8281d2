"""Settings of torch's and the system's allocators while a budget holds; they are reset afterwards."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edge_dfcil.budget.meter import Meter

M_MMAP_THRESHOLD = -3  # of mallopt
LARGE = 1 / 64  # of a budget: a tensor that takes so much is returned to the system when it is freed
USUAL = 32 * 2**20  # the most that glibc raises its own threshold to, as tensors are allocated and freed


@contextmanager
def returned_at_once(budget: int | None) -> Iterator[None]:
    """Under a budget glibc returns large tensors to the system as soon as they are freed.

    Otherwise its threshold for that grows with what is freed, and its heap keeps holes: a fifth more memory for the same steps,
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


@contextmanager
def bounded(meter: Meter, device: torch.device, budget: int | None) -> Iterator[None]:
    """Watches memory, and makes the allocators keep to the budget if there is one."""
    with returned_at_once(budget), meter, capped(meter, device, budget):
        yield
