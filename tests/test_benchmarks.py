"""The yardstick itself: published class orders, runs that resume, tables made from files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import accuracy, report
from benchmarks.datasets import class_order, load


@pytest.mark.parametrize(
    ("run", "begins"), [(0, [23, 8, 11, 7, 48, 13]), (1, [53, 37, 65, 51, 4, 20]), (2, [0, 76, 61, 63, 1, 71])]
)
def test_class_orders_are_the_published_ones(run, begins):
    order = class_order(100, run)
    assert order[:6] == begins
    assert sorted(order) == list(range(100))


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    arrays = {}
    for part, per_class in (("train", 8), ("test", 4)):
        arrays[f"{part}_y"] = np.repeat(np.arange(6, dtype=np.uint8), per_class)
        arrays[f"{part}_x"] = random.integers(0, 256, (6 * per_class, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar100.npz", class_names=np.array([*"abcdef"]), **arrays)
    return load(tmp_path)


TINY = accuracy.Protocol("tiny", 4, 2, "resnet8", "edge", image_size=16, batch_size=8)
QUICK = {"epochs": 1, "first_epochs": 1, "min_steps": 2, "generator_steps": 2, "width": 8, "pool": 16, "refine_min_steps": 2}


def test_a_stopped_run_goes_on_and_ends_the_same(data, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = accuracy.run(TINY, "abd", 0, data, tmp_path / "whole", "cpu", QUICK)
    learn_task, calls = accuracy.Learner.learn_task, []

    def stops_at_the_second(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn_task(self, *arguments)

    monkeypatch.setattr(accuracy.Learner, "learn_task", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(TINY, "abd", 0, data, tmp_path / "stopped", "cpu", QUICK)
    resumed = accuracy.run(TINY, "abd", 0, data, tmp_path / "stopped", "cpu", QUICK)
    assert len(calls) == 3
    assert resumed["matrix"] == whole["matrix"]
    (written,) = (tmp_path / "whole").iterdir()
    assert json.loads(written.read_text())["final_accuracy"] == whole["final_accuracy"]

    table = report.table(tmp_path / "whole")
    assert f"{100 * whole['final_accuracy']:.1f}" in table
    report.plot(tmp_path / "whole", "tiny", tmp_path / "tiny.png")
    assert (tmp_path / "tiny.png").stat().st_size > 0
