"""Rejection and calibration: images of known classes get a label, others None; model, file and export agree."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_dfcil import ClassError, DataError, ExportError, Learner, Model, ModelFileError, SettingError, metrics
from edge_dfcil.cli import main
from edge_dfcil.demo import Batches
from edge_dfcil.heads.lda import Shrinkage, lda_head
from edge_dfcil.heads.leave_one_out import leave_one_out
from edge_dfcil.model import file
from edge_dfcil.model.calibration import Calibration, best_temperature
from exporters import OnnxClassifier
from exporters.rejection import margins, scores
from tests.conftest import NAMES, QUICK, quick_learner

CLOSED_FORM = QUICK.changed({"schedule.adapt": "first", "refine.head": "lda", "refine.calibrate": True})
GOLDEN = Path(__file__).parent / "golden" / "schema1"
KNOWN, UNSEEN = ("0", "1", "2", "3", "4", "5"), ("6", "7", "8", "9")


@pytest.fixture(scope="module")
def rejecting(train: Batches) -> Model:
    """Six digits in two tasks; the backbone is not trained in the second."""
    learner = quick_learner(recipe=CLOSED_FORM)
    for task in (KNOWN[:3], KNOWN[3:]):
        learner.learn_task(train.of(task), NAMES, progress=False)
    return learner.model


@pytest.fixture(scope="module")
def exported(rejecting: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    Learner.of(rejecting, recipe=CLOSED_FORM).export(path, progress=False)
    return path


def rejected(model: Any, images: Any) -> float:
    """The share of images that are rejected."""
    answers = model.predict(images, reject=True)
    return sum(answer.label is None for answer in answers) / len(answers)


def calibration_of(model: Model) -> Calibration:
    assert model.calibration is not None
    return model.calibration


@pytest.mark.slow
class TestPredict:
    def test_unseen_classes_and_noise_are_rejected_more_often(self, rejecting: Model, test: Batches) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (200, 3, 16, 16)).astype(np.uint8)
        old, new = (rejected(rejecting, test.of(task).images) for task in (KNOWN[:3], KNOWN[3:]))
        assert max(old, new) < 0.25
        assert rejected(rejecting, test.of(UNSEEN).images) > 2 * max(old, new)
        assert rejected(rejecting, noise) > 0.5

    def test_only_the_label_differs(self, rejecting: Model, test: Batches) -> None:
        images = test.of((*KNOWN, *UNSEEN)).images
        plain, asked = rejecting.predict(images, 3), rejecting.predict(images, 3, reject=True)
        assert {answer.label for answer in asked} > {None}
        for one, other in zip(plain, asked, strict=True):
            assert (one.score, one.top) == (other.score, other.top)
            assert other.label in (None, one.label)
            assert str(other).startswith("unknown (") == (other.label is None)
            assert other.to_dict()["label"] == other.label

    @given(st.floats(0.1, 10), st.lists(st.floats(0, 50), min_size=6, max_size=6))
    def test_ranking_does_not_depend_on_it(self, rejecting: Model, temperature: Any, thresholds: Any) -> None:
        images = np.random.default_rng(1).integers(0, 256, (8, 3, 16, 16)).astype(np.uint8)
        other = rejecting.calibrated(Calibration(temperature, tuple(thresholds)))
        plain = rejecting.calibrated(None)
        expected = (plain.network(torch.from_numpy(images)) / temperature).softmax(1)
        assert torch.allclose(other.probabilities(images), expected, atol=1e-6)
        assert (other.probabilities(images).argmax(1) == plain.probabilities(images).argmax(1)).all()
        assert plain.calibration is None
        assert plain.temperature == 1

    def test_no_image(self, rejecting: Model) -> None:
        assert rejecting.predict([], reject=True) == []

    @pytest.mark.parametrize("name", ["cifar", "mirrored"])
    def test_files_of_before_have_none(self, name: str) -> None:
        model = Model.load(GOLDEN / f"{name}.safetensors", "cpu")
        assert model.calibration is None
        images = np.zeros((1, 3, 16, 16), np.uint8)
        with pytest.raises(SettingError, match="calibrate"):
            model.predict(images, reject=True)
        with pytest.raises(SettingError, match="thresholds"):
            OnnxClassifier(GOLDEN / "cifar.onnx").predict(images, reject=True)

    def test_a_backbone_that_was_trained_on_the_same_images_gives_none(self, learnt: Learner, test: Batches) -> None:
        with pytest.raises(SettingError, match="does not train the backbone"):
            learnt.predict(test.images[:2], reject=True)


class TestCalibrate:
    def test_a_trained_head_rejects_after_it(self, learnt: Learner, test: Batches) -> None:
        part = test.of(("0", "1"))
        half = len(part.targets) // 2
        before = learnt.evaluate(part, NAMES)
        learnt.calibrate([(part.images[:half], part.targets[:half])], NAMES, false_rejections=0.1)
        assert rejected(learnt, part.images[:half]) == pytest.approx(0.1, abs=0.03)
        after = learnt.evaluate(part, NAMES)
        assert (after.accuracy, after.confusion) == (before.accuracy, before.confusion)
        assert learnt.model.temperature != 1

    def test_what_it_refuses(self, learnt: Learner, test: Batches) -> None:
        part = test.of(("0", "1"))
        for images, share, error in ((9, 0.05, DataError), (40, 1.0, SettingError), (40, -0.1, SettingError)):
            with pytest.raises(error):
                learnt.calibrate([(part.images[:images], part.targets[:images])], NAMES, false_rejections=share)
        with pytest.raises(ClassError):
            learnt.calibrate([(test.images[:40], test.targets[:40])], NAMES)
        assert learnt.model.calibration is None


@pytest.mark.slow
class TestHeldOut:
    """A task that trains its backbone finds thresholds on images that it holds out."""

    HELD: ClassVar = {"refine.calibrate": True, "refine.held_out": 0.1}

    def test_a_closed_form_head_over_a_backbone_trained_in_the_task(self, train: Batches, test: Batches) -> None:
        learner = quick_learner(recipe=CLOSED_FORM.changed(self.HELD))
        learner.learn_task(train.of(KNOWN[:3]), NAMES, progress=False)
        found = calibration_of(learner.model)
        assert 10 <= found.images <= 80  # of 430
        known, unseen = (rejected(learner, test.of(names).images) for names in (KNOWN[:3], KNOWN[3:]))
        assert known < 0.25 and unseen > 2 * known

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["abd", "lwf_mc", "finetune"])
    def test_trained_heads_of_each_task(self, method: str, train: Batches, test: Batches) -> None:
        learner = quick_learner(method=method, recipe=QUICK.changed(self.HELD))
        for task in (KNOWN[:3], KNOWN[3:]):
            report = learner.learn_task(train.of(task), NAMES, progress=False)
            assert report.stages[-1].name == "calibrate"
            assert len(calibration_of(learner.model).thresholds) == len(learner.classes)
            assert 10 <= calibration_of(learner.model).images <= 80
            assert rejected(learner, test.of(task).images) < 0.25

    def test_too_few_images_give_none(self, train: Batches) -> None:
        learner = quick_learner(recipe=QUICK.changed(self.HELD))
        part = train.of(("0", "1"))
        learner.learn_task([(part.images[:40], part.targets[:40])], NAMES, progress=False)
        assert learner.model.calibration is None


@pytest.mark.slow
class TestKept:
    def test_what_is_stored(self, rejecting: Model) -> None:
        found = calibration_of(rejecting)
        assert len(found.thresholds) == 6
        assert found.images >= 10
        assert found.false_rejections == 0.05
        assert not {"views", "features"} & {name.rpartition(".")[2] for name in rejecting.tensors()}

    def test_copies_files_and_exports_agree(self, rejecting: Model, exported: Path, test: Batches, tmp_path: Path) -> None:
        images = test.images[:200]
        expected = rejecting.predict(images, 6, reject=True)
        loaded = Model.load(rejecting.save(tmp_path / "model"), "cpu")
        for other in (copy.deepcopy(rejecting), pickle.loads(pickle.dumps(rejecting)), loaded):
            assert other.calibration == rejecting.calibration
            assert other.predict(images, 6, reject=True) == expected
        assert loaded.digest() == rejecting.digest()
        classifier = OnnxClassifier(exported)
        assert classifier.temperature == rejecting.temperature
        assert classifier.thresholds == rejecting.thresholds
        np.testing.assert_allclose(classifier.probabilities(images.numpy()), rejecting.probabilities(images), atol=1e-4)
        margin = np.abs(margins(rejecting.probabilities(images).numpy(), rejecting.thresholds))
        for mine, theirs, by in zip(classifier.predict(images.numpy(), reject=True), expected, margin, strict=True):
            assert mine.label == theirs.label or by < 1e-3

    def test_a_fresh_task_without_enough_images_has_none(self, rejecting: Model, train: Batches) -> None:
        learner = Learner.of(rejecting, recipe=CLOSED_FORM)
        part = train.of(("6",))
        learner.learn_task([(part.images[:8], part.targets[:8])], NAMES, progress=False)
        assert learner.model.calibration is None

    def test_other_weights_have_none(self, rejecting: Model) -> None:
        assert rejecting.untrained("resnet8").calibration is None

    @pytest.mark.parametrize(
        "change",
        [
            {"temperature": 0},
            {"temperature": float("nan")},
            {"temperature": "1"},
            {"thresholds": [1.0]},
            {"thresholds": ["a"] * 6},
            {"thresholds": None},
            {"images": -1},
            {"false_rejections": 1.0},
            {"unknown": 1},
        ],
    )
    def test_bad_values_in_a_file_are_refused(self, change: Any, rejecting: Model, tmp_path: Path) -> None:
        settings = rejecting.settings()
        settings["calibration"] |= change
        path = file.write(tmp_path / "model", rejecting.tensors(), settings)
        with pytest.raises(ModelFileError, match="does not fit"):
            Model.load(path, "cpu")

    def test_bad_values_in_an_export_are_refused(self, exported: Path, tmp_path: Path) -> None:
        model = onnx.load(exported)
        next(entry for entry in model.metadata_props if entry.key == "thresholds").value = "[1.0]"
        onnx.save(model, tmp_path / "bad.onnx")
        with pytest.raises(ExportError, match="thresholds"):
            OnnxClassifier(tmp_path / "bad.onnx", verify=False)


class TestSurgery:
    def test_rename_keeps_it(self, rejecting: Model) -> None:
        assert rejecting.rename({"0": "zero"}).calibration == rejecting.calibration

    def test_forget_and_merge_move_the_thresholds_along(self, rejecting: Model, test: Batches) -> None:
        images = test.of(KNOWN[2:]).images
        for model in (rejecting.forget(["0", "1"]), rejecting.merge(["2", "3"], "2 or 3")):
            assert len(calibration_of(model).thresholds) == len(model.outputs)
            assert len(model.thresholds) == len(model.classes)
            assert model.temperature == rejecting.temperature
            assert rejected(model, images) < 0.25
            assert rejected(model, test.of(UNSEEN).images) > 2 * rejected(model, images)

    def test_without_means_the_temperature_stays(self, rejecting: Model) -> None:
        found = replace(rejecting, statistics={}).forget("0")
        assert calibration_of(found) == replace(calibration_of(rejecting), thresholds=())

    def test_a_later_task_of_a_merged_model(self, rejecting: Model, train: Batches, test: Batches) -> None:
        learner = Learner.of(rejecting.merge(["2", "3"], "2 or 3"), recipe=CLOSED_FORM)
        learner.learn_task(train.of(("6", "7")), NAMES, progress=False)
        assert len(learner.model.thresholds) == 7
        assert rejected(learner, test.of(KNOWN).images) < 0.25


class TestCommands:
    def test_predict_and_inspect(self, rejecting: Model, tmp_path: Path) -> None:
        from PIL import Image

        path = rejecting.save(tmp_path / "model")
        noise = np.random.default_rng(4).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "noise.png")
        command = ["predict", str(path), str(tmp_path / "noise.png"), "--device", "cpu", "--reject"]
        label = rejecting.predict(tmp_path / "noise.png", reject=True)[0].label
        answer = CliRunner().invoke(main, [*command, "--json"])
        assert json.loads(answer.stdout)[0]["label"] == label
        assert ("\tunknown\t" in CliRunner().invoke(main, command).stdout) == (label is None)
        shown = CliRunner().invoke(main, ["inspect", str(path)]).stdout
        assert f"temperature {rejecting.temperature:.3f}, thresholds that reject 5.0%" in shown

    def test_a_model_without_thresholds_is_reported(self) -> None:
        done = CliRunner().invoke(main, ["predict", str(GOLDEN / "cifar.safetensors"), __file__, "--device", "cpu", "--reject"])
        assert done.exit_code == 1
        assert "thresholds" in done.stderr


class TestParts:
    @pytest.mark.parametrize("mirrors", [False, True])
    def test_leaving_an_image_out_is_making_the_head_without_it(self, mirrors: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        targets = torch.arange(3).repeat(8)
        views = torch.randn(24, 2 if mirrors else 1, 5, generator=draw, dtype=torch.float64) + 2 * torch.eye(5)[targets][:, None]

        def made(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            means = torch.stack([views[keep & (targets == c)].flatten(0, 1).mean(0) for c in range(3)])
            off = (views[keep] - means[targets[keep]][:, None]).flatten(0, 1)
            return means, off.T @ off / views.shape[1] / 24, torch.bincount(targets[keep]).double()

        means, covariance, count = made(torch.ones(24, dtype=torch.bool))
        found = leave_one_out(means, count, covariance, 24, Shrinkage(0.0), targets, views, views[:, 0])
        for image in range(24):
            others, scatter, _ = made(torch.arange(24) != image)
            weight, bias = lda_head(others, scatter, Shrinkage(0.0))
            assert torch.allclose(found[image], weight @ views[image, 0] + bias)

    @pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
    def test_the_temperature_is_found_again(self, true: float) -> None:
        draw = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(4000, 5, generator=draw)
        targets = torch.multinomial((logits / true).softmax(1), 1, generator=draw).squeeze(1)
        assert best_temperature(logits, targets) == pytest.approx(true, rel=0.1)

    def test_where_all_is_right_the_temperature_stays_sensible(self) -> None:
        assert best_temperature(5 * torch.eye(3).repeat(20, 1), torch.arange(3).repeat(20)) > 0.1

    def test_scores(self) -> None:
        logits = torch.tensor([[3.0, 1.0, -4.0], [0.0, 0.0, 0.0]])
        np.testing.assert_allclose(scores(logits.softmax(1).numpy()), [3.0, 0.0], atol=1e-5)
        assert np.isfinite(scores(np.array([[1.0, 0.0]], np.float32))).all()
        np.testing.assert_allclose(margins(logits.softmax(1).numpy(), [1.0, 9.0, 9.0]), [2.0, -1.0], atol=1e-5)

    def test_calibration_error(self, rejecting: Model, test: Batches) -> None:
        error = metrics.CalibrationError()
        assert error.value == 0
        for probability, right in ((0.9, True), (0.9, False), (0.3, False), (0.0, False)):
            error.add(probability, right)
        assert error.value == pytest.approx((2 * 0.9 - 1 + 0.3) / 4)
        found = rejecting.evaluate(test.of(KNOWN), NAMES)
        assert found.calibration_error is not None and 0 <= found.calibration_error < 0.5
        assert "expected calibration error" in str(found)
