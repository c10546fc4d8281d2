"""What the public calls answer, as people and as programs read it."""

from __future__ import annotations

import json
import sys

import pytest

from edge_dfcil import Evaluation, Prediction, SettingError, TaskReport, metrics
from edge_dfcil.results import DistillReport, MemoryPlan, PruneReport, StageReport

EVALUATION = metrics.evaluation([[3, 1, 0], [0, 1, 1], [0, 0, 0]], ("cat", "dog", "fox"), [("cat", "dog"), ("fox",)])
STAGE = StageReport("learn", 1200, 12.34, 3840, {"hard": 0.25, "distill": 0.5}, at_once=16, peak_bytes=10_500_000)


class TestEvaluation:
    def test_macro_accuracy_weighs_classes_alike(self) -> None:
        assert EVALUATION.accuracy == pytest.approx(4 / 6)
        assert EVALUATION.macro_accuracy == pytest.approx((3 / 4 + 1 / 2) / 2)
        assert EVALUATION.to_dict()["macro_accuracy"] == EVALUATION.macro_accuracy

    def test_confusion_as_a_frame(self) -> None:
        pytest.importorskip("pandas")
        frame = EVALUATION.to_frame()
        assert list(frame.index) == list(frame.columns) == ["cat", "dog", "fox"]
        assert frame.loc["cat", "dog"] == 1
        assert frame.loc["dog", "cat"] == 0
        assert (frame.index.name, frame.columns.name) == ("true", "predicted")
        assert frame.to_numpy().sum() == EVALUATION.n

    def test_without_pandas_the_command_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)
        with pytest.raises(SettingError, match="pip install pandas"):
            EVALUATION.to_frame()

    def test_text(self) -> None:
        assert str(EVALUATION).splitlines() == [
            "accuracy 66.7% on 6 images, mean of the classes 62.5%",
            "by task: 66.7%, -",
            "lowest: dog 50.0%, cat 75.0%",
        ]
        one = Evaluation(1.0, 1, {"cat": 1.0}, (1.0,), ("cat",), ((1,),))
        assert str(one) == "accuracy 100.0% on 1 image, mean of the classes 100.0%"


def test_prediction_text() -> None:
    assert str(Prediction("cat", 0.934, (("cat", 0.934), ("dog", 0.05)))) == "cat 0.93, dog 0.05"


def test_stage_text() -> None:
    assert str(STAGE) == (
        "learn: 1,200 steps in 12.3 s, 3,840 images, loss 0.75 (hard 0.25, distill 0.5), at most 10.5 MB, "
        "micro-batches of 16 images"
    )
    assert str(StageReport("dream", 1, 0.1, 1, {"kl": 2.0})) == "dream: 1 step in 0.1 s, 1 image, loss kl 2"
    assert str(StageReport("lda", 0, 0.0, 0, {})) == "lda: 0 steps in 0.0 s, 0 images"


def test_task_text() -> None:
    report = TaskReport(2, "abd", ("dog", "fox"), ("cat",), ("cat", "dog", "fox"), 64, 3.21, (STAGE,))
    assert str(report).splitlines() == [
        "task 2 (abd): learnt dog, fox and refreshed cat from 64 images in 3.2 s; 3 classes known",
        f"  {STAGE}",
    ]
    names = tuple(f"c{i}" for i in range(9))
    plan = MemoryPlan(100_000_000, (), {})
    more = TaskReport(1, "abd", names, (), names, 64, 3.21, (), plan, 52_000_000, left_out=1, resumed=True, fitted={"epochs": 7})
    assert str(more).splitlines() == [
        "task 1 (abd): learnt c0, c1, c2, c3, c4 and 4 more from 64 images (1 left out of an epoch) in 3.2 s, resumed; "
        "9 classes known",
        "memory: at most 52.0 MB of 100.0 MB",
        "fitted to the time: epochs 7",
    ]
    assert json.loads(json.dumps(more.to_dict()))["fitted"] == {"epochs": 7}


def test_texts_of_compression() -> None:
    distilled = DistillReport("resnet32", "resnet8", (460_000, 78_000), 2048, 0.95, (0.9, 0.85), 4.0, (STAGE,))
    assert "resnet8 with 78,000 parameters from resnet32 with 460,000" in str(distilled)
    assert "accuracy 90.0% as teacher, 85.0% as student" in str(distilled)
    pruned = PruneReport(
        (100, 80), (1000, 700), (2_000_000, 1_500_000), (1.5, 1.2), (1.4, 1.1), {}, (0.9, 0.5, 0.88), 0.97, 9.0, ()
    )
    assert "80 of 100 filters, 700 of 1,000 parameters, 1.5e+06 of 2e+06 operations" in str(pruned)
    assert "90.0% before, 50.0% pruned, 88.0% repaired" in str(pruned)
    assert "97.0% of fresh dreams" in str(pruned)


def test_a_history_is_part_of_the_answer() -> None:
    stage = StageReport("learn", 2, 0.1, 8, {"hard": 0.5}, history=({"hard": 0.9}, {"hard": 0.5}))
    assert stage.to_dict()["history"] == ({"hard": 0.9}, {"hard": 0.5})
    assert STAGE.history == ()
