"""Class-incremental accuracy: one JSON a run, resumable at any task."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import edge_dfcil
from benchmarks.datasets import Data, class_order
from edge_dfcil import Learner, metrics
from edge_dfcil.recipe import find_recipe

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Protocol:
    """Which classes come when, and what learns them."""

    name: str
    classes: int  # of the run's class order, from its start
    tasks: int
    backbone: str
    recipe: str
    image_size: int = 32
    batch_size: int = 128


PROTOCOLS = {p.name: p for p in (Protocol("edge-5x4", 20, 5, "resnet20", "edge"),)}


def run(
    protocol: Protocol, method: str, seed: int, data: Data, out: Path, device: str = "auto", changes: dict[str, Any] | None = None
):
    """Runs a protocol with a method, from the first task that `out` does not hold yet, and returns the result.

    `changes` replaces numbers of the recipe; they are part of the result and of its file's name.
    """
    from dataclasses import replace

    recipe = replace(find_recipe(protocol.recipe), **(changes or {}))
    tag = "".join(f"-{name}={value}" for name, value in (changes or {}).items())
    path = out / f"{protocol.name}-{method}{tag}-seed{seed}.json"
    model = out / f".{path.stem}.safetensors"
    result = json.loads(path.read_text()) if path.exists() else _begin(protocol, method, seed, recipe.to_dict())
    done = len(result["matrix"])
    if done == protocol.tasks:
        return result
    if done:
        learner = Learner.load(model, device)
    else:
        learner = Learner(
            protocol.backbone, image_size=protocol.image_size, method=method, recipe=recipe, device=device, seed=seed
        )
    order = class_order(len(data.names), seed)[: protocol.classes]
    size = protocol.classes // protocol.tasks
    for task in range(done, protocol.tasks):
        begin = time.perf_counter()
        report = learner.learn_task(data.part("train", order[task * size : (task + 1) * size], protocol.batch_size), data.names)
        seconds = time.perf_counter() - begin
        found = learner.evaluate(data.part("test", order[: (task + 1) * size], 500), data.names)
        result["accuracy"].append(found.accuracy)
        result["matrix"].append(list(found.per_task))
        result["seconds"].append(seconds)
        result["stages"].append([stage.to_dict() for stage in report.stages])
        result["final_accuracy"] = found.accuracy
        result["average_incremental_accuracy"] = metrics.average_incremental_accuracy(result["accuracy"])
        result["forgetting"] = metrics.forgetting(result["matrix"])
        learner.save(model)
        result["bytes_kept"] = model.stat().st_size
        path.write_text(json.dumps(result, indent=1) + "\n")
    model.unlink()
    return result


def _begin(protocol: Protocol, method: str, seed: int, recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        "protocol": asdict(protocol),
        "method": method,
        "seed": seed,
        "recipe": recipe,
        "versions": {
            "edge_dfcil": edge_dfcil.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": _processor(), "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()},
        "accuracy": [],
        "matrix": [],
        "seconds": [],
        "stages": [],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
