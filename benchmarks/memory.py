"""Planned, held and shown: what learning takes under a budget, and what replay takes beside it.

Every figure is of a process of its own, and of its second task; what the meter says is checked against the kernel's count.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torchvision.io import encode_jpeg

from benchmarks import datasets, machine, yardsticks
from benchmarks.yardsticks.rehearsal_jpeg import QUALITY
from edge_dfcil import RECIPES, BudgetError, Learner
from edge_dfcil.memory import give_back, held, parse

FILE = "memory.json"
BUDGETS = ("16MB", "96MB", "128MB", "192MB", "256MB", "512MB", None)
NETWORKS = (("resnet32", 32), ("mobilenet_v3_small", 64), ("mobilenet_v3_small", 96), ("resnet18", 64))
SIZES = (("resnet32", 32), *(("mobilenet_v3_small", size) for size in (64, 96, 128, 224)))
METHODS = ("abd", "deep_inversion", "dgr", "rehearsal", "rehearsal_jpeg")
STORED = 2000  # images of a replay


@dataclass(frozen=True)
class Cell:
    """One process: some tasks learnt, and what they took.

    Attributes
    ----------
    images
        Of each class; 0 takes all.
    """

    kind: str  # "budget", "accuracy", "replay" or "growth"
    backbone: str
    image_size: int
    method: str = "abd"
    budget: str | None = None
    seed: int = 0
    tasks: int = 2
    classes: int = 2
    images: int = 128
    batch_size: int = 64
    epochs: int = 6
    generator_steps: int = 30

    @property
    def key(self) -> str:
        return f"{self.kind} {self.backbone} {self.image_size} {self.method} {self.budget} {self.seed}"


def cells(kinds: list[str]) -> Iterator[Cell]:
    """All of them; those that are compared follow each other."""
    everything = [
        Cell("growth", "resnet20", 32, tasks=10, images=200, epochs=2, generator_steps=60),
        *(
            Cell("replay", backbone, size, method, images=32, epochs=2, generator_steps=3)
            for backbone, size in SIZES
            for method in METHODS
        ),
        *(Cell("budget", *network, budget=budget, seed=seed) for seed in range(3) for network in NETWORKS for budget in BUDGETS),
        *(
            Cell("accuracy", "resnet32", 32, budget=budget, seed=seed, classes=10, images=0, epochs=4, generator_steps=250)
            for seed in range(3)
            for budget in ("128MB", None)
        ),
    ]
    return (cell for cell in everything if cell.kind in kinds)


def run(chosen: list[Cell], data: Path, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every chosen cell that the result file does not hold yet, each in a new process."""
    path = out / FILE
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    for cell in chosen:
        if cell.key in found["cells"]:
            continue
        say(cell.key)
        settings = json.dumps([vars(cell), str(data)])
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory", settings], stdout=subprocess.PIPE, text=True, check=True
        )
        found |= {"versions": machine.versions(), "machine": machine.machine(torch.device("cpu"))}
        found["cells"][cell.key] = json.loads(done.stdout)
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def measure(cell: Cell, data: Path) -> dict[str, Any]:
    """One cell, in this process."""
    loaded = datasets.load(data, "cifar100" if cell.image_size == 32 else "tiny_imagenet_50")
    order = datasets.class_order(len(loaded.names), cell.seed)
    short = {"min_steps": 0, "refine_min_steps": 0, "refine_epochs": 1}
    recipe = replace(RECIPES["edge"], epochs=cell.epochs, first_epochs=cell.epochs, generator_steps=cell.generator_steps, **short)
    method = yardsticks.find(cell.method)
    learner = Learner(
        cell.backbone,
        image_size=cell.image_size,
        method=method,
        recipe=recipe,
        memory_budget=cell.budget,
        device="cpu",
        seed=cell.seed,
    )
    tasks = []
    for task in range(cell.tasks):
        new = order[task * cell.classes : (task + 1) * cell.classes]
        part = loaded.part("train", new, cell.batch_size)
        if cell.images:
            part = few(part, cell.images)
        if cell.kind == "replay" and isinstance(method, yardsticks.Yardstick) and "outputs" in method.kept:
            store(method, cell.image_size)
        give_back(learner.device)
        before = held(learner.device)
        machine.reset_peak(learner.device)
        try:
            report = learner.learn_task(part, loaded.names)
        except BudgetError as error:
            ended = "refused" if "nothing was trained" in str(error) else "failed"
            return {ended: str(error), "tasks": tasks}
        kernel = machine.peak(learner.device) - before
        give_back(learner.device)
        evaluation = learner.evaluate(loaded.part("test", order[: (task + 1) * cell.classes], 250), loaded.names)
        tasks.append({
            "kernel_peak": kernel,
            "meter_peak": report.peak_bytes,
            "planned_peak": report.plan.peak_bytes if report.plan else None,
            "plan": report.plan.to_dict() if report.plan else None,
            "stages": [stage.to_dict() for stage in report.stages],
            "seconds": report.seconds,
            "resident_after": held(learner.device),
            "accuracy": evaluation.accuracy,
        })  # fmt: skip
    return {"tasks": tasks, "kept": kept(learner, method, cell.image_size)}


def few(part: datasets.Part, images: int) -> datasets.Part:
    """The first `images` of each class."""
    index = torch.cat([torch.nonzero(part.targets == target).flatten()[:images] for target in part.targets.unique()])
    return replace(part, images=part.images[index], targets=part.targets[index])


def store(method: yardsticks.Yardstick, image_size: int) -> None:
    """Fills a coreset up to `STORED` images, so that the next task learns with as many."""
    if "images" in method.kept:
        more = -(-STORED // len(method.kept["images"]))
        method.kept = {name: torch.cat([value] * more)[:STORED] for name, value in method.kept.items()}
    else:
        files = [encode_jpeg(image, QUALITY) for image in photographs(image_size, STORED)]
        outputs = method.kept["outputs"].unique()
        method.kept = {
            "bytes": torch.cat(files),
            "sizes": torch.tensor([len(file) for file in files]),
            "outputs": outputs[torch.arange(STORED) % len(outputs)],
        }


def photographs(image_size: int, n: int) -> Iterator[torch.Tensor]:
    """Crops of scikit-learn's two photographs (3, S, S): as hard to compress as photographs are, at every size."""
    from sklearn.datasets import load_sample_images

    pictures = [torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in load_sample_images().images]
    generator = np.random.default_rng(0)
    for number in range(n):
        picture = pictures[number % len(pictures)]
        side = int(generator.integers(224, picture.shape[1]))
        top, left = (int(generator.integers(0, extent - side + 1)) for extent in picture.shape[1:])
        crop = picture[:, top : top + side, left : left + side]
        yield torch.nn.functional.interpolate(crop[None].float(), image_size, mode="bilinear", antialias=True)[0].round().byte()


def kept(learner: Learner, method: str | yardsticks.Yardstick, image_size: int) -> dict[str, int]:
    """Bytes at rest: the model's tensors and what the method keeps, a coreset with `STORED` images."""
    model = sum(tensor.nbytes for tensor in learner.network.state_dict().values())
    if not isinstance(method, yardsticks.Yardstick):
        return {"model": model, "more": 0}
    if "images" in method.kept:
        return {"model": model, "more": STORED * 3 * image_size**2}
    if "bytes" in method.kept:
        return {"model": model, "more": sum(len(encode_jpeg(image, QUALITY)) for image in photographs(image_size, STORED))}
    return {"model": model, "more": method.bytes_kept}


# Telling

Found = dict[str, dict[str, Any]]  # cells by key


def describe(found: dict[str, Any]) -> str:
    """The findings as Markdown."""
    done: Found = found["cells"]
    parts = [
        f"Each run in a process of its own ({found['machine']['processor']}, {found['machine']['threads']} threads, torch "
        f"{found['versions']['torch']}). Bytes are above what the process held when `learn_task` was called; peaks are the "
        "kernel's own count, the highest of both tasks and of all seeds.",
        *(table for table in (_budgets(done), _accuracy(done), _replay(done), _growth(done)) if table),
    ]
    return "\n\n".join(parts)


def _of(done: Found, kind: str, **wanted: Any) -> dict[Cell, dict[str, Any]]:
    chosen = {cell: done[cell.key] for cell in cells([kind]) if cell.key in done}
    return {cell: one for cell, one in chosen.items() if all(getattr(cell, name) == value for name, value in wanted.items())}


def _table(title: str, note: str, head: str, rows: list[str]) -> str:
    line = "|---" * (head.count("|") - 1) + "|"
    return "\n".join([f"### {title}", "", note, "", head, line, *rows]) if rows else ""


def _budgets(done: Found) -> str:
    rows = []
    for backbone, size in NETWORKS:
        free = _of(done, "budget", backbone=backbone, image_size=size, budget=None)
        for budget in BUDGETS:
            runs = _of(done, "budget", backbone=backbone, image_size=size, budget=budget)
            if runs:
                rows.append(f"| {backbone}, {size} px | {budget or 'none'} | {_budget_cells(runs, free, parse(budget))} |")
    head = (
        "| network | budget | planned, MB | reached, MB | highest, MB | within | images at once (dream/learn/refine) "
        "| seconds a step over none | accuracy after two tasks, % | the same without a budget, % |"
    )
    note = (
        "Two tasks of 2 classes, 128 images each, six epochs, batches of 64. Planned is what the plan expects of the largest "
        "stage, reached what the largest stage took, both of the run in which they differ most; highest is of everything, the "
        "planning included, and must be within the budget. After so few steps accuracy tells large differences only."
    )
    return _table("Under a budget", note, head, rows)


def _budget_cells(runs: dict[Cell, Any], free: dict[Cell, Any], budget: int | None) -> str:
    for one in runs.values():
        if "refused" in one:
            needs = one["refused"].split("stage ", 1)[1].split(" even", 1)[0]
            return f"refused: {needs} | | | | | | | "
        if "failed" in one:
            return f"failed while learning: {one['failed']} | | | | | | | "
    tasks = [task for one in runs.values() for task in one["tasks"]]
    last = next(iter(runs.values()))["tasks"][-1]
    planned, reached = max((_plan_and_peak(task) for task in tasks), key=lambda pair: abs(pair[0] / pair[1] - 1))
    peaks = [max(task["kernel_peak"] for task in one["tasks"]) for one in runs.values()]
    within = f"{sum(peak <= budget for peak in peaks)} of {len(peaks)}" if budget else ""
    at_once = "/".join(str(stage["at_once"] or "all") for stage in last["stages"])
    shown = f"{planned / 1e6:.0f} | {reached / 1e6:.0f}" if budget else " | "
    accuracy = " | ".join(f"{100 * _accuracy_of(ones):.1f}" if ones else "" for ones in (runs, free))
    return f"{shown} | {max(peaks) / 1e6:.0f} | {within} | {at_once} | {_slower(runs, free)} | {accuracy}"


def _plan_and_peak(task: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a task's plan expects of its largest stage, and those that its largest stage took."""
    return task["planned_peak"] or 1, max(stage["peak_bytes"] for stage in task["stages"])


def _slower(runs: dict[Cell, Any], free: dict[Cell, Any]) -> str:
    """Seconds a step of the second task's learning, over those without a budget, same seed."""
    by_seed = {cell.seed: one for cell, one in free.items()}
    ratios = [_step(one) / _step(by_seed[cell.seed]) for cell, one in runs.items() if cell.seed in by_seed]
    return f"{mean(ratios):.2f}" if ratios else ""


def _step(one: dict[str, Any]) -> float:
    learn = next(stage for stage in one["tasks"][-1]["stages"] if stage["name"] == "learn")
    return float(learn["seconds"] / learn["steps"])


def _accuracy_of(runs: dict[Cell, Any]) -> float:
    return mean(one["tasks"][-1]["accuracy"] for one in runs.values())


def _accuracy(done: Found) -> str:
    rows, free = [], _of(done, "accuracy", budget=None)
    for budget in ("128MB", None) if free else ():
        runs = _of(done, "accuracy", budget=budget)
        each = ", ".join(f"{100 * one['tasks'][-1]['accuracy']:.1f}" for one in runs.values())
        peak = max(task["kernel_peak"] for one in runs.values() for task in one["tasks"]) / 1e6
        rows.append(f"| {budget or 'none'} | {100 * _accuracy_of(runs):.1f} | {each} | {peak:.0f} | {_slower(runs, free)} |")
    head = "| budget | accuracy after two tasks, % | each seed | measured peak, MB | seconds a step over none |"
    note = "resnet32, two tasks of 10 classes of CIFAR-100, all images, batches of 64, recipe `edge` with four epochs."
    return _table("What a budget costs", note, head, rows)


def _replay(done: Found) -> str:
    rows = []
    for cell, one in _of(done, "replay").items():
        model, more, peak = one["kept"]["model"], one["kept"]["more"], one["tasks"][-1]["kernel_peak"]
        shown = " | ".join(f"{value / 1e6:.1f}" for value in (model, more, peak))
        rows.append(f"| {cell.image_size} px, {cell.backbone} | {cell.method} | {shown} |")
    head = "| images | method | model, MB | kept beside it, MB | peak while learning, MB |"
    note = (
        f"Replay keeps {STORED:,} images, as pixels or as JPEG of quality {QUALITY} (crops of scikit-learn's two photographs); "
        "a second task of 2 classes, 32 images each, no budget."
    )
    return _table("Beside replay", note, head, rows)


def _growth(done: Found) -> str:
    lines = []
    for cell, one in _of(done, "growth").items():
        resident = [task["resident_after"] / 1e6 for task in one["tasks"]]
        lines.append(
            f"{cell.backbone}, {cell.tasks} tasks of {cell.classes} classes: resident after each task, MB: "
            + ", ".join(f"{value:.0f}" for value in resident)
            + f". The last over the third: {resident[-1] / resident[2]:.3f}."
        )
    return "### Task after task\n\n" + "\n".join(lines) if lines else ""


def has_replay(found: dict[str, Any]) -> bool:
    """Whether there is anything to plot."""
    return bool(_of(found["cells"], "replay"))


def plot(found: dict[str, Any], axes: Any) -> None:
    """Bytes at rest by image size, a line a method: model and what is kept beside it."""
    for method in METHODS:
        runs = {cell.image_size: one for cell, one in _of(found["cells"], "replay", method=method).items()}
        total = [(one["kept"]["model"] + one["kept"]["more"]) / 1e6 for one in runs.values()]
        axes.plot(list(runs), total, "-" if method != "deep_inversion" else "--", marker="o", markersize=3, label=method)
    axes.set(xlabel="image size, px", ylabel="kept between tasks, MB (model included)", yscale="log")
    axes.legend(fontsize="x-small")


if __name__ == "__main__":
    settings, where = json.loads(sys.argv[1])
    print(json.dumps(measure(Cell(**settings), Path(where))))
