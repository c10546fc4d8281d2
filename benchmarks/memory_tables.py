"""What the memory benchmark found, as Markdown: the tables of the results, a summary, and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

from benchmarks.memory import BUDGETS, METHODS, NETWORKS, SIZES, STORED, Cell, cells
from benchmarks.tables import megabytes, percent, processor, table
from benchmarks.yardsticks.rehearsal_jpeg import QUALITY
from edge_dfcil.budget.meter import parse

Runs = dict[Cell, dict[str, Any]]


def describe(found: dict[str, Any]) -> str:
    """The findings as Markdown."""
    done = found["cells"]
    parts = [
        f"Each run is a separate process, or one process per task where stated ({processor(found['machine'])}, "
        f"torch {found['versions']['torch']}). Bytes are counted from when "
        "`learn_task` was called; peaks are the kernel's own count, the highest of both tasks and of all seeds.",
        *(part for part in (_budgets(done), _accuracy(done), _replay(done), _growth(done)) if part),
    ]
    return "\n\n".join(parts)


def summary(found: dict[str, Any]) -> str:
    """The findings in short."""
    done = found["cells"]
    return "\n\n".join(part for part in (_budgets_in_short(done), _accuracy_in_short(done), _replay_in_short(done)) if part)


def has_replay(found: dict[str, Any]) -> bool:
    """Whether there is anything to plot."""
    return bool(_of(found["cells"], "replay"))


def plot(found: dict[str, Any], figure: Any) -> None:
    """Bytes at rest, and peak bytes while learning, by image size; a line for each method."""
    sizes = {"kept between tasks, MB (model included)": _at_rest, "peak while learning, MB (no budget)": _highest}
    for axes, (title, size_of) in zip(figure.subplots(1, 2), sizes.items(), strict=True):
        for method in METHODS:
            runs = {cell.image_size: one for cell, one in _of(found["cells"], "replay", method=method).items()}
            values = [size_of(one) / 1e6 for one in runs.values()]
            axes.plot(list(runs), values, "-" if method != "deep_inversion" else "--", marker="o", markersize=3, label=method)
        axes.set(xlabel="image size, px", ylabel=title, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="x-small")


# Runs and their figures


def _of(done: dict[str, Any], kind: str, **wanted: Any) -> Runs:
    chosen = {cell: done[cell.key] for cell in cells([kind]) if cell.key in done}
    return {cell: one for cell, one in chosen.items() if all(getattr(cell, name) == value for name, value in wanted.items())}


def _by_network(done: dict[str, Any]) -> Iterator[tuple[str, dict[str | None, Runs]]]:
    """The rows of the tables of budgets: a name, and its runs by budget."""
    for kind, more in (("budget", ""), ("restarted", ", a process per task")):
        for backbone, size in NETWORKS:
            runs = {budget: _of(done, kind, backbone=backbone, image_size=size, budget=budget) for budget in BUDGETS}
            yield f"{backbone}, {size} px{more}", runs


def _learnt(runs: Runs) -> Runs:
    """Those that were neither refused nor ended early."""
    return {cell: one for cell, one in runs.items() if "kept" in one}


def _highest(one: dict[str, Any]) -> int:
    """The peak bytes of a run."""
    return int(max(task["kernel_peak"] for task in one["tasks"]))


def _at_rest(one: dict[str, Any]) -> int:
    return int(one["kept"]["model"] + one["kept"]["more"])


def _planned_and_reached(task: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a task's plan expects of its largest stage, and those that its largest stage took."""
    return task["planned_peak"] or 1, max(stage["peak_bytes"] for stage in task["stages"])


def _slower(runs: Runs, free: Runs) -> str:
    """Seconds per step of the second task's learning, over those without a budget, of the same seed and day: on another day
    the machine may have been another."""
    beside = {(cell.seed, one.get("day")): one for cell, one in free.items()}
    pairs = [(one, beside.get((cell.seed, one.get("day")))) for cell, one in runs.items()]
    ratios = [_step(one) / _step(other) for one, other in pairs if other is not None]
    return f"{mean(ratios):.2f}" if ratios else ""


def _step(one: dict[str, Any]) -> float:
    learn = next(stage for stage in one["tasks"][-1]["stages"] if stage["name"] == "learn")
    return float(learn["seconds"] / learn["steps"])


def _accuracy_of(runs: Runs) -> str:
    return percent(mean(one["tasks"][-1]["accuracy"] for one in runs.values())) if runs else ""


# In full


def _section(title: str, note: str, content: str) -> str:
    return f"### {title}\n\n{note}\n\n{content}" if content else ""


def _budgets(done: dict[str, Any]) -> str:
    head = [
        "network", "budget", "planned, MB", "reached, MB", "highest, MB", "within", "micro-batch (dream/learn/refine)",
        "step time relative to no budget", "accuracy after two tasks, %", "the same without a budget, %",
    ]  # fmt: skip
    note = (
        "Two tasks of 2 classes, 128 images each, six epochs, batches of 64. Planned is what the plan expects of the largest "
        "stage, reached what the largest stage took, both of the run in which they differ most; highest is of everything, the "
        "planning included, and must be within the budget. After so few steps accuracy shows large differences only."
    )
    rows = []
    for name, by_budget in _by_network(done):
        for budget, runs in by_budget.items():
            if runs:
                rows.append([name, budget or "none", *_budget_row(runs, by_budget[None], parse(budget))])
    return _section("Under a budget", note, table(head, rows))


def _budget_row(runs: Runs, free: Runs, budget: int | None) -> list[str]:
    failed = [one["failed"] for one in runs.values() if "failed" in one]
    if failed:
        return [f"failed while learning: {failed[0]}"]
    learnt, refused = _learnt(runs), [one["refused"] for one in runs.values() if "refused" in one]
    if not learnt:
        return [f"refused: {refused[0].split('stage ', 1)[1].split(' even', 1)[0]}"]
    tasks = [task for one in learnt.values() for task in one["tasks"]]
    pairs = [_planned_and_reached(task) for task in tasks]
    shown = [megabytes(size) for size in max(pairs, key=lambda pair: abs(pair[0] / pair[1] - 1))] if budget else ["", ""]
    peaks = [_highest(one) for one in learnt.values()]
    within = [f"{sum(peak <= budget for peak in peaks)} of {len(peaks)}"] if budget else []
    within += [f"{len(refused)} refused"] if refused else []
    at_once = "/".join(str(stage["at_once"] or "all") for stage in tasks[-1]["stages"])
    figures = [_slower(learnt, free), _accuracy_of(learnt), _accuracy_of(free)]
    return [*shown, megabytes(max(peaks)), ", ".join(within), at_once, *figures]


def _accuracy(done: dict[str, Any]) -> str:
    head = ["budget", "accuracy after two tasks, %", "each seed", "measured peak, MB", "step time relative to no budget"]
    note = "resnet32, two tasks of 10 classes of CIFAR-100, all images, batches of 64, recipe `edge` with four epochs."
    rows, free = [], _of(done, "accuracy", budget=None)
    for budget in ("128MB", None):
        if runs := _of(done, "accuracy", budget=budget):
            each = ", ".join(percent(one["tasks"][-1]["accuracy"]) for one in runs.values())
            peak = megabytes(max(map(_highest, runs.values())))
            rows.append([budget or "none", _accuracy_of(runs), each, peak, _slower(runs, free)])
    return _section("What a budget costs", note, table(head, rows))


def _replay(done: dict[str, Any]) -> str:
    head = ["images", "method", "model, MB", "kept in addition, MB", "peak while learning, MB"]
    note = (
        f"Replay keeps {STORED:,} images, as pixels or as JPEG of quality {QUALITY} (crops of scikit-learn's two photographs); "
        "a second task of 2 classes, 32 images each, no budget."
    )
    rows = []
    for cell, one in _of(done, "replay").items():
        sizes = (one["kept"]["model"], one["kept"]["more"], _highest(one))
        rows.append([f"{cell.image_size} px, {cell.backbone}", cell.method, *(f"{size / 1e6:.1f}" for size in sizes)])
    return _section("Compared with replay", note, table(head, rows))


def _growth(done: dict[str, Any]) -> str:
    lines = []
    for cell, one in _of(done, "growth").items():
        resident = [task["resident_after"] for task in one["tasks"]]
        lines.append(
            f"{cell.backbone}, {cell.tasks} tasks of {cell.classes} classes: resident after each task, MB: "
            f"{', '.join(map(megabytes, resident))}. The last over the third: {resident[-1] / resident[2]:.3f}."
        )
    return "### Task after task\n\n" + "\n".join(lines) if lines else ""


# In short


def _budgets_in_short(done: dict[str, Any]) -> str:
    """A row for each network, a column for each budget."""
    rows, kept, alone = [], [], False
    for name, by_budget in _by_network(done):
        for budget, runs in by_budget.items():
            learnt = _learnt(runs)
            kept += [_highest(one) <= (parse(budget) or 0) for one in learnt.values() if budget]
            alone |= bool(learnt) and not _slower(learnt, by_budget[None])
        row = [_in_short(runs, by_budget[None]) for runs in by_budget.values()]
        if any(row):
            rows.append([name, *row])
    if not rows:
        return ""
    head = ["peak added by learning, MB (step time relative to no budget)", *(budget or "none" for budget in BUDGETS)]
    note = (
        f"The peak of both tasks and all seeds, planning included, by the kernel's count: within the budget in {sum(kept)} "
        f"of the {len(kept)} runs that were not refused."
    )
    if alone:
        note += " Without a ratio: its run without a budget was made on another day."
    return f"{table(head, rows)}\n\n{note}"


def _in_short(runs: Runs, free: Runs) -> str:
    """The peak and how much slower a step was; or how many runs were refused or failed."""
    learnt = _learnt(runs)
    slower = f" ({ratio})" if (ratio := _slower(learnt, free)) else ""
    cell = [f"{megabytes(max(map(_highest, learnt.values())))}{slower}"] if learnt else []
    for ended in ("refused", "failed"):
        count = sum(ended in one for one in runs.values())
        cell += [ended if count == len(runs) else f"{count} of {len(runs)} {ended}"] if count else []
    return ", ".join(cell)


def _accuracy_in_short(done: dict[str, Any]) -> str:
    runs, free = (_of(done, "accuracy", budget=budget) for budget in ("128MB", None))
    if not runs or not free:
        return ""
    return (
        f"Two tasks of 10 classes of CIFAR-100, resnet32: {_accuracy_of(runs)} % under 128 MB and {_accuracy_of(free)} % without "
        f"a budget ({len(runs)} seeds), at {_slower(runs, free)} times the time per step."
    )


def _replay_in_short(done: dict[str, Any]) -> str:
    """What is kept and what learning takes, compared with replay, at the smallest and the largest size."""
    sentences = []
    for backbone, size in (SIZES[0], SIZES[-1]):
        one = {cell.method: run for cell, run in _of(done, "replay", backbone=backbone, image_size=size).items()}
        if len(one) < len(METHODS):
            return ""
        kept = {method: f"{_at_rest(run) / 1e6:.1f}" for method, run in one.items()}
        peak = {method: megabytes(_highest(run)) for method, run in one.items()}
        sentences.append(
            f"At {size} px ({backbone}) ABD keeps {kept['abd']} MB between tasks, its model alone; replay of {STORED:,} images "
            f"keeps {kept['rehearsal']} MB ({kept['rehearsal_jpeg']} as JPEG), and DGR {kept['dgr']}. While learning, without a "
            f"budget, ABD takes {peak['abd']} MB, replay {peak['rehearsal']} ({peak['rehearsal_jpeg']}), DGR {peak['dgr']}."
        )
    return " ".join(sentences)
