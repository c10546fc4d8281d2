"""Overwrites freed memory at the end of a long operation, and switches off core dumps on request.

Freed memory is not cleared: images and features stay readable in a process's heap until something else is written there. Large
blocks go back to the system. Of the rest, `malloc_trim` returns whole pages; what remains free in the heap is small pieces and
the ends of larger ones. These are allocated, overwritten and freed again. glibc can overwrite all memory when it is freed
(M_PERTURB), but that costs 8 to 10 % of the time of a task (digits, resnet8, both recipes, timed alternately); this takes
milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from edge_dfcil.errors import SettingError

PAGE = 4096  # bytes
CACHED = 1032  # bytes: up to this size glibc caches freed pieces per thread, by size
IN_A_ROW = 17  # neighbours: more pieces than glibc caches of a size
MOST = 2**17  # pieces: a limit in case another thread allocates in the same heap meanwhile
HEADER, MAPPED = 8, 2  # bytes before a piece, with its size; the flag in them of a piece that is a separate mapping
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4  # of prctl


@contextlib.contextmanager
def overwritten() -> Iterator[None]:
    """At its end, memory that was allocated inside and is no longer referenced is overwritten or returned to the system.

    This covers the heap of the calling thread, on Linux with glibc; elsewhere unreferenced objects are only collected. After an
    error nothing is done: its traceback still references the data.
    """
    yield
    overwrite_freed()


def overwrite_freed() -> None:
    """Overwrites free memory in the heap of the calling thread, and returns free pages of all heaps to the system.

    Long operations end with it. Call it after dropping a loader that held images in ordinary memory.
    """
    gc.collect()
    libc = _glibc()
    if libc is None:
        return
    free_buffers = _free_buffers()
    if free_buffers is not None:
        free_buffers()  # they contain packed copies of multiplied matrices
    libc.malloc_trim(0)
    held: list[int] = []
    free = int(libc.mallinfo2().fordblks)
    large = [2**power for power in range(max(free, PAGE).bit_length(), CACHED.bit_length() - 1, -1)]
    for size in [*large, *range(CACHED, HEADER, -16)]:
        _fill(libc, size, held)
    for address in held:
        libc.free(address)
    libc.malloc_trim(0)


def _fill(libc: Any, size: int, held: list[int]) -> None:
    """Allocates pieces of a size and overwrites them until no hole of the heap has room for one.

    Larger holes have been filled before, so a hole has room for one piece: neighbouring pieces come from the end of the heap,
    behind all holes. Of pieces larger than a page only the ends are overwritten: the pages between them were returned to the
    system.
    """
    step, last, in_a_row = (size + HEADER + 15) // 16 * 16, 0, 0
    while in_a_row < (IN_A_ROW if size <= CACHED else 2) and len(held) < MOST:
        address = libc.malloc(size)
        if not address:
            return
        held.append(address)
        libc.memset(address, 0, min(size, PAGE))
        if size > PAGE:
            libc.memset(address + size - PAGE, 0, PAGE)
        if ctypes.c_size_t.from_address(address - HEADER).value & MAPPED:
            return
        in_a_row, last = in_a_row + 1 if address - last == step else 0, address


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    ]


@cache
def _glibc() -> Any:
    """The C library with the signatures that are used here; None where it is not glibc 2.33 or later."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    others = ("mallctl", "tc_malloc", "mi_malloc")  # of allocators that replace glibc's
    if libc is None or not hasattr(libc, "mallinfo2") or any(hasattr(libc, name) for name in others):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.memset.restype, libc.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.malloc_trim.argtypes = [ctypes.c_size_t]
    libc.mallinfo2.restype = _MallocInfo
    libc.malloc_usable_size.restype, libc.malloc_usable_size.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    return libc if _has_headers(libc) else None


def _has_headers(libc: Any) -> bool:
    """Whether `malloc` is glibc's, on 64 bits, and not another allocator: tested by the size stored before a piece."""
    if ctypes.sizeof(ctypes.c_size_t) != HEADER:
        return False
    sizes = (24, 1000, 5000)
    pieces = [libc.malloc(size) for size in sizes]
    usable = [libc.malloc_usable_size(piece) + HEADER for piece in pieces]
    headers = [ctypes.c_size_t.from_address(piece - HEADER).value & ~7 for piece in pieces]
    for piece in pieces:
        libc.free(piece)
    return headers == usable


@cache
def _free_buffers() -> Any:
    """MKL's function that frees its buffers; None if torch uses another library."""
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers
    except (OSError, AttributeError):
        return None


@contextlib.contextmanager
def no_core_dumps() -> Iterator[None]:
    """Inside, a crash of this process leaves no core dump, which would contain training images.

    This applies to the whole process, and is restored afterwards. A debugger of the same user cannot read the process either.
    Raises `SettingError` if the system does not support it (Linux does).
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    before = -1 if prctl is None else prctl(PR_GET_DUMPABLE, 0, 0, 0, 0)
    if prctl is None or before < 0:
        raise SettingError("core dumps can be switched off on Linux only; on this system, switch them off outside the process")
    if prctl(PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise SettingError("this system does not let a process switch off its core dumps; switch them off outside the process")
    try:
        yield
    finally:
        prctl(PR_SET_DUMPABLE, before, 0, 0, 0)
