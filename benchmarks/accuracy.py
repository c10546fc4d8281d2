"""Class-incremental accuracy: a JSON file for each run, resumable at any task."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import candidates, embedding, files, machine, pretrained, yardsticks  # noqa: F401  # pretrained registers its backbones
from benchmarks.datasets import Data, Part, class_order
from edge_dfcil import Learner, devices, metrics
from edge_dfcil.errors import SettingError
from edge_dfcil.methods import Method
from edge_dfcil.recipe import Recipe, dotted, find_recipe

RESULTS = Path(__file__).parent / "results"
UPPER_BOUND = "upper_bound"


@dataclass(frozen=True)
class Protocol:
    """Which classes are learnt in which task, and by what."""

    name: str
    classes: int  # of the run's class order, from its start
    tasks: int
    backbone: str
    recipe: str
    dataset: str = "cifar100"
    image_size: int = 32
    batch_size: int = 128
    mean: tuple[float, float, float] | None = None  # None: measured on the first task
    std: tuple[float, float, float] | None = None
    changes: dict[str, Any] = field(default_factory=dict)  # of the recipe's numbers
    multiscale: bool | None = None  # as for `Learner`
    weights: str | None = None
    per_class: int | None = None  # training images of a class, drawn by the seed; None: all
    imbalance: float = 1.0  # images of the largest class over those of the smallest; those between fall geometrically
    seen_before: str = ""  # which data the backbone has been trained on


# As published (ABD, supplement; REFERENCE: 250 epochs, batch 128, CIFAR-100's own mean and deviation).
PAPER = Protocol("paper-5", 100, 5, "resnet32", "paper", mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))
# Photographs of hands, which are not in ImageNet; tiny-ImageNet's classes are among those that the backbone knows.
PRETRAINED = Protocol(
    "pretrained-signs",
    10,
    5,
    "lite:efficientnet_lite0",
    "frozen",
    dataset="sign_digits",
    image_size=96,
    batch_size=16,
    changes={"augmentation.flip": False},
    weights="imagenet",
    per_class=150,
    seen_before="ImageNet",
)
SMALL_STEPS = {"schedule.learning_rate": 0.05, "generator.batch": 32}
PRESETS = {
    p.name: p
    for p in (
        PAPER,
        replace(PAPER, name="paper-10", tasks=10),
        replace(PAPER, name="paper-20", tasks=20),
        # On a CPU a step's time is proportional to its images, so many steps of few images learn more in a minute.
        Protocol("edge-5x4", 20, 5, "resnet20", "edge", batch_size=16, changes=SMALL_STEPS),
        # About two hours on two cores: more passes, and more dreams, in batches that can hold most of the old classes.
        Protocol(
            "edge-5x20",
            100,
            5,
            "resnet32",
            "edge",
            batch_size=16,
            changes={
                "schedule.learning_rate": 0.05,
                "schedule.epochs": 14,
                "schedule.first_epochs": 18,
                "generator.steps": 400,
                "remember.pool": 10240,
            },
        ),
        PRETRAINED,
        replace(PRETRAINED, name="pretrained-signs-20", per_class=20),
        replace(PRETRAINED, name="pretrained-instant", classes=5, tasks=1, per_class=20),
        replace(PRETRAINED, name="pretrained-cifar", dataset="cifar100", classes=20, per_class=100),
        replace(PRETRAINED, name="pretrained-tiny", dataset="tiny_imagenet_50", classes=20, per_class=100),
    )
}

# ABD without one part each. The head refinement, which is ours and would make up for some of it, is off in all of them.
UNREFINED = {"refine.epochs": 0, "refine.align_head": 0.0}
ABLATIONS: dict[str, dict[str, Any]] = {
    "abd:published": UNREFINED,
    "abd:no_head_finetuning": UNREFINED | {"remember.head_finetuning": False},
    "abd:distil_real": UNREFINED | {"remember.distil_on": "real"},
    "abd:distil_synthetic": UNREFINED | {"remember.distil_on": "synthetic"},
    "abd:plain_distillation": UNREFINED | {"remember.importance": False},
    "abd:standard_cross_entropy": UNREFINED | {"remember.local_cross_entropy": False},
}


def _beyond_edge(recipe: str) -> dict[str, Any]:
    """What a recipe changes of `edge`, with whose schedules these protocols run."""
    return replace(find_recipe(recipe), preset="edge", version=find_recipe("edge").version).differences()


FROZEN, STRICT = _beyond_edge("frozen"), _beyond_edge("strict")
CLOSED_FORM: dict[str, dict[str, Any]] = {
    "abd:frozen": FROZEN,
    "abd:rotations": FROZEN | {"augmentation.rotations": True},
    "abd:rotations_mirrored": FROZEN | {"augmentation.rotations": True, "augmentation.mirrored_answers": True},
    "abd:untrained": FROZEN | {"schedule.adapt": "never"},
    "abd:strict": STRICT,
    "abd:strict_mirrored": STRICT | {"augmentation.mirrored_answers": True},
    "abd:strict_trained": {"remember.class_statistics": False},
    "abd:drift": FROZEN | {"schedule.adapt": "always", "schedule.later_learning_rate": 0.01},
}
VARIANTS = ABLATIONS | CLOSED_FORM


def expand(methods: str) -> list[str]:
    """Names with commas between; "ablations" stands for all of them."""
    return [name for given in methods.split(",") for name in (ABLATIONS if given == "ablations" else [given])]


def find_preset(name: str) -> Protocol:
    """A preset by name. Raises `SettingError` for an unknown one."""
    if name not in PRESETS:
        raise SettingError(f"no preset is called {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def changed(protocol: Protocol, other: dict[str, Any]) -> Protocol:
    """A preset with other settings, which its name then contains."""
    if not other:
        return protocol
    name = "-".join([protocol.name, *(f"{key}={value}" for key, value in other.items())])
    return replace(protocol, name=name, **other)


def tag_of(changes: dict[str, Any] | None) -> str:
    """Numbers of the recipe that are changed, in the name of a result."""
    return "".join(f"-{key}={value}" for key, value in (changes or {}).items())


def tasks_of(protocol: Protocol, data: Data, seed: int) -> list[list[int]]:
    """The classes of each task, in order."""
    order = class_order(len(data.names), seed)[: protocol.classes]
    size = protocol.classes // protocol.tasks
    return [order[begin : begin + size] for begin in range(0, protocol.classes, size)]


def learn(
    learner: Learner, protocol: Protocol, data: Data, tasks: Sequence[Sequence[int]], seed: int, *, instant: bool = True
) -> float:
    """Learns tasks; returns the seconds."""
    begin = time.perf_counter()
    for task in tasks:
        learner.learn_task(training(protocol, data, task, seed), data.names, instant=instant, progress=False)
    return time.perf_counter() - begin


class Stopped(Exception):
    """The next task would not end in time; what is done is on disk."""


def run(
    protocol: Protocol,
    method: str,
    seed: int,
    data: Data,
    out: Path,
    device: str = "auto",
    changes: dict[str, Any] | None = None,
    in_time: Callable[[float], bool] = lambda seconds: True,
) -> dict[str, Any]:
    """Runs a protocol with a method, from the first task that `out` does not hold yet, and returns the result.

    Parameters
    ----------
    method
        A method's name, a yardstick's with the size of its coreset ("bic-400"), or an ablation's.
    changes
        Numbers of the recipe to replace; they are part of the result and of its file's name.
    in_time
        Called before each task, with the seconds of the longest so far; False raises `Stopped`.
    """
    name, parts = (method.split(":")[0], VARIANTS[method]) if method in VARIANTS else (method, {})
    recipe = find_recipe(protocol.recipe).changed(dotted(protocol.changes) | parts | dotted(changes or {}))
    path = file_of(protocol, method, seed, out, changes)
    result = files.read(path)
    if result is not None and len(result["matrix"]) == protocol.tasks:
        return result
    learner, state = _learner(protocol, name, seed, recipe, device, path, resumes=result is not None)
    if result is None:
        result = begun(protocol, method, seed, recipe, learner, data)
    else:
        machine.go_on(result)
    order = class_order(len(data.names), seed)[: protocol.classes]
    size = protocol.classes // protocol.tasks
    for task in range(len(result["matrix"]), protocol.tasks):
        if not in_time(max(result["seconds"], default=0)):
            raise Stopped
        new, seen = order[task * size : (task + 1) * size], order[: (task + 1) * size]
        probe = embedding.Probe(data.part("test", seen[: task * size], 500), data.part("test", new, 500))
        test = data.part("test", seen, 500)
        pair = candidates.Candidates(test, data.names)
        machine.reset_peak(learner.device)
        begin = time.perf_counter()
        train = training(protocol, data, new, seed)
        report = learner.learn_task(train, data.names, callbacks=[probe, pair])
        seconds = time.perf_counter() - begin - probe.seconds - pair.seconds
        found = learner.evaluate(test, data.names)
        record(result, found.accuracy, found.per_task, seconds, learner, out)
        result["stages"].append([stage.to_dict() for stage in report.stages])
        result.setdefault("candidates", []).append(pair.found)
        if probe.mid:
            result["mid"].append(probe.mid)
            if task == 1:
                probe.save(out / f"{path.stem}-features.npz")
        begin = time.perf_counter()
        result["bytes_kept"] = _save(learner, state, path)
        result.setdefault("seconds_to_write", []).append(time.perf_counter() - begin)
        files.write(path, result)
    _model(path).unlink()
    _kept(path).unlink(missing_ok=True)
    return result


def file_of(protocol: Protocol, method: str, seed: int, out: Path, changes: dict[str, Any] | None = None) -> Path:
    """Where the result of a run is, or will be."""
    tag = tag_of(changes)
    return out / f"{protocol.name}-{method.replace(':', '.')}{tag}-seed{seed}.json"


def record(
    result: dict[str, Any], accuracy: float, per_task: Sequence[float | None], seconds: float, learner: Learner, out: Path
) -> None:
    """Adds a task to a result."""
    result["accuracy"].append(accuracy)
    result["matrix"].append(list(per_task))
    result["seconds"].append(seconds)
    result["peak_bytes"].append(machine.peak(learner.device))
    result["final_accuracy"] = accuracy
    result["average_incremental_accuracy"] = metrics.average_incremental_accuracy(result["accuracy"])
    result["forgetting"] = metrics.forgetting(result["matrix"])
    result["omega"] = omega(result, out)


def omega(result: dict[str, Any], out: Path) -> float | None:
    """Omega so far against the upper bound of the same protocol and seed, if `out` holds that run."""
    path = out / f"{result['protocol']['name']}-{UPPER_BOUND}-seed{result['seed']}.json"
    offline = (files.read(path) or {"accuracy": []})["accuracy"]
    done = len(result["accuracy"])
    return metrics.omega(result["accuracy"], offline[:done]) if len(offline) >= done else None


def _learner(
    protocol: Protocol, name: str, seed: int, recipe: Recipe, device: str, path: Path, resumes: bool
) -> tuple[Learner, yardsticks.Yardstick | None]:
    """A learner, new or as after the last finished task, and its method if that keeps something."""
    method = yardsticks.find(name)
    state = method if isinstance(method, yardsticks.Yardstick) else None
    if resumes:
        if state is not None and _kept(path).exists():
            state.kept = load_file(_kept(path))
        return Learner.load(_model(path), device, method=state, precision=_precision(device)), state
    return new_learner(protocol, method, seed, recipe, device), state


def new_learner(protocol: Protocol, method: str | Method, seed: int, recipe: Recipe, device: str) -> Learner:
    """A learner before its first task."""
    return Learner(
        protocol.backbone,
        image_size=protocol.image_size,
        method=method,
        recipe=recipe,
        precision=_precision(device),
        device=device,
        seed=seed,
        mean=protocol.mean,
        std=protocol.std,
        multiscale=protocol.multiscale,
        weights=protocol.weights,
    )


def _precision(device: str) -> str:
    """A CPU's figures are in float32, whatever is faster on it, so that a run can be repeated."""
    return "float32" if devices.find_device(device).type == "cpu" else "auto"


def training(protocol: Protocol, data: Data, classes: Sequence[int], seed: int) -> Part:
    """The training images of a task's classes, as many as the protocol has of each."""
    part = data.part("train", classes, protocol.batch_size)
    if protocol.imbalance == 1:
        return part if protocol.per_class is None else part.few(protocol.per_class, seed)
    order = class_order(len(data.names), seed)[: protocol.classes]
    random.Random(seed).shuffle(order)  # large and small classes in every task
    most = protocol.per_class or int(part.targets.bincount().max())
    shares = {number: protocol.imbalance ** -(place / (len(order) - 1)) for place, number in enumerate(order)}
    return part.few({number: max(1, round(most * shares[number])) for number in classes}, seed)


def _save(learner: Learner, state: yardsticks.Yardstick | None, path: Path) -> int:
    """Saves all that the next task needs beside the result; returns the bytes of it, which is what the method keeps."""
    learner.save(_model(path))
    if state is None:
        return _model(path).stat().st_size
    if state.kept:
        save_file({key: value.contiguous() for key, value in state.kept.items()}, _kept(path))
    return _model(path).stat().st_size + state.bytes_kept


def _model(path: Path) -> Path:
    return path.with_name(f".{path.stem}.safetensors")


def _kept(path: Path) -> Path:
    return path.with_name(f".{path.stem}.kept.safetensors")


def begun(protocol: Protocol, method: str, seed: int, recipe: Recipe, learner: Learner, data: Data) -> dict[str, Any]:
    """A result without a task."""
    return {
        "protocol": asdict(protocol),
        "method": method,
        "seed": seed,
        "recipe": recipe.to_dict(),
        "packed": data.packed,
        "expected_errors": candidates.ERRORS,
        **machine.provenance(torch.device(learner.device)),
        "accuracy": [],
        "matrix": [],
        "seconds": [],
        "seconds_to_write": [],
        "peak_bytes": [],
        "stages": [],
        "mid": [],
        "candidates": [],
    }
