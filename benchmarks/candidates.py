"""Whether the adapted model of a task is better than its instant one, and whether the choice between them is right."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from dataclasses import replace
from statistics import mean
from typing import Any

from benchmarks import tables
from benchmarks.datasets import Part
from edge_dfcil import Callback, Learner
from edge_dfcil.learning import WORSE, Learning, is_worse
from edge_dfcil.results import Commit, StageReport
from edge_dfcil.training.stage import Stage

Results = list[dict[str, Any]]

ERRORS = 2  # the kind of expected errors: in kind 1 one drift map, from all images, made the head and tested it


class Candidates(Callback):
    """Test accuracy of a task's instant model, and of its adapted one even where that is dropped.

    Attributes
    ----------
    found
        "instant" and "adapted", each with "accuracy" and "expected_error"; empty for a task without an instant model.
    seconds
        What testing took.
    """

    def __init__(self, test: Part, names: list[str]) -> None:
        self._test, self._names = test, names
        self._learner: Learner | None = None
        self.found: dict[str, dict[str, float | None]] = {}
        self.seconds = 0.0

    def on_task_begin(self, learner: Learner) -> None:
        self._learner = learner

    def on_commit(self, commit: Commit) -> None:
        work, learner = self._work()
        if commit.kind == "instant" and work.task is None and work.first is not None:  # else it is the only one
            self._put("instant", learner.model, work.first.expected_error)

    def on_stage_end(self, stage: Stage, report: StageReport) -> None:
        work, learner = self._work()
        if stage.name == "lda" and "instant" in self.found and work.task is not None:
            network: Any = copy.deepcopy(work.task.student).eval()
            self._put("adapted", replace(learner.model, network=network).calibrated(None), work.task.expected_error)

    def _work(self) -> tuple[Learning, Learner]:
        assert self._learner is not None and self._learner.running is not None
        work = self._learner.running.work
        assert isinstance(work, Learning)
        return work, self._learner

    def _put(self, kind: str, model: Any, expected: float | None) -> None:
        begin = time.perf_counter()
        self.found[kind] = {"accuracy": model.evaluate(self._test, self._names).accuracy, "expected_error": expected}
        self.seconds += time.perf_counter() - begin


def describe(runs: dict[str, dict[str, Results]]) -> str:
    """Markdown, a row a protocol and method of those that had both models; empty where none had."""
    rows = []
    for protocol, methods in runs.items():
        for method, every in methods.items():
            for kind in (1, ERRORS):
                results = [result for result in every if result.get("expected_errors", 1) == kind]
                pairs = [pair for result in results for pair in result.get("candidates", []) if "adapted" in pair]
                if pairs:
                    rows.append([protocol, method, ", ".join(str(r["seed"]) for r in results), str(kind), *_row(pairs)])
    head = ["protocol", "method", "seeds", "kind", "tasks", "instant, %", "adapted, %", "adapted worse", "by over a point"]
    head += ["worst, points", "dropped", "rule right", "served, %"]
    note = (
        "A task of a method that trains at every task has two models: rows from class statistics at the start, and the adapted "
        f"one. The rule drops an adapted model whose expected error is more than {WORSE} times that of the instant one. It is "
        "right where it serves the model that is better on test images, or one within a point of it. Expected errors of kind 1, "
        "of earlier runs, tested a head with the drift map that had made it, so the map's errors did not show."
        f"{_of_default(runs)}"
    )
    return f"{tables.table(head, rows)}\n\n{note}" if rows else ""


def _of_default(runs: dict[str, dict[str, Results]]) -> str:
    """A sentence on the runs that train no network after the first task."""
    every = [result for methods in runs.values() for results in methods.values() for result in results]
    fixed = [one for one in every if one.get("candidates") and one["recipe"]["schedule"]["adapt"] != "always"]
    later = sum(len(one["candidates"]) - 1 for one in fixed)
    return f" Methods that do not, the default among them, serve the instant model: {later} later tasks, runs: {len(fixed)}."


def _row(pairs: list[dict[str, Any]]) -> list[str]:
    gains = [100 * (pair["adapted"]["accuracy"] - pair["instant"]["accuracy"]) for pair in pairs]
    dropped = [_dropped(pair) for pair in pairs]
    lost = [max(gain, 0) if drops else max(-gain, 0) for gain, drops in zip(gains, dropped, strict=True)]
    served = [pair["instant" if drops else "adapted"]["accuracy"] for pair, drops in zip(pairs, dropped, strict=True)]
    accuracy: defaultdict[str, list[float]] = defaultdict(list)
    for pair in pairs:
        for kind in ("instant", "adapted"):
            accuracy[kind].append(pair[kind]["accuracy"])
    return [
        str(len(pairs)),
        *(tables.percent(mean(accuracy[kind])) for kind in ("instant", "adapted")),
        str(sum(gain < 0 for gain in gains)),
        str(sum(gain < -1 for gain in gains)),
        f"{min(0.0, *gains):.1f}",
        str(sum(dropped)),
        f"{sum(one <= 1 for one in lost)} of {len(lost)}",
        tables.percent(mean(served)),
    ]


def _dropped(pair: dict[str, Any]) -> bool:
    return is_worse(pair["instant"]["expected_error"], pair["adapted"]["expected_error"])
