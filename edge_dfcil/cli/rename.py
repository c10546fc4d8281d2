"""`edge-dfcil rename`: renames classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import JSON, MODEL, MODULE, load_learner


@click.command("rename")
@MODEL
@click.argument("names", nargs=-1, required=True, metavar="OLD NEW...")
@MODULE
@JSON
def command(model: Path, names: Sequence[str], module: str | None, as_json: bool) -> None:
    """Rename classes of MODEL: OLD NEW, and again for further classes."""
    from edge_dfcil.model.file import claim

    if len(names) % 2:
        raise click.UsageError("names come in pairs: OLD NEW")
    renamed = dict(zip(names[::2], names[1::2], strict=True))
    with claim(model):
        learner = load_learner(model, "cpu", module)
        learner.rename(renamed)
        learner.save(model)
    lines = [f"{old} is {new} now" for old, new in renamed.items()]
    answer({"model": str(model), "renamed": renamed, "classes": list(learner.classes)}, as_json, lines)
