"""The software and the machine of a run, and its peak memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

import edge_dfcil
from benchmarks import files

ROOT = Path(__file__).resolve().parent.parent
CODE = ("edge_dfcil", "exporters", "benchmarks", "demos", "pyproject.toml", ":(exclude)benchmarks/results")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def provenance(device: torch.device) -> dict[str, Any]:
    """What every result file says of how it was made: "commit", "versions" and "machine"."""
    return {"commit": commit(), "versions": versions(), "machine": machine(device)}


def go_on(result: dict[str, Any]) -> None:
    """Adds this commit to a result that is continued, if an earlier one began it."""
    if (now := commit()) != (begun := result.get("commit")) and not str(begun).endswith(f", then {now}"):
        result["commit"] = f"{begun}, then {now}"


def continued(path: Path, key: str, names: Sequence[str], **about: Any) -> tuple[dict[str, Any], list[str]]:
    """A result whose parts are under `key`, from a file or new, with all that `about` says of it; and which parts are missing."""
    result = files.read(path) or {**about, **provenance(torch.device("cpu")), key: {}}
    missing = [name for name in names if name not in result[key]]
    if missing:
        go_on(result)
    return result, missing


def commit(root: Path = ROOT) -> str | None:
    """The git commit of the code as 40 hex digits, with "-dirty" where code or settings differ from it.

    Outside a git checkout: the value of the environment variable GIT_COMMIT, for a copy of the files without git; None if it
    is not set. Result files are not code: writing one does not make the commit dirty.
    """
    if _git(root, "rev-parse", "--show-toplevel") != str(root.resolve()):  # not in git, or inside another repository
        return os.environ.get("GIT_COMMIT")
    found = _git(root, "rev-parse", "HEAD")
    return f"{found}-dirty" if found and _git(root, "status", "--porcelain", "--", *CODE) else found


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None if git is not installed or fails."""
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    return {
        "edge_dfcil": edge_dfcil.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        # glibc's allocator returns freed memory and takes it again at every step, unless these variables say otherwise. On a
        # CPU that takes time.
        "allocator": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def reset_peak(device: torch.device) -> None:
    """Resets the peak, where the system can (Linux, CUDA); elsewhere the peak is that since the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")


def peak(device: torch.device) -> int:
    """Peak bytes since `reset_peak`: resident in the process, or reserved on the CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if CLEAR.exists():
        lines = STATUS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
