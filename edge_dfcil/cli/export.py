"""`edge-dfcil export`: writes a model for a runtime without torch."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import (
    DEVICE,
    EVALUATION,
    JSON,
    MEMORY,
    MODEL,
    MODULE,
    PATH,
    STRICT,
    load_learner,
    loader_of,
    recipe_options,
)


@click.command("export")
@MODEL
@click.argument("out", type=PATH, metavar="OUT.onnx")
@click.option("--format", "form", metavar="NAME", help="onnx, or another registered format; by the ending of OUT by default.")
@click.option(
    "--input",
    "accepted",
    type=click.Choice(["fixed", "any"]),
    default="fixed",
    show_default=True,
    help="fixed: squares of the network's size, which the app scales and crops; any: images of every size.",
)
@click.option("--quantize", type=click.Choice(["int8"]), help="A quarter of the size, calibrated on dreams.")
@click.option("--calibration", type=PATH, metavar="IMAGES", help="For int8: calibrate on these pictures.")
@click.option("--force", is_flag=True, help="For int8: write it even if it is not faster than floats on this machine.")
@click.option("--unchecked", is_flag=True, help="Write a file even if it cannot be checked here: Core ML outside macOS.")
@EVALUATION
@recipe_options
@MODULE
@MEMORY
@STRICT
@DEVICE
@JSON
def command(
    model: Path,
    out: Path,
    form: str | None,
    accepted: str,
    quantize: str | None,
    calibration: Path | None,
    force: bool,
    unchecked: bool,
    evaluation: Path | None,
    recipe: str | None,
    changes: dict[str, str],
    module: str | None,
    memory_budget: str | None,
    strict: bool,
    device: str,
    as_json: bool,
) -> None:
    """Write MODEL as ONNX, pixels in and probabilities out, checked against the model."""
    from exporters.registry import check_target, find_exporter

    find_exporter(out, form)
    check_target(out, model)
    learner = load_learner(model, device, module, recipe, changes, memory_budget=memory_budget)
    report = learner.export(
        out,
        quantize,
        format=form,
        input=accepted,
        source=model,
        calibration=loader_of(calibration, learner, strict),
        evaluation=loader_of(evaluation, learner, strict),
        force=force,
        unchecked=unchecked,
    )
    answer(report.to_dict(), as_json, str(report).splitlines())
