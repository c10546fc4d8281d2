"""`edge-dfcil predict`: names pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edge_dfcil.cli.console import answer, note
from edge_dfcil.cli.options import DEVICE, JSON, MODEL, MODULE, PATH, load_learner

AT_ONCE = 64  # pictures in memory together


@click.command("predict")
@MODEL
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=PATH)
@click.option("--top-k", default=1, show_default=True, type=click.IntRange(min=1), help="Names per picture.")
@click.option("--reject", is_flag=True, help="Answer `unknown` for pictures that belong to no known class.")
@MODULE
@DEVICE
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    model: Path,
    images: Sequence[Path],
    top_k: int,
    reject: bool,
    module: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Name the pictures IMAGE... Those that cannot be read are listed on stderr, and the exit code is then 1."""
    from edge_dfcil.model.pictures import read_each

    learner = load_learner(model, device, module)
    if reject:
        learner.model.check_rejecting()
    answers, lines, failed = [], [], []
    for batch in read_each(images, learner.image_size, AT_ONCE):
        failed += [reason for _, reason in batch.failed]
        predictions = learner.predict(batch.images, top_k, reject) if batch.paths else []
        for path, prediction in zip(batch.paths, predictions, strict=True):
            answers.append({"image": str(path), **prediction.to_dict()})
            names = [f"{name} {score:.3f}" for name, score in prediction.top]
            lines.append("\t".join([str(path), *(["unknown"] if prediction.label is None else []), *names]))
    for reason in failed:
        note(f"error: {reason}")
    if answers:
        answer(answers, as_json, lines)
    if failed:
        ctx.exit(1)
