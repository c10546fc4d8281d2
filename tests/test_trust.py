"""The command that runs the trials: it continues where it was stopped, and sums the counts of its pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import trust
from benchmarks.__main__ import main


@dataclass
class Account:
    tried: int
    by_kind: dict[str, int] = field(default_factory=dict)
    same: bool = True


def test_it_continues_with_the_piece_that_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def harness(trials: int, folder: Path, seed: int) -> Account:
        assert folder.is_dir() and not [*folder.iterdir()]
        seeds.append(seed)
        if seeds == [0, 1]:
            raise AssertionError("lost")
        return Account(trials, {"cut": seed})

    monkeypatch.setattr(trust, "CHECKS", {"mine": trust.Check(harness, 10, 4, "It holds.")})
    with pytest.raises(AssertionError, match="lost"):
        trust.run(["mine"], tmp_path, lambda line: None)
    assert list(json.loads((tmp_path / trust.FILE).read_text())["mine"]["pieces"]) == ["0"]
    found = trust.run(["mine"], tmp_path, lambda line: None)
    assert seeds == [0, 1, 1, 2]
    assert trust.describe(found).splitlines()[-1] == "| mine | 12 | tried 12, by kind 3, same 3 | It holds. |"
    assert trust.run(["mine"], tmp_path, lambda line: None) == found and len(seeds) == 4


def test_a_check_that_is_not_there(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["trust", "--checks", "kills,luck", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "unknown checks: luck" in done.output
