"""`edge-dfcil inspect`: what a model file knows and keeps. Only the file is read; no network is built."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import JSON, MODEL
from edge_dfcil.errors import ModelFileError

if TYPE_CHECKING:
    from edge_dfcil.privacy.account import Kept


@click.command("inspect")
@MODEL
@click.option("--tensors", "list_tensors", is_flag=True, help="List every tensor.")
@click.option("--module", hidden=True, expose_value=False, help="Not needed here; accepted as on every command.")
@JSON
def command(model: Path, list_tensors: bool, as_json: bool) -> None:
    """Show what MODEL knows and everything that it keeps."""
    from edge_dfcil.model import file
    from edge_dfcil.privacy import summary
    from edge_dfcil.privacy.account import account

    tensors, settings = file.read(model)
    kept = account(tensors, settings)
    by_kind = summary.bytes_by_kind(kept)
    size = model.stat().st_size
    try:
        lines = _lines(settings, size, by_kind)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"{model} lacks settings that every model has ({error}); edge-dfcil did not write it") from error
    if list_tensors:
        lines += [_tensor_line(one) for one in kept]
    facts = {"bytes": size, "sha256": file.digest(tensors, settings), "kept": by_kind}
    answer({**settings, **facts, "tensors": [one.to_dict() for one in kept]}, as_json, lines)


def _lines(settings: dict[str, Any], size: int, by_kind: dict[str, int]) -> list[str]:
    from edge_dfcil.privacy import summary

    name = settings["backbone"] or settings["architecture"]
    method = f", {settings['method']}" if "method" in settings else ""
    lines = [f"{name} at {settings['image_size']} px{method}, {size} bytes"]
    lines += [summary.recipe_line(settings["recipe"])] if "recipe" in settings else []
    lines += [f"task {number}: {', '.join(task)}" for number, task in enumerate(settings["tasks"], start=1)]
    lines += [summary.calibration_line(settings["calibration"])] if settings.get("calibration") else []
    lines += [f"keeps {count} bytes of {kind.replace('_', ' ')}s" for kind, count in by_kind.items()]
    return [*lines, "keeps no picture, no feature of one, no generator and no dream"]


def _tensor_line(one: Kept) -> str:
    shape = "x".join(map(str, one.shape)) or "1"
    source = "from data" if one.from_data else "not from data"
    images = f", of {' '.join(map(str, one.images))} pictures" if one.images else ""
    return f"{one.name}\t{one.kind.replace('_', ' ')}\t{shape}\t{one.bytes} bytes\t{source}{images}"
