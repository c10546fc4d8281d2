"""`edge-dfcil dream`: draws what a model remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import DEVICE, JSON, MEMORY, MODEL, MODULE, PATH, QUALITY, check_out, load_learner, recipe_options


@click.command("dream")
@MODEL
@click.argument("out", type=PATH, metavar="OUT.png")
@click.option("--per-class", default=8, show_default=True, type=click.IntRange(min=1), help="Dreams per class.")
@QUALITY
@recipe_options
@MODULE
@MEMORY
@DEVICE
@JSON
def command(
    model: Path,
    out: Path,
    per_class: int,
    quality: Literal["fast", "best"],
    recipe: str | None,
    changes: dict[str, str],
    module: str | None,
    memory_budget: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Draw what MODEL remembers: a contact sheet, one row of dreams per class."""
    from edge_dfcil.dreaming.sheet import check_drawable, contact_sheet

    check_drawable(out)
    check_out(out, model)
    learner = load_learner(model, device, module, recipe, changes, memory_budget=memory_budget)
    images = learner.dream(per_class * len(learner.classes), quality=quality)
    labels = [prediction.top[0][0] for prediction in learner.predict(images)]
    contact_sheet(images, labels, learner.classes, per_class).save(out)
    counts = {name: labels.count(name) for name in learner.classes}
    answer({"image": str(out), "dreams": counts}, as_json, [f"{out} shows {len(labels)} dreams"])
