"""`edge-dfcil verify`: whether model files and exported files are as they were written, and who signed them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import JSON, PATH


@click.command("verify")
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...")
@click.option("--key", type=PATH, metavar="PUBLIC.pem", help="Also check the signature FILE.sig with this Ed25519 key.")
@JSON
def command(files: Sequence[Path], key: Path | None, as_json: bool) -> None:
    """Check that model files and exported ONNX files are as they were written."""
    found = [{"file": str(path), "kind": _verify(path, key), "signed": key is not None} for path in files]
    by = f", signed by the owner of {key}" if key is not None else ""
    answer(found, as_json, [f"{one['file']} is an intact {one['kind']}{by}" for one in found])


def _verify(path: Path, key: Path | None) -> str:
    """What kind of file it is. Raises an error that says what is wrong with it."""
    if key is not None:
        from exporters.signatures import check_signature

        check_signature(path, key)
    if path.suffix.lower() == ".onnx":
        from exporters import OnnxClassifier

        return "ONNX file" if OnnxClassifier(path).sealed else "ONNX file of an earlier version, which has no SHA-256"
    from edge_dfcil.model import file

    file.read(path)
    return "model file"
