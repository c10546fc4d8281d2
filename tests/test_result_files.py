"""Result files of the benchmarks are whole at any time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import files, machine


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speed-0.json"
    assert files.read(path) is None
    files.write(path, {"seconds": [1.5], "name": "é"})
    files.write(path.with_name("speed-1.json"), {"seconds": []})
    assert files.read(path) == {"seconds": [1.5], "name": "é"}
    assert list(files.read_all(path.parent, "speed-*.json")) == ["speed-0", "speed-1"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "speed.json"
    files.write(path, {"seconds": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(path, {"seconds": 2})
    assert json.loads(path.read_text()) == {"seconds": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["speed.json"]


def test_a_result_names_the_commits_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"commit": "a"}
    for now in "aabb":
        monkeypatch.setattr(machine, "commit", lambda now=now: now)
        machine.go_on(result)
    assert result == {"commit": "a, then b"}
