"""`edge-dfcil demo`: a complete run on real digits."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dfcil.cli.console import answer, note
from edge_dfcil.cli.options import DEVICE, JSON, PATH, chosen_recipe, recipe_options


@click.command("demo")
@click.option("--out", default="edge-dfcil-demo", show_default=True, type=PATH, help="Folder of the results.")
@recipe_options
@DEVICE
@JSON
def command(out: Path, recipe: str | None, changes: dict[str, str], device: str, as_json: bool) -> None:
    """Learn real handwritten digits, two classes a task, compared with fine-tuning and with training on everything."""
    from edge_dfcil.demo import RECIPE, run

    chosen = chosen_recipe(RECIPE, recipe, changes)
    figures = run(out, device=device, recipe=chosen, say=note if as_json else lambda line: answer(None, False, [line]))
    answer(figures, as_json, [])
