"""`edge-dfcil evaluate`: measures accuracy."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import DEVICE, JSON, MODEL, MODULE, PATH, STRICT, load_learner, open_pictures


@click.command("evaluate")
@MODEL
@click.argument("images", type=PATH)
@MODULE
@STRICT
@DEVICE
@JSON
def command(model: Path, images: Path, module: str | None, strict: bool, device: str, as_json: bool) -> None:
    """Measure accuracy on IMAGES, which has one folder of pictures per class."""
    learner = load_learner(model, device, module)
    folder = open_pictures(images, learner, strict)
    evaluation = learner.evaluate(folder.loader)
    lines = [f"accuracy {evaluation.accuracy:.1%} on {evaluation.n} pictures"]
    lines += [f"expected calibration error {evaluation.calibration_error:.1%}"]
    lines += [f"  {name}\t{accuracy:.1%}" for name, accuracy in evaluation.per_class.items()]
    answer({**evaluation.to_dict(), "skipped": list(folder.skipped)}, as_json, lines)
