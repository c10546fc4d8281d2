"""The baselines on a frozen backbone: each learns separable classes task by task, and runs in a protocol."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, runners
from benchmarks.runners import frozen
from edge_dfcil import SettingError
from tests.conftest import slow_but
from tests.test_benchmarks import QUICK, TINY, data  # noqa: F401  # a fixture


def classes(task: int, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the two classes of a task, non-negative as after a ReLU."""
    draw = torch.Generator().manual_seed(task)
    targets = torch.arange(2 * task, 2 * task + 2).repeat(n // 2)
    centres = 4 + 3 * torch.eye(12, dtype=torch.float64)[targets]
    noise = torch.randn(n, 12, generator=draw, dtype=torch.float64)
    noise[:, -1] += 3 * noise[:, 0]  # correlated noise: the classes do not follow the axes
    return (centres + noise).clamp_min(0), targets


@pytest.mark.parametrize("name", slow_but({"frozen_lda", "fecam"}, frozen.HEADS))
def test_a_head_tells_classes_of_all_tasks_apart(name: str) -> None:
    head = frozen.HEADS[name](0)
    for task in range(3):
        head.learn(*classes(task))
    for task in range(3):
        features, targets = classes(task, 400)
        assert (head.scores(features).argmax(1) == targets).double().mean() > 0.85
    assert head.nbytes > 0


def test_learning_lda_task_by_task_gives_what_learning_at_once_gives() -> None:
    by_task, at_once = frozen.LDA(0), frozen.LDA(0)
    for task in range(3):
        by_task.learn(*classes(task))
    at_once.learn(*(torch.cat(parts) for parts in zip(*map(classes, range(3)), strict=True)))
    features, _ = classes(1, 50)
    assert torch.allclose(by_task.scores(features), at_once.scores(features))


@pytest.mark.parametrize("method", slow_but(set(), ["frozen_lda", "fecam:rotations"]))
def test_a_run_has_what_other_runs_have(method: str, data: Any, tmp_path: Path) -> None:  # noqa: F811
    ours = runners.run(TINY, method, 0, data, tmp_path, "cpu", QUICK)
    theirs = runners.run(TINY, "finetune", 0, data, tmp_path, "cpu", QUICK)
    assert ours.keys() == theirs.keys()
    assert [len(row) for row in ours["matrix"]] == [1, 2]
    assert ours["recipe"]["augmentation"]["rotations"] == ("rotations" in method)
    assert frozen.run(TINY, method, 0, data, tmp_path, "cpu", QUICK) == ours, "read from its file"
    assert len(list(tmp_path.glob("*.json"))) == len(frozen.HEADS) + 1


def test_none_is_begun_without_time(data: Any, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(accuracy.Stopped):
        runners.run(TINY, "fecam", 0, data, tmp_path, "cpu", QUICK, lambda seconds: False)
    assert not list(tmp_path.glob("*.json"))


def test_a_file_that_is_added_runs_its_methods(
    data: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "coin.py").write_text(
        "def names():\n    return ['coin']\ndef run(protocol, method, *rest):\n    return {'ran': method}\n"
    )
    monkeypatch.setattr(runners, "__path__", [*runners.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "benchmarks.runners.coin", raising=False)
    assert sorted(runners.names()) == sorted([*frozen.names(), "coin"])
    assert runners.run(TINY, "coin", 0, data, tmp_path) == {"ran": "coin"}
    with pytest.raises(SettingError, match="heads_or_tails"):
        runners.run(TINY, "heads_or_tails", 0, data, tmp_path, "cpu", QUICK)
