"""`edge-dfcil prune`: removes channels of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    STRICT,
    load_learner,
    loader_of,
    recipe_options,
    smaller_model,
)


@click.command("prune")
@MODEL
@click.option("--ratio", type=float, help="Share of filters to remove, for example 0.2.")
@click.option("--target-flops", "flops", type=float, help="Share of floating-point operations to keep.")
@click.option("--target-latency", "latency", type=float, help="Share of the latency to keep, by a table measured here.")
@click.option("--group", type=click.IntRange(min=1), default=8, show_default=True, help="Channels that are removed at a time.")
@click.option("--no-repair", is_flag=True, help="Do not repair by distillation afterwards.")
@click.option("--out", type=PATH, help="The pruned model's file; MODEL-pruned by default.")
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
    no_repair: bool,
    out: Path | None,
    evaluation: Path | None,
    recipe: str | None,
    changes: dict[str, str],
    module: str | None,
    memory_budget: str | None,
    precision: str,
    strict: bool,
    device: str,
    as_json: bool,
    **target: Any,
) -> None:
    """Remove channels of MODEL that matter little, and repair the rest, without data. Give one target."""
    from dataclasses import replace

    from edge_dfcil.compression import Pruning, prune

    out = smaller_model(model, "pruned", out)
    settings = Pruning(**target)
    settings = replace(settings, repair=None) if no_repair else settings
    learner = load_learner(model, device, module, recipe, changes, memory_budget=memory_budget, precision=precision)
    smaller, report = prune(learner, settings, evaluation=loader_of(evaluation, learner, strict))
    smaller.save(out)
    lines = [
        f"{out}: {report.filters[1]} of {report.filters[0]} filters, {report.parameters[1]} of {report.parameters[0]} parameters"
    ]
    if report.milliseconds is not None:
        lines.append("{:.2f} ms an image before, {:.2f} ms after (ONNX Runtime, one thread)".format(*report.milliseconds))
    if report.accuracy is not None:
        lines.append("accuracy {:.1%} before, {:.1%} pruned, {:.1%} repaired".format(*report.accuracy))
    answer({**report.to_dict(), "model": str(out)}, as_json, lines)
