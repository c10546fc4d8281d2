"""Devices: which one, how it computes, and seeds that do not change the caller's random numbers."""

from __future__ import annotations

import copy
import operator
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from edge_dfcil.errors import SettingError
from edge_dfcil.results import Computing
from exporters.values import is_one_of

Net = TypeVar("Net", bound=nn.Module)


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" takes CUDA, then MPS, then the CPU. Raises `SettingError` if it cannot be used.

    An accelerator is returned with its index, "cuda:0" for "cuda": some of torch's functions require it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        found = torch.empty(1, device=device).device
        if found.type == "meta":
            raise TypeError("its tensors have no values")
        return found
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise SettingError(f"device {device!r} cannot be used here ({first_line}); use 'auto' or 'cpu'") from error


PRECISIONS = ("auto", "float32", "bfloat16")
# The first version of torch whose BatchNorm computes the backward pass of channels-last tensors correctly on MPS; None: no
# such release is known (pytorch issue 175189; the fix in pull request 188371 was untested as of torch 2.15).
MPS_CHANNELS_LAST: tuple[int, int] | None = None

_computing: ContextVar[Computing | None] = ContextVar("edge_dfcil.computing", default=None)


def check_precision(precision: Any) -> str:
    """The precision. Raises `SettingError` for anything but one of `PRECISIONS`."""
    if not is_one_of(precision, PRECISIONS):
        raise SettingError(f"precision={precision!r}; it must be one of {', '.join(map(repr, PRECISIONS))}")
    return precision


def usual(device: torch.device, precision: str = "auto") -> Computing:
    """How a device computes by default, without measurement: with "auto" in bf16 on CUDA devices that support it, else float32.

    Raises `SettingError` for a device that cannot compute in the precision.
    """
    has_bfloat16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    if precision == "bfloat16" and not has_bfloat16:
        raise SettingError(f"precision='bfloat16' cannot be used on {device}; use 'auto' or 'float32'")
    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and has_bfloat16)
    channels_last = _usual_format(device) == torch.channels_last
    return Computing("bfloat16" if half else "float32", channels_last=channels_last)


@contextmanager
def computing(how: Computing | None) -> Iterator[None]:
    """Inside, `autocast`, `memory_format` and torch's number of threads are as in `how`; None: the
    device's defaults.

    This applies to the calling thread only, except for the number of threads, which is a setting of the process. Everything is
    restored afterwards. A thread that first uses torch inside this context keeps the number of threads set there.
    """
    threads, token = torch.get_num_threads(), _computing.set(how)
    try:
        if how is not None and how.threads is not None:
            torch.set_num_threads(how.threads)
        yield
    finally:
        _computing.reset(token)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """Autocast to bf16 where it was chosen or is the default; float32 on MPS, and on a CPU that has not been measured.

    Autocast's cached weight copies are dropped at the end, also inside an autocast region of the caller, where torch would keep
    them.
    """
    how = _computing.get() or usual(device)
    if how.precision == "float32":
        yield
        return
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        torch.clear_autocast_cache()


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format of images: channels last, which is faster with most kernels, unless it was measured to be slower.

    Contiguous on MPS before `MPS_CHANNELS_LAST`: BatchNorm's backward pass of channels-last tensors is silently wrong there.
    """
    how = _computing.get()
    return torch.contiguous_format if how is not None and not how.channels_last else _usual_format(device)


def _usual_format(device: torch.device) -> torch.memory_format:
    if device.type == "mps" and (MPS_CHANNELS_LAST is None or _torch_version() < MPS_CHANNELS_LAST):
        return torch.contiguous_format
    return torch.channels_last


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def reordered(network: Net, device: torch.device) -> Net:
    """A network in the current `memory_format`: itself if that is the default format, which it already has, else a copy."""
    order = memory_format(device)
    if order == _usual_format(device):
        return network
    found: Net = copy.deepcopy(network).to(memory_format=order)
    return found


MAX_SEED = 2**53  # a task's seed is at least 1009 times this; torch takes seeds up to 2**64, and JSON keeps this one exactly


def check_seed(seed: Any) -> int:
    """The seed as an int. Raises `SettingError` for anything but a whole number from 0 to 2**53."""
    expected = f"it must be a whole number from 0 to {MAX_SEED} (2**53)"
    if isinstance(seed, bool):
        raise SettingError(f"seed={seed}; {expected}")
    try:
        number = operator.index(seed)  # int and the integers of NumPy
    except TypeError:
        raise SettingError(f"seed={seed} is a {type(seed).__name__}; {expected}") from None
    if not 0 <= number <= MAX_SEED:
        raise SettingError(f"seed={seed}; {expected}")
    return number


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds the generators of the CPU and of this device. torch.manual_seed would seed all other devices as well."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers inside follow `seed`, unless it is None; the caller's random state is restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        mps_state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not know MPS
        if seed is not None:
            seed_all(seed, device)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's global random generators: the CPU's, and the device's if it is not the CPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`. From a state of another kind of device, it sets only the generators that both have."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def own_context(device: torch.device) -> Iterator[None]:
    """Inside, torch is set as the package expects, regardless of the caller: gradients on, no inference mode, no autocast,
    float32 and the CPU by default. The caller's settings and random state are restored afterwards."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # An outer autocast region caches low-precision weights until it ends: each step would use the first step's weights.
        stack.enter_context(plain_precision(device))
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_default_dtype, dtype)
        stack.enter_context(cpu_by_default())
        stack.enter_context(seeded(None, device))
        yield


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """New tensors are made on the CPU, even if the caller used `torch.set_default_device`. Decorates functions too."""
    if torch.get_default_device().type == "cpu":
        yield  # without torch's context, which slows down every call
    else:
        with torch.device("cpu"):
            yield


@contextmanager
def plain_precision(device: torch.device) -> Iterator[None]:
    """Switches off an autocast region of the caller, so that answers do not depend on where `predict` is called."""
    with ExitStack() as stack:
        for kind in dict.fromkeys(("cpu", device.type)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory: torch has a class for it on accelerators, and only a message on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that timing is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


_guarded = False


def guard_forks() -> None:
    """After this call, child processes forked by this one compute with one thread. Call it before torch first computes.

    On Linux, torch's OpenMP threads do not survive a fork, and a child that uses more than one waits for them forever
    (pytorch issue 49555): a server that loads a model and forks its workers would hang in the first answer. With one
    thread, torch computes in the calling thread. Workers that start their own Python (`spawn`) keep all threads. Calling it
    again does nothing. CUDA cannot be used in a forked child; torch raises an error.
    """
    global _guarded
    if sys.platform.startswith("linux") and not _guarded:
        os.register_at_fork(after_in_child=_compute_with_one_thread)
        _guarded = True


def _compute_with_one_thread() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
