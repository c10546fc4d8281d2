"""INT8 without data: calibrated on dreams, checked against the float graph, refused when its answers differ."""

from __future__ import annotations

import copy
import json
import logging
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_dfcil import DataError, ExportError, Learner
from edge_dfcil.demo import Batches
from exporters import Int8, OnnxClassifier, export, export_onnx
from exporters.int8 import Comparison
from exporters.timing import session
from tests.conftest import NAMES, QUICK, quick_learner

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def able(train: Batches) -> Learner:
    """A learner that tells four digits apart, so that its answers do not depend on rounding."""
    learner = quick_learner(
        recipe=QUICK.changed({"schedule.min_steps": 150, "schedule.learning_rate": 0.05, "generator.steps": 40})
    )
    learner.learn_task(train.of(("0", "1", "2", "3")), NAMES, progress=False)
    return learner


@pytest.fixture(scope="module")
def int8(able: Learner, test: Batches, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("int8") / "digits.onnx"
    return able.export(path, "int8", force=True, evaluation=[*test.of(("0", "1", "2", "3"))], classes=NAMES, progress=False), path


def test_it_answers_nearly_as_the_model_in_a_third_of_the_space(able: Learner, int8: Any, test: Batches, tmp_path: Path) -> None:
    report, path = int8
    known = test.of(("0", "1", "2", "3"))
    float_bytes = able.export(tmp_path / "float.onnx").bytes
    assert report.format == "onnx-int8"
    assert report.float_bytes == pytest.approx(float_bytes, rel=0.01)
    assert report.bytes == path.stat().st_size
    assert report.bytes < 0.6 * float_bytes, "the graph is much of a resnet8's file; larger networks shrink to a quarter"
    assert report.agreement["dreams"] >= 0.9 and report.agreement["pictures"] >= 0.9
    assert report.speedup > 0
    as_float, as_int8 = report.accuracy["pictures"]
    assert as_float > 0.8 and abs(as_float - as_int8) < 0.05
    answers = [answer.label for answer in OnnxClassifier(path).predict(known.images.numpy())]
    right = np.mean([label == NAMES[target] for label, target in zip(answers, known.targets.tolist(), strict=True)])
    assert right == pytest.approx(as_int8), "the file has the reported accuracy"


def test_it_rejects_as_the_model(able: Learner, test: Batches, tmp_path: Path) -> None:
    learner, known = copy.deepcopy(able), test.of(("0", "1", "2", "3"))
    half = len(known.images) // 2
    learner.calibrate([(known.images[:half], known.targets[:half])], NAMES)
    learner.export(tmp_path / "int8.onnx", "int8", force=True, progress=False)
    classifier = OnnxClassifier(tmp_path / "int8.onnx")
    assert classifier.thresholds == learner.model.thresholds
    mine, theirs = (one.predict(test.images.numpy(), reject=True) for one in (classifier, learner))
    assert {answer.label for answer in mine} > {None}
    assert np.mean([(one.label is None) == (other.label is None) for one, other in zip(mine, theirs, strict=True)]) > 0.85


def test_the_file_says_what_it_is(able: Learner, int8: Any) -> None:
    model = onnx.load(int8[1])
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == list(able.classes)
    operators = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    weights = [
        tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4
    ]
    scales = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith("_scale")}
    assert weights and all(scales[w.name.replace("_quantized", "_scale")].dims[0] == w.dims[0] for w in weights), (
        "one scale per channel"
    )


def test_ranges_can_be_wider_than_those_of_the_calibration(able: Learner, tmp_path: Path) -> None:
    scales = []
    for widening in (1.0, 1.5):
        path = tmp_path / f"{widening}.onnx"
        setting = Int8(able.dream(64, progress=False).numpy(), {}, widening=widening, force=True)
        export_onnx(able.network, path, classes=able.classes, image_size=16, int8=setting)
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        scales.append({name: scale.item() for name, scale in tensors.items() if name.endswith("_scale") and scale.ndim == 0})
    assert scales[0] and scales[0].keys() == scales[1].keys()
    for name, scale in scales[0].items():
        assert scales[1][name] == pytest.approx(1.5 * scale, rel=1e-5), name


def test_it_can_be_calibrated_on_pictures_and_take_every_size(
    able: Learner, train: Batches, test: Batches, tmp_path: Path
) -> None:
    known, path = ("0", "1", "2", "3"), tmp_path / "a.onnx"
    report = able.export(path, "int8", force=True, calibration=[*train.of(known)], input="any", progress=False)
    assert report.agreement["dreams"] >= 0.9 and report.input == "any"
    large = test.of(known).images.numpy().repeat(3, axis=2).repeat(3, axis=3)
    found = session(str(path)).run(["probabilities"], {"images": large})[0].argmax(1)
    assert (found == able.probabilities(large).numpy().argmax(1)).mean() >= 0.9


def test_a_graph_that_answers_otherwise_is_not_written(able: Learner, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"what was there before")
    dark = np.zeros((8, 3, 16, 16), np.uint8)  # no range at all to calibrate on
    bright = np.random.default_rng(0).integers(0, 256, (64, 3, 16, 16)).astype(np.uint8)
    digits = able.dream(64, progress=False).numpy()
    setting = Int8(dark, {"dreams": np.concatenate([bright, digits])}, force=True)
    with pytest.raises(ExportError, match=r"another answer than the model for .* of the \d+ dreams, 10% is allowed"):
        export_onnx(able.network, path, classes=able.classes, image_size=16, int8=setting)
    assert path.read_bytes() == b"what was there before"


class Uneven(nn.Module):
    """Answers by the mean of green minus that of blue; its mean of red is ten thousand times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2, bias=False)
        self.register_buffer("scales", torch.tensor([1e4, 1.0, 1.0]))
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3)[:, :, None, None])
            self.head.weight.copy_(torch.tensor([[0.0, 20.0, -20.0], [0.0, -20.0, 20.0]]))

    def forward(self, images: Any) -> Any:
        return self.head(self.conv(images.float() / 255).relu().mean((2, 3)) * self.scales)


def test_a_head_over_features_of_very_different_sizes_stays_floats(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (128, 3, 1, 1))
    images = np.broadcast_to(colours, (128, 3, 16, 16)).astype(np.uint8)
    path = tmp_path / "m.onnx"
    report = export(Uneven(), path, classes=["green", "blue"], image_size=16, int8=Int8(images, {"pictures": images}, force=True))
    assert report.quantization == "per-channel scales, float head"
    assert report.agreement["pictures"] >= 0.9
    quantized = {node.op_type: node.input for node in onnx.load(path).graph.node}
    assert quantized["Conv"][1].endswith("_DequantizeLinear_Output") and not quantized["Gemm"][1].endswith("Output")


@pytest.mark.parametrize(
    ("images", "as_float", "as_int8", "refused"),
    [(1000, 0.9, 0.891, False), (1000, 0.9, 0.889, True), (20, 0.9, 0.85, False), (20, 0.9, 0.8, True), (1000, 0.8, 0.9, False)],
)
def test_a_point_of_accuracy_may_be_lost_or_one_image(images: int, as_float: float, as_int8: float, refused: bool) -> None:
    found = Comparison({"pictures": images}, {"pictures": 0.95}, {"pictures": (as_float, as_int8)}, 0.1)
    assert bool(found.reason()) == refused
    assert not refused or "points of accuracy less on the pictures" in found.reason()


def test_a_file_that_is_not_faster_is_not_written_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporters.onnx.latencies", lambda graphs, size: {"float": 0.001, "int8": 0.002})
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 16, 16)).astype(np.uint8)
    settings: dict[str, Any] = {"classes": ["green", "blue"], "image_size": 16}
    with pytest.raises(ExportError, match=r"takes 2\.00 times as long .* Nothing was written\. .* force=True"):
        export(Uneven(), tmp_path / "m.onnx", int8=Int8(images, {}), **settings)
    assert not list(tmp_path.iterdir())
    report = export(Uneven(), tmp_path / "m.onnx", int8=Int8(images, {}, force=True), **settings)
    assert report.speedup == 0.5 and (tmp_path / "m.onnx").exists()


def test_what_it_refuses(able: Learner, learnt: Learner, train: Batches, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="not a form of quantization"):
        learnt.export(tmp_path / "x.onnx", "int4")
    with pytest.raises(ExportError, match="for quantize='int8'"):
        learnt.export(tmp_path / "x.onnx", calibration=train)
    with pytest.raises(ExportError, match="force is for"):
        learnt.export(tmp_path / "x.onnx", force=True)
    with pytest.raises(DataError, match="no image"):
        able.export(tmp_path / "x.onnx", "int8", force=True, calibration=[], progress=False)
    with pytest.raises(ExportError, match="make it first"):
        able.export(tmp_path / "no" / "x.onnx", "int8", force=True)
    setting = Int8(np.zeros((0, 3, 16, 16), np.uint8), {}, force=True)
    with pytest.raises(ExportError, match="no image to calibrate on"):
        export_onnx(able.network, tmp_path / "x.onnx", classes=able.classes, image_size=16, int8=setting)
    assert not list(tmp_path.iterdir())


def test_exporting_leaves_the_callers_random_state_alone(able: Learner, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    able.export(tmp_path / "x.onnx", "int8", force=True, progress=False)
    assert torch.equal(state, torch.get_rng_state())


def test_a_set_can_come_in_batches_which_are_not_kept(able: Learner, test: Batches, tmp_path: Path) -> None:
    images = test.of(("0", "1", "2", "3")).images.numpy()
    alive, most = 0, 0

    class Batches:
        """Counts the batches that are in memory."""

        def __iter__(self) -> Iterator[Any]:
            nonlocal most
            for batch in np.array_split(images, 12):
                copy = batch.copy()
                weakref.finalize(copy, gone)
                nonlocal alive
                alive += 1
                most = max(most, alive)
                yield copy
                del copy

    def gone() -> None:
        nonlocal alive
        alive -= 1

    seen = []
    sets: dict[str, Any] = {"classes": able.classes, "image_size": 16}
    one = export(able.network, tmp_path / "a.onnx", int8=Int8(images, {"pictures": images}, force=True), **sets)
    setting = Int8(Batches(), {"pictures": Batches()}, force=True)
    two = export(able.network, tmp_path / "b.onnx", int8=setting, on_batch=lambda *state: seen.append(state), **sets)
    assert one.agreement == two.agreement
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert most <= 3
    assert seen[-1] == (2 * len(images), None)


def test_progress_counts_images_and_can_end_the_export(able: Learner, test: Batches, tmp_path: Path) -> None:
    images, seen = test.of(("0", "1", "2", "3")).images.numpy(), []

    def stop(done: Any, total: Any) -> None:
        seen.append((done, total))
        if done >= 64:
            raise KeyError("stopped")

    setting = Int8([images[:50], images[50:100]], {"pictures": images[:20]}, force=True)
    with pytest.raises(KeyError, match="stopped"):
        export(able.network, tmp_path / "a.onnx", classes=able.classes, image_size=16, int8=setting, on_batch=stop)
    assert seen == [(32, 120), (50, 120), (82, 120)]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Int8(np.zeros((2, 3, 16, 16), np.float32), {}, force=True), "dtype float32"),
        (Int8(np.zeros((2, 3, 9, 9), np.uint8), {}, force=True), "could not quantize"),
        (Int8([], {}, force=True), "no image to calibrate on"),
        (Int8(np.zeros((2, 3, 16, 16), np.uint8), {"pictures": []}, force=True), "no image in 'pictures'"),
    ],
)
def test_sets_that_cannot_be_used(able: Learner, tmp_path: Path, setting: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export(able.network, tmp_path / "x.onnx", classes=able.classes, image_size=16, int8=setting)
    assert not list(tmp_path.iterdir())


def test_what_the_quantizer_logs_is_dropped_and_what_others_log_is_not(
    able: Learner, test: Batches, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime import quantization

    original = quantization.quantize_static

    def logs(*args: Any, **settings: Any) -> Any:
        elsewhere = threading.Thread(target=lambda: logging.getLogger().warning("from another thread"))
        elsewhere.start()
        elsewhere.join()
        code = compile("import logging; logging.warning('advice')", "/lib/onnxruntime/quantize.py", "exec")
        exec(code)
        return original(*args, **settings)

    monkeypatch.setattr(quantization, "quantize_static", logs)
    setting = Int8(test.images.numpy()[:32], {}, force=True)
    export(able.network, tmp_path / "x.onnx", classes=able.classes, image_size=16, int8=setting)
    assert [record.getMessage() for record in caplog.records if record.name == "root"] == ["from another thread"]


def test_a_set_that_knows_its_size_is_counted(able: Learner, test: Batches, tmp_path: Path) -> None:
    images, seen = test.of(("0", "1", "2", "3")).images.numpy()[:48], []

    class Sized:
        def __len__(self) -> int:
            return len(images)

        def __iter__(self) -> Any:
            return iter(np.array_split(images, 3))

    settings: dict[str, Any] = {"classes": able.classes, "image_size": 16}
    export(
        able.network,
        tmp_path / "a.onnx",
        int8=Int8(Sized(), {}, force=True),
        on_batch=lambda *state: seen.append(state),
        **settings,
    )
    assert seen == [(16, 48), (32, 48), (48, 48)]
