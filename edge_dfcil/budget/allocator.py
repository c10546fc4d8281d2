"""Settings of torch's and the system's allocators while a memory budget applies; they are reset afterwards."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edge_dfcil.budget.meter import Meter

M_MMAP_THRESHOLD = -3  # of mallopt
LARGE = 1 / 64  # of a budget: a tensor of this size or more is returned to the system when it is freed
USUAL = 32 * 2**20  # the largest value to which glibc raises its own threshold, as tensors are allocated and freed


@contextmanager
def returned_at_once(budget: int | None) -> Iterator[None]:
    """Under a budget glibc returns large tensors to the system as soon as they are freed.

    Otherwise glibc's threshold grows with the sizes that are freed, and its heap keeps holes: a fifth more memory for the same
    steps, by an amount that is not known in advance. For small tensors this would save little, and a mapping for each costs
    time.
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
    """CUDA's allocator refuses allocations above the budget with an out-of-memory error."""
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
    """Measures memory, and makes the allocators keep to the budget, unless it is None."""
    with returned_at_once(budget), meter, capped(meter, device, budget):
        yield
