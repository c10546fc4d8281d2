"""`edge-dfcil sign`: signs a model file or an exported file."""

from __future__ import annotations

from pathlib import Path

import click

from edge_dfcil.cli.console import answer
from edge_dfcil.cli.options import JSON, PATH


@click.command("sign")
@click.argument("file", type=PATH)
@click.option("--key", required=True, type=PATH, metavar="PRIVATE.pem", help="An Ed25519 key that is not encrypted.")
@JSON
def command(file: Path, key: Path, as_json: bool) -> None:
    """Sign FILE; the signature is FILE.sig. `edge-dfcil verify --key PUBLIC.pem FILE` checks it."""
    from exporters.signatures import sign

    signature = sign(file, key)
    answer({"file": str(file), "signature": str(signature)}, as_json, [f"signed {file}: {signature}"])
