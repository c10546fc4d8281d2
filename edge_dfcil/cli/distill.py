"""`edge-dfcil distill`: teaches another backbone what a model knows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

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
    PRECISION,
    QUALITY,
    STRICT,
    load_learner,
    loader_of,
    recipe_options,
    smaller_model,
)


@click.command("distill")
@MODEL
@click.option("--to", required=True, metavar="BACKBONE", help="The student's: resnet20, mobilenet_v3_small, ...")
@click.option("--out", type=PATH, help="The student's file; MODEL with the backbone's name by default.")
@click.option("--rounds", type=click.IntRange(min=1), help="Of generating images and learning; more are slower and better.")
@QUALITY
@EVALUATION
@recipe_options
@MODULE
@MEMORY
@PRECISION
@STRICT
@DEVICE
@JSON
def command(
    model: Path,
    to: str,
    out: Path | None,
    rounds: int | None,
    quality: Literal["fast", "best"],
    evaluation: Path | None,
    recipe: str | None,
    changes: dict[str, str],
    module: str | None,
    memory_budget: str | None,
    precision: str,
    strict: bool,
    device: str,
    as_json: bool,
) -> None:
    """Teach another BACKBONE what MODEL knows, with dreams only."""
    from edge_dfcil.compression import Distillation, distill

    out = smaller_model(model, to.replace(":", "-").replace("/", "-"), out)
    learner = load_learner(model, device, module, recipe, changes, memory_budget=memory_budget, precision=precision)
    settings = Distillation(quality=quality, rounds=Distillation.rounds if rounds is None else rounds)
    student, report = distill(learner, to, settings=settings, evaluation=loader_of(evaluation, learner, strict))
    student.save(out)
    before, after = report.parameters
    lines = [f"{out}: {report.student}, {after} parameters instead of {report.teacher}'s {before}"]
    lines.append(f"answers as its teacher for {report.agreement:.1%} of fresh dreams; {report.seconds:.0f} s")
    if report.accuracy is not None:
        lines.append("accuracy {:.1%} as teacher, {:.1%} as student".format(*report.accuracy))
    answer({**report.to_dict(), "model": str(out)}, as_json, lines)
