"""Fuzzes the file readers, guided by coverage: `python -m tests.attacks.fuzz -max_total_time=300 -max_len=4096`.

It needs atheris. The first byte selects what the rest is: a recipe, a model file, settings that are written into a model file
with a correct digest, or the random draws that falsify a model file under a correct digest.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any


class Fuzzed(random.Random):
    """Draws from given bytes, so that a fuzzer that changes the bytes changes the draws; zeros after their end."""

    def __init__(self, content: bytes) -> None:
        super().__init__(0)
        self._content, self._at = content, 0

    def getrandbits(self, k: int, /) -> int:
        size = -(-k // 8)
        taken = self._content[self._at : self._at + size].ljust(size, b"\0")
        self._at += size
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(16) / 2**16


def main() -> None:
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["edge_dfcil.recipe", "edge_dfcil.settings", "edge_dfcil.model", "exporters"]):
        damage: Any = importlib.import_module("tests.damage")
    from edge_dfcil import EdgeDfcilError, Learner
    from edge_dfcil.model import file

    folder = Path(tempfile.mkdtemp(dir=damage.memory_folder()))
    checks = damage.Checks(folder)
    warnings.simplefilter("ignore")

    def settings(content: bytes) -> None:
        try:
            values = json.loads(content)
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

    kinds = (checks.recipe, checks.model, settings, lambda content: checks.lying(Fuzzed(content)))

    def one(content: bytes) -> None:
        if content:
            kinds[content[0] % len(kinds)](content[1:])

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
