"""Rejection of classes that were never learnt, and calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import accuracy, files, machine, tables
from benchmarks.datasets import Data
from edge_dfcil import Model
from edge_dfcil.recipe import dotted, find_recipe
from exporters.rejection import margins, scores

PRESETS = "pretrained-signs,pretrained-cifar,edge-5x4"
RECIPE = "frozen"  # the recipe that calibrates, whatever the preset's own
UNSEEN = 2  # tasks that are not learnt
AT_ONCE = 250  # test images per batch

Scores = dict[str, npt.NDArray[np.float64]]
# The scores by which images are rejected, with their names in tables.
KINDS = {"margin": "score less threshold", "score": "centred logit", "logit": "max-logit", "softmax": "max-softmax"}


def run(
    protocol: accuracy.Protocol, seed: int, data: Data, out: Path, device: str = "auto", changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Learns all tasks but the last two with the recipe `frozen`, and returns the figures on test images of known and of unseen
    classes. A result that is already in `out` is returned unchanged."""
    path = out / f"rejection-{protocol.name}-{seed}.json"
    if (found := files.read(path)) is not None:
        return found
    recipe = find_recipe(RECIPE).changed(dotted(protocol.changes) | dotted(changes or {}))
    learner = accuracy.new_learner(protocol, "abd", seed, recipe, device)
    tasks, size = accuracy.tasks_of(protocol, data, seed), protocol.classes // protocol.tasks
    seconds = accuracy.learn(learner, protocol, data, tasks[:-UNSEEN], seed)
    model = learner.model
    model.check_rejecting()
    known = [_scores(model, data, task) for task in tasks[:-UNSEEN]]
    result = {
        "protocol": asdict(protocol),
        "seed": seed,
        "recipe": recipe.to_dict(),
        "packed": data.packed,
        **machine.provenance(model.device),
        "classes": {"known": size * (protocol.tasks - UNSEEN), "unseen": size * UNSEEN},
        "seconds": seconds,
        "calibration": model.calibration.to_dict() if model.calibration is not None else None,
        **_calibration_errors(model, data, [c for task in tasks[:-UNSEEN] for c in task]),
        **_figures(known, _scores(model, data, [c for task in tasks[-UNSEEN:] for c in task])),
    }
    files.write(path, result)
    return result


@torch.inference_mode()
def _scores(model: Model, data: Data, classes: list[int]) -> Scores:
    """The scores of the test images of some classes, by kind."""
    found: defaultdict[str, list[Any]] = defaultdict(list)
    for images, _ in data.part("test", classes, AT_ONCE):
        logits = model.network(images.to(model.device)).float()
        probabilities = (logits / model.temperature).softmax(1).cpu().numpy()
        found["margin"].append(margins(probabilities, model.thresholds))
        found["score"].append(scores(probabilities))
        found["logit"].append(logits.max(1).values.cpu().numpy())
        found["softmax"].append(probabilities.max(1))
    return {kind: np.concatenate(parts) for kind, parts in found.items()}


def _figures(known: list[Scores], unseen: Scores) -> dict[str, Any]:
    from sklearn.metrics import roc_auc_score

    auroc = {}
    for kind in KINDS:
        inside = np.concatenate([task[kind] for task in known])
        truth = np.repeat([1, 0], [len(inside), len(unseen[kind])])
        auroc[kind] = float(roc_auc_score(truth, np.concatenate([inside, unseen[kind]])))
    rejected = [float((task["margin"] < 0).mean()) for task in known]
    return {
        "auroc": auroc,
        "false_rejections": float((np.concatenate([task["margin"] for task in known]) < 0).mean()),
        "false_rejections_by_task": rejected,
        "unseen_rejected": float((unseen["margin"] < 0).mean()),
    }


def _calibration_errors(model: Model, data: Data, classes: list[int]) -> dict[str, Any]:
    """Expected calibration error on the known classes at a temperature of 1 and at the model's."""
    part = data.part("test", classes, AT_ONCE)
    before, after = (one.evaluate(part, data.names) for one in (model.calibrated(None), model))
    return {"accuracy": after.accuracy, "ece_before": before.calibration_error, "ece_after": after.calibration_error}


def read(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The results of a folder by protocol, one for each seed."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in files.read_all(folder, "rejection-*.json").values():
        found[result["protocol"]["name"]].append(result)
    yield from found.items()


def describe(folder: Path) -> str:
    """Markdown, a row for each protocol; empty if there is no result."""
    head = ["protocol", "seeds", "classes, unseen", *(f"AUROC, {name}" for name in KINDS.values())]
    head += ["rejected, %", "by task, %", "unseen rejected, %", "temperature", "ECE before, %", "ECE after, %", "accuracy, %"]
    rows = []
    for name, results in read(folder):

        def percent(key: str, results: list[dict[str, Any]] = results) -> str:
            return tables.over_seeds([result[key] for result in results], times=100)

        by_task = zip(*(result["false_rejections_by_task"] for result in results), strict=True)
        rows.append([
            name,
            ", ".join(str(result["seed"]) for result in results),
            "{known}, {unseen}".format(**results[0]["classes"]),
            *(f"{mean(result['auroc'][kind] for result in results):.3f}" for kind in KINDS),
            percent("false_rejections"),
            " / ".join(tables.percent(mean(task)) for task in by_task),
            percent("unseen_rejected"),
            f"{mean(result['calibration']['temperature'] for result in results):.2f}",
            *map(percent, ("ece_before", "ece_after", "accuracy")),
        ])  # fmt: skip
    note = (
        "Recipe `frozen`; the classes of the last two tasks are not learnt. AUROC: images of known classes against those. "
        "Rejected: of the test images of known classes, where the thresholds aim at 5 %. ECE: expected calibration error over 15 "
        "bins, at a temperature of 1 and at the model's."
    )
    return f"{note}\n\n{tables.table(head, rows)}" if rows else ""


def run_all(
    protocols: list[accuracy.Protocol],
    seeds: list[int],
    load: Callable[[accuracy.Protocol], Data],
    out: Path,
    device: str,
    say: Callable[[str], None],
) -> None:
    """Runs every protocol with every seed; says one line for each."""
    for protocol in protocols:
        data = load(protocol)
        for seed in seeds:
            found = run(protocol, seed, data, out, device)
            auroc = ", ".join(f"{name} {found['auroc'][kind]:.3f}" for kind, name in KINDS.items())
            say(
                f"{protocol.name} seed {seed}: AUROC {auroc}; rejected {found['false_rejections']:.1%}, "
                f"unseen {found['unseen_rejected']:.1%}; ECE {found['ece_before']:.1%} to {found['ece_after']:.1%}"
            )
