"""Kills, damaged files, invalid input, searches of memory and load: how much of each was tried, and the results.

The checks are harnesses in `tests/`, which raise `AssertionError` when a promise is broken. Each is run in pieces, each piece
with its own seed. The result file contains the finished pieces, so that a stopped run continues from there.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import files, machine, tables
from tests import canary, damage, kills, load, rubbish

FILE = "trust.json"
UNCOUNTED = ("places", "versions", "searched")  # left out of the table


@dataclass(frozen=True)
class Check:
    """A harness, and how much of it is run.

    Attributes
    ----------
    run
        Called with a number of trials, an empty folder and a seed; returns a dataclass of counts.
    trials
        Number of trials in total.
    piece
        Number of trials with one seed.
    says
        What holds, in words.
    """

    run: Callable[[int, Path, int], Any]
    trials: int
    piece: int
    says: str


SEARCHED = ("quick", "frozen", "edge", "strict")  # recipes; "quick" is that of the tests


def _search(number: int, folder: Path, seed: int) -> Any:
    return canary.run(SEARCHED[seed % len(SEARCHED)], folder, seed=seed + 1)


CHECKS = {
    "kills": Check(
        kills.run, 1000, 50, "The model file answers as it was last committed, and no task that was reported as learnt is lost."
    ),
    "damage": Check(
        damage.run,
        10_000,
        1000,
        "Model, checkpoint, ONNX and recipe files are refused, or answer the same. Trials are of each kind.",
    ),
    "rubbish": Check(rubbish.run, 10_000, 1000, "A call succeeds, or its error explains itself and the model is unchanged."),
    "canary": Check(
        _search, len(SEARCHED), 1, f"Of images, features and the generator, {canary.CLEARED_BUT} pieces of memory at most remain."
    ),
    "load": Check(
        lambda calls, folder, seed: load.run(calls, folder), 100_000, 20_000, "Every answer is that of one committed version."
    ),
    "soak": Check(lambda tasks, folder, seed: load.soak(tasks, folder), 50, 50, "Memory grows no more than the model does."),
}


def run(names: list[str], out: Path, say: Callable[[str], None], share: float = 1.0) -> dict[str, Any]:
    """Runs the unfinished pieces of these checks, or a share of them, and returns the results of all."""
    for name in names:
        check = CHECKS[name]
        size = max(1, round(check.piece * min(1.0, share * check.trials / check.piece)))
        for seed in range(-(-round(check.trials * share) // size)):
            found = read(out)
            done = found.setdefault(name, {"pieces": {}})["pieces"]
            if str(seed) in done:
                continue
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                account = asdict(check.run(size, Path(folder), seed))
            done[str(seed)] = {
                "trials": size,
                "account": account,
                "seconds": time.perf_counter() - begin,
                **machine.provenance(torch.device("cpu")),
            }
            files.write(out / FILE, found)
            say(f"{name} {seed}: {account}")
    return read(out)


def read(out: Path) -> dict[str, Any]:
    """The results in a folder; empty where there are none."""
    return files.read(out / FILE) or {}


def describe(found: dict[str, Any]) -> str:
    """Markdown: a row for each check, with the counts of its pieces."""
    rows = []
    for name, check in CHECKS.items():
        if name in found:
            pieces = list(found[name]["pieces"].values())
            counts = ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in _sum(pieces).items())
            rows.append([name, f"{sum(piece['trials'] for piece in pieces):,}", counts, check.says])
    return tables.table(["check", "trials", "counted", "what held in all of them"], rows)


def _sum(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all pieces, summed; a mapping counts as the sum of its values. The file has each count."""
    total: dict[str, Any] = {}
    for piece in pieces:
        for name, value in piece["account"].items():
            if isinstance(value, dict):
                value = sum(value.values())
            if isinstance(value, int) and name not in UNCOUNTED:
                total[name] = total.get(name, 0) + value
    return total
