"""What a model reveals about its training images: the audit after all tasks of a preset, with and without class statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import accuracy, files, machine, tables
from benchmarks.datasets import Data
from edge_dfcil.privacy.audit import audit
from edge_dfcil.recipe import dotted, find_recipe

RECIPES = "frozen,strict"
DREAMS = 20  # per class


def run(
    protocol: accuracy.Protocol,
    recipe: str,
    seed: int,
    data: Data,
    out: Path,
    device: str = "auto",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Learns all tasks, and returns what the audit finds with all training images and all test images of the classes. A result
    that is already in `out` is returned unchanged."""
    settings = find_recipe(recipe).changed(dotted(protocol.changes) | dotted(changes or {}))
    changed = accuracy.tag_of(changes)
    path = out / f"audit-{protocol.name}-{recipe}.{settings.version}{changed}-{seed}.json"
    if (found := files.read(path)) is not None:
        return found
    learner = accuracy.new_learner(protocol, "abd", seed, settings, device)
    tasks = accuracy.tasks_of(protocol, data, seed)
    seconds = accuracy.learn(learner, protocol, data, tasks, seed)
    order = [number for task in tasks for number in task]
    generated = learner.dream(DREAMS * protocol.classes, progress=False)
    members = accuracy.training(protocol, data, order, seed)
    others = data.part("test", order, protocol.batch_size)
    made = audit(learner.model, members, others, data.names, generated=generated).to_dict()
    result = {
        "protocol": asdict(protocol),
        "seed": seed,
        "name": recipe + changed,
        "recipe": settings.to_dict(),
        "packed": data.packed,
        **machine.provenance(learner.model.device),
        "seconds": seconds,
        "audit": {name: value for name, value in made.items() if name not in ("kept", "classes")},
    }
    files.write(path, result)
    return run(protocol, recipe, seed, data, out, changes=changes)  # as it is read from the file


def run_all(
    protocols: list[accuracy.Protocol],
    recipes: list[str],
    seeds: list[int],
    load: Callable[[accuracy.Protocol], Data],
    out: Path,
    device: str,
    say: Callable[[str], None],
    changes: dict[str, Any] | None = None,
) -> None:
    """Runs every protocol with every recipe and seed; says one line for each."""
    for protocol in protocols:
        data = load(protocol)
        for recipe in recipes:
            for seed in seeds:
                found = run(protocol, recipe, seed, data, out, device, changes)["audit"]
                attacks = ", ".join(f"{one['name']} {one['auc']:.3f}" for one in found["attacks"])
                say(f"{protocol.name} {recipe} {changes or {}} seed {seed}: {attacks}")


def describe(folder: Path) -> str:
    """Markdown, a row for each attack; empty if there is no result."""
    grouped: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in files.read_all(folder, "audit-*.json").values():
        recipe = f"{result['name']}, version {result['recipe']['version']}"
        grouped[result["protocol"]["name"], recipe].append(result)
    rows, nearest = [], []
    for (name, recipe), results in grouped.items():
        seeds = ", ".join(str(result["seed"]) for result in results)
        for number, one in enumerate(results[0]["audit"]["attacks"]):
            all_seeds = [result["audit"]["attacks"][number] for result in results]
            found = ([attack["found"][share] for attack in all_seeds] for share in one["found"])
            shares = ("" if None in values else tables.percent(mean(values)) for values in found)
            by_task = zip(*(attack["by_task"] for attack in all_seeds), strict=True)
            each = " / ".join("" if None in values else f"{mean(values):.3f}" for values in by_task)
            rows.append([name, recipe, seeds, one["name"], f"{mean(attack['auc'] for attack in all_seeds):.3f}", each, *shares])
        for number, one in enumerate(results[0]["audit"]["nearest"]):
            all_near = [result["audit"]["nearest"][number] for result in results]
            share = tables.percent(mean(near["nearer"] for near in all_near))
            nearest.append([name, recipe, seeds, one["space"], str(sum(near["generated"] for near in all_near)), share])
    if not rows:
        return ""
    head = ["protocol", "recipe", "seeds", "attack", "AUC", "by task", "true positives at 1 % false positives, %", "at 0.1 %, %"]
    near = ["protocol", "recipe", "seeds", "compared by", "generated images", "nearest to a training image, %"]
    note = (
        "All training images of all tasks against all test images of the same classes, after the last task. AUC: how often the "
        "attack tells the training image of a pair from the test image; 0.5 is chance. `strict` keeps no class statistics."
    )
    return f"{note}\n\n{tables.table(head, rows)}\n\n{tables.table(near, nearest)}"
