"""`edge-dfcil audit`: what a model reveals of the pictures that it learnt from."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dfcil.cli.console import answer, note
from edge_dfcil.cli.options import DEVICE, JSON, MODEL, MODULE, PATH, STRICT, check_out, load_learner, open_pictures


@click.command("audit")
@MODEL
@click.option(
    "--members", required=True, type=PATH, metavar="IMAGES", help="Pictures that MODEL learnt from, one folder per class."
)
@click.option("--non-members", "others", required=True, type=PATH, metavar="IMAGES", help="Others of the same classes.")
@click.option("--dreams", default=8, show_default=True, type=click.IntRange(min=0), help="Generated images per class; 0: none.")
@click.option("--html", type=PATH, metavar="OUT.html", help="Also write a page for those who are responsible for the data.")
@MODULE
@STRICT
@DEVICE
@JSON
def command(
    model: Path,
    members: Path,
    others: Path,
    dreams: int,
    html: Path | None,
    module: str | None,
    strict: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure what MODEL reveals of the pictures that it learnt from: what it keeps, and what attacks find."""
    from edge_dfcil.privacy.audit import audit
    from edge_dfcil.privacy.page import page
    from exporters.files import replace_file

    if html is not None:
        check_out(html, model)
    learner = load_learner(model, device, module)
    inside, outside = (open_pictures(folder, learner, strict).loader for folder in (members, others))
    generated = learner.dream(dreams * len(learner.classes)) if dreams else None
    found = audit(learner.model, inside, outside, generated=generated)
    if html is not None:
        replace_file(html, page(found, model.name).encode())
        note(f"the page is {html}")
    answer(found.to_dict(), as_json, str(found).splitlines())
