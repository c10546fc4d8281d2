"""Memory: what learning takes under a budget, compared with its plan and with replay.

Every run is a separate process, or one process per task; the meter's count is checked against the kernel's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torchvision.io import encode_jpeg

from benchmarks import datasets, files, machine, yardsticks
from benchmarks.yardsticks.rehearsal_jpeg import QUALITY
from edge_dfcil import BudgetError, Learner
from edge_dfcil.budget.meter import give_back, held
from edge_dfcil.recipe import RECIPES

FILE = "memory.json"
KINDS = ("growth", "replay", "budget", "restarted", "accuracy")
BUDGETS = ("16MB", "96MB", "128MB", "192MB", "256MB", "512MB", None)
NETWORKS = (("resnet32", 32), ("mobilenet_v3_small", 64), ("mobilenet_v3_small", 96), ("resnet18", 64))
RESTARTED = NETWORKS[:2], ("96MB", "128MB", "192MB", None)
SIZES = (("resnet32", 32), *(("mobilenet_v3_small", size) for size in (64, 96, 128, 224)))
METHODS = ("abd", "deep_inversion", "dgr", "rehearsal", "rehearsal_jpeg")
STORED = 2000  # images of a replay


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark: some tasks, and how they are learnt.

    Attributes
    ----------
    kind
        "budget", "accuracy", "replay" or "growth", all in one process; or "restarted": one process per task, as on the command
        line, where libraries allocate their memory again.
    images
        Training images of each class; 0 takes all.
    """

    kind: str
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
    """All cells of these kinds; those that are compared follow each other."""
    everything = [
        Cell("growth", "resnet20", 32, tasks=10, images=200, epochs=2, generator_steps=60),
        *(
            Cell("replay", backbone, size, method, images=32, epochs=2, generator_steps=3)
            for backbone, size in SIZES
            for method in METHODS
        ),
        *(
            Cell(kind, *network, budget=budget, seed=seed)
            for kind, networks, budgets in (("budget", NETWORKS, BUDGETS), ("restarted", *RESTARTED))
            for seed in range(3)
            for network in networks
            for budget in budgets
        ),
        *(
            Cell("accuracy", "resnet32", 32, budget=budget, seed=seed, classes=10, images=0, epochs=4, generator_steps=250)
            for seed in range(3)
            for budget in ("128MB", None)
        ),
    ]
    return (cell for cell in everything if cell.kind in kinds)


def run(chosen: list[Cell], data: Path, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every chosen cell that is not yet in the result file, each in a new process."""
    path = out / FILE
    found = files.read(path) or {"cells": {}}
    for cell in chosen:
        if cell.key in found["cells"]:
            continue
        say(cell.key)
        made = machine.provenance(torch.device("cpu"))
        found["cells"][cell.key] = in_processes(cell, data) | {"day": date.today().isoformat(), "commit": made["commit"]}
        found |= made
        files.write(path, found)
    return found


def in_processes(cell: Cell, data: Path) -> dict[str, Any]:
    """Runs one cell in a child process, or in one per task, which pass the model on in a file."""
    tasks = range(cell.tasks)
    parts = [range(task, task + 1) for task in tasks] if cell.kind == "restarted" else [tasks]
    learnt: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for part in parts:
            settings = json.dumps([vars(cell), str(data), list(part), f"{folder}/model.safetensors"])
            command = [sys.executable, "-m", "benchmarks.memory", settings]
            more = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            learnt += more.pop("tasks")
            if "kept" not in more:  # refused or failed
                break
    return {"tasks": learnt, **more}


def measure(cell: Cell, data: Path, numbers: list[int], model: Path) -> dict[str, Any]:
    """Learns some tasks of a cell in this process. Starts from the model file if it exists; writes it if more tasks follow."""
    loaded = datasets.load(data, "cifar100" if cell.image_size == 32 else "tiny_imagenet_50")
    order = datasets.class_order(len(loaded.names), cell.seed)
    short = {"schedule.min_steps": 0, "refine.min_steps": 0, "refine.epochs": 1}
    recipe = RECIPES["edge"].changed(
        {"schedule.epochs": cell.epochs, "schedule.first_epochs": cell.epochs, "generator.steps": cell.generator_steps, **short}
    )
    method = yardsticks.find(cell.method)
    if model.exists():
        learner = Learner.load(model, "cpu", method=method, memory_budget=cell.budget)
    else:
        learner = Learner(
            cell.backbone,
            image_size=cell.image_size,
            method=method,
            recipe=recipe,
            memory_budget=cell.budget,
            device="cpu",
            seed=cell.seed,
        )
    tasks: list[dict[str, Any]] = []
    for task in numbers:
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
    if numbers[-1] + 1 < cell.tasks:
        learner.save(model)
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


if __name__ == "__main__":
    settings, where, numbers, model = json.loads(sys.argv[1])
    print(json.dumps(measure(Cell(**settings), Path(where), numbers, Path(model))))
