"""`edge-dfcil export`: writes a model for a runtime without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from exporters import ExportReport


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
    answer(report.to_dict(), as_json, _lines(report, out))


def _lines(report: ExportReport, out: Path) -> list[str]:
    difference = report.max_difference
    compared = "not compared with the model" if difference is None else f"probabilities within {difference:.1g} of the model's"
    lines = [f"{out}: {report.classes} classes, {report.bytes} bytes, {compared}"]
    if report.input == "any":
        lines.append(f"takes images of every size, and scales and crops them to {report.image_size} x {report.image_size} pixels")
    if report.speedup is not None:
        size = f"{report.bytes / report.float_bytes:.0%} of the float file's size"
        lines.append(f"{size}, {report.speedup:.1f} times as fast; {report.quantization}")
        lines += [f"answers as the model does for {share:.1%} of the {name}" for name, share in report.agreement.items()]
        lines += [f"accuracy on the {n}: {before:.1%} as float, {after:.1%}" for n, (before, after) in report.accuracy.items()]
    return lines
