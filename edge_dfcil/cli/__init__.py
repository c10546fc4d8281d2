"""The command line: one file per command, a thin layer over the public API. Answers on stdout, progress and errors on stderr.

Exit 0: done. 1: an error was reported, and the model is as it was. 2: wrong usage.
"""

from __future__ import annotations

import click

from edge_dfcil._version import __version__
from edge_dfcil.cli import (
    audit,
    demo,
    distill,
    dream,
    evaluate,
    export,
    forget,
    inspect,
    learn,
    predict,
    prune,
    push,
    rename,
    sign,
    verify,
)
from edge_dfcil.cli.console import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-dfcil")
def main() -> None:
    """Teach an image classifier new classes without keeping a sample, and ship it."""


for _file in (learn, predict, evaluate, inspect, dream, forget, rename, distill, prune, export, push, audit, verify, sign, demo):
    main.add_command(_file.command)
