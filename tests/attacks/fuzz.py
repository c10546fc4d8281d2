"""Fuzzes what reads files, guided by coverage: `python -m tests.attacks.fuzz -max_total_time=300 -max_len=4096`.

It needs atheris. The first byte chooses: the rest is a recipe, a model file, or settings that are written into
a model file with a right digest.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["edge_dfcil.recipe", "edge_dfcil.model", "exporters"]):
        damage: Any = importlib.import_module("tests.damage")
    from edge_dfcil import EdgeDfcilError, Learner
    from edge_dfcil.model import file

    folder = Path(tempfile.mkdtemp(dir=damage.memory_folder()))
    checks = damage.Checks(folder)
    warnings.simplefilter("ignore")

    def one(content: bytes) -> None:
        if not content:
            return
        kind, rest = content[0] % 4, content[1:]
        if kind < 2:
            getattr(checks, ("recipe", "model")[kind])(rest)
            return
        try:
            values = json.loads(rest)
        except (ValueError, RecursionError):
            return
        if not isinstance(values, dict):
            return
        try:
            file.write(folder / "l", checks.tensors, {**checks.settings, **values})
            found = Learner.load(folder / "l", "cpu")
        except EdgeDfcilError:
            return
        damage.check_valid(found)

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
