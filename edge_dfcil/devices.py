"""Devices: which one, how it computes, and seeds that leave the caller's random numbers alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from edge_dfcil.errors import SettingError


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" takes CUDA, then MPS, then the CPU. Raises `SettingError` if it is not there.

    An accelerator comes with its number, "cuda:0" for "cuda": some of torch's calls take no other.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        first_line = str(error).splitlines()[0]
        raise SettingError(f"device {device!r} cannot be used here ({first_line}); use 'auto' or 'cpu'") from error


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 where it helps (CUDA cards that have it); full precision on MPS and CPU, where it costs time or accuracy."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Every draw inside follows `seed`; the caller's random state is as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        mps_state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not know MPS
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out: torch has a class for it on accelerators, and a message on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read afterwards is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
