"""Tables and plots from result files, never by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def read(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Finished results by protocol and method."""
    found = defaultdict(list)
    for path in sorted(folder.glob("*-seed*.json")):
        result = json.loads(path.read_text())
        if len(result["matrix"]) == result["protocol"]["tasks"]:
            found[
                result["protocol"]["name"], path.stem.rsplit("-seed", 1)[0].removeprefix(result["protocol"]["name"] + "-")
            ].append(result)
    return dict(found)


def table(folder: Path) -> str:
    """Markdown: a row a method, best last accuracy first, with its seeds."""
    lines = [
        "| protocol | method | seeds | after each task, % | final, % | average, % | forgetting, % | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = sorted(read(folder).items(), key=lambda item: (item[0][0], -mean(r["final_accuracy"] for r in item[1])))
    for (protocol, method), results in rows:
        tasks = zip(*(r["accuracy"] for r in results), strict=True)
        each = " / ".join(f"{100 * mean(accuracies):.1f}" for accuracies in tasks)
        finals = [100 * r["final_accuracy"] for r in results]
        spread = f" ± {stdev(finals):.1f}" if len(finals) > 1 else ""
        average = 100 * mean(r["average_incremental_accuracy"] for r in results)
        forgotten = 100 * mean(r["forgetting"] for r in results)
        minutes = mean(sum(r["seconds"]) for r in results) / 60
        seeds = ", ".join(str(r["seed"]) for r in results)
        lines.append(
            f"| {protocol} | {method} | {seeds} | {each} | {mean(finals):.1f}{spread} "
            f"| {average:.1f} | {forgotten:.1f} | {minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(folder: Path, protocol: str, path: Path) -> None:
    """Accuracy by classes seen, a line a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for (name, method), results in read(folder).items():
        if name != protocol:
            continue
        accuracy = [100 * mean(column) for column in zip(*(r["accuracy"] for r in results), strict=True)]
        size = results[0]["protocol"]["classes"] // len(accuracy)
        axes.plot([size * (task + 1) for task in range(len(accuracy))], accuracy, marker="o", label=method)
    axes.set(xlabel="classes learnt", ylabel="accuracy on all of them, %", ylim=(0, 100), title=protocol)
    axes.legend()
    figure.savefig(path, dpi=150)
