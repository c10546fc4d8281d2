"""Result files: JSON, written as a whole or not at all, so that a run that is stopped at any time can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporters.files import replace_file


def read(path: Path) -> dict[str, Any] | None:
    """A result; None if there is none yet."""
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def read_all(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    """The results in a folder whose file names match, by name without ending, in their order."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(pattern))}


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(result, indent=1) + "\n").encode())
