"""`edge-dfcil push`: publishes a model on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import DEVICE, JSON, MODEL, MODULE, PATH, STRICT, load_learner, loader_of


@click.command("push")
@MODEL
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Make a repository that anybody can read; private by default.")
@click.option("--onnx", type=click.Choice(["fixed", "any"]), help="Add an ONNX file; the value is as for export --input.")
@click.option("--eval", "evaluation", type=PATH, metavar="IMAGES", help="Measure on these pictures, for the model card.")
@click.option("--description", metavar="TEXT", help="Your Markdown at the top of the model card.")
@click.option("--license", metavar="NAME", help="Of the model, as the Hub names it: apache-2.0, ...")
@MODULE
@STRICT
@DEVICE
@JSON
def command(
    model: Path,
    repo: str,
    public: bool,
    onnx: Literal["fixed", "any"] | None,
    evaluation: Path | None,
    description: str | None,
    license: str | None,
    module: str | None,
    strict: bool,
    device: str,
    as_json: bool,
) -> None:
    """Publish MODEL with a model card on the Hugging Face Hub. First log in with `hf auth login`, or set HF_TOKEN."""
    learner = load_learner(model, device, module)
    pictures = loader_of(evaluation, learner, strict)
    measured = None if pictures is None else learner.evaluate(pictures)
    url = learner.push_to_hub(repo, private=not public, onnx=onnx, evaluation=measured, description=description, license=license)
    answer({"repository": repo, "url": url}, as_json, [f"{repo} contains {model}: {url}"])
