"""Old classes are remembered: by the demo as shipped, on real digits, and on real photographs if the data set is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edge_dfcil import RECIPES, Learner
from edge_dfcil.cli import main
from edge_dfcil.demo import Batches
from exporters import OnnxClassifier

pytestmark = pytest.mark.slow


def test_the_demo_remembers_what_finetuning_forgets(tmp_path: Path, test: Batches) -> None:
    from click.testing import CliRunner

    done = CliRunner().invoke(main, ["demo", "--out", str(tmp_path), "--device", "cpu", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    assert set(answer) == {"final_accuracy", "model", "onnx", "seconds"}
    final = answer["final_accuracy"]
    assert final["abd"] >= 0.70
    assert final["finetune"] <= 0.30
    assert final["upper_bound"] >= 0.90
    exported = OnnxClassifier(answer["onnx"]).predict(test.images.numpy())
    named = [prediction.label for prediction in Learner.load(answer["model"], "cpu").predict(test.images)]
    assert [prediction.label for prediction in exported] == named
    right = sum(name == str(target) for name, target in zip(named, test.targets.tolist(), strict=True))
    assert right / len(named) == pytest.approx(final["abd"]), "what was saved is what was measured"
    assert (tmp_path / "accuracy.png").stat().st_size > 0


PHOTOS = Path(os.environ.get("EDGE_DFCIL_DATA", "")) / "cifar100.npz"


@pytest.mark.skipif(not PHOTOS.is_file(), reason="EDGE_DFCIL_DATA does not name a folder that contains cifar100.npz")
def test_photographs_are_remembered_better_than_by_finetuning() -> None:
    from benchmarks.datasets import class_order, load

    data = load(PHOTOS)
    order = class_order(100, 0)[:6]
    quick = {
        "schedule.min_steps": 0,
        "schedule.epochs": 4,
        "schedule.first_epochs": 6,
        "generator.steps": 120,
        "generator.batch": 32,
        "generator.width": 32,
    }
    recipe = RECIPES["edge"].changed({"schedule.learning_rate": 0.05, "remember.pool": 640, "refine.min_steps": 60, **quick})
    final = {}
    for method in ("abd", "finetune"):
        learner = Learner("resnet8", method=method, recipe=recipe, device="cpu")
        for task in (order[:2], order[2:4], order[4:]):
            learner.learn_task(data.part("train", task, 16), data.names, progress=False)
        final[method] = learner.evaluate(data.part("test", order, 500), data.names).accuracy
    assert final["abd"] > final["finetune"] + 0.05
