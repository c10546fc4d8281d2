"""`edge-dfcil forget`: removes classes from a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import JSON, MODEL, MODULE, load_learner


@click.command("forget")
@MODEL
@click.argument("names", nargs=-1, required=True, metavar="CLASS...")
@MODULE
@JSON
def command(model: Path, names: Sequence[str], module: str | None, as_json: bool) -> None:
    """Remove classes from MODEL: their outputs and statistics. The shared weights still carry traces of them."""
    from edge_dfcil.model.file import claim

    with claim(model):
        learner = load_learner(model, "cpu", module)
        learner.forget(names)
        learner.save(model)
    lines = [f"forgot {', '.join(names)}; {model} knows {len(learner.classes)} classes"]
    answer({"model": str(model), "forgotten": list(names), "classes": list(learner.classes)}, as_json, lines)
