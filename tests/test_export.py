"""An exported file predicts as the model does, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edge_dfcil import ExportError, Learner
from edge_dfcil.demo import Batches
from exporters import OnnxClassifier, export_onnx


@pytest.fixture(scope="module")
def exported(_learnt: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("export") / "digits.onnx"
    return _learnt, _learnt.export(path), path


def test_answers_as_the_model_for_any_batch(exported: Any, test: Batches) -> None:
    learner, report, path = exported
    classifier = OnnxClassifier(path)
    for n in (1, 2, 33):
        x = test.images[:n]
        with torch.inference_mode():
            expected = learner.network(x).softmax(1).numpy()
        assert np.abs(classifier.probabilities(x.numpy()) - expected).max() < 1e-4
        for mine, theirs in zip(classifier.predict(x.numpy(), top_k=2), learner.predict(x, top_k=2), strict=True):
            assert [name for name, _ in mine.top] == [name for name, _ in theirs.top]
            assert mine.score == pytest.approx(theirs.score, abs=1e-4)
    assert report.max_difference < 1e-4
    assert report.bytes == path.stat().st_size


def test_a_report_has_a_text(exported: Any) -> None:
    _, report, path = exported
    assert str(report).startswith(f"{path}: 2 classes, {path.stat().st_size} bytes, probabilities within ")
    assert "images of every size" in str(replace(report, input="any"))
    int8 = replace(report, bytes=10, float_bytes=40, max_difference=None, speedup=1.5, quantization="per-channel scales")
    assert str(replace(int8, agreement={"dreams": 0.98}, accuracy={"pictures": (0.9, 0.89)})).splitlines() == [
        f"{path}: 2 classes, 10 bytes, not compared with the model",
        "25% of the float file's size, 1.5 times as fast; per-channel scales",
        "answers as the model does for 98.0% of the dreams",
        "accuracy on the pictures: 90.0% as float, 89.0%",
    ]


def test_floats_in_zero_to_one_are_the_same_pixels(exported: Any, test: Batches) -> None:
    classifier = OnnxClassifier(exported[2])
    x = test.images[:5].numpy()
    assert classifier.predict(x / np.float32(255)) == classifier.predict(x)


def test_the_file_says_what_it_is(exported: Any) -> None:
    learner, report, path = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version >= 18
    (entry,) = model.graph.input
    assert entry.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = entry.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [d.dim_value for d in dims[1:]] == [3, 16, 16]
    metadata = {p.key: p.value for p in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["0", "1"]
    assert metadata["image_size"] == "16"
    assert metadata["source_sha256"] == report.source_sha256
    assert len(report.source_sha256) == 64
    assert metadata["version"] == learner.settings()["version"]


def test_it_answers_without_torch(exported: Any) -> None:
    code = f"""
        import sys
        import numpy as np
        from exporters import OnnxClassifier
        classifier = OnnxClassifier({str(exported[2])!r}, threads=1)
        answer = classifier.predict(np.zeros((2, 3, 16, 16), np.uint8), top_k=2)
        assert len(answer) == 2 and {{name for name, _ in answer[0].top}} == {{"0", "1"}}
        heavy = {{"torch", "torchvision", "safetensors", "onnx"}} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


class Fickle(nn.Module):
    """Gives another answer at each call, so that no graph can agree with it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Any) -> Any:
        self.calls += 1
        return images.float().mean((2, 3)) * 0.01 * self.calls


def test_a_graph_that_disagrees_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"what was there before")
    with pytest.raises(ExportError, match="disagrees"):
        export_onnx(Fickle(), path, classes=["a", "b", "c"], image_size=16)
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


class Stubborn(nn.Module):
    def forward(self, images: Any) -> Any:
        return images.float().mean((2, 3)) if float(images.float().sum()) > 3.0 else images.float().amax((2, 3))


def test_a_network_that_cannot_be_a_graph_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="could not write this network"):
        export_onnx(Stubborn(), tmp_path / "x.onnx", classes=["a", "b", "c"], image_size=16)


def test_no_such_folder(learnt: Learner, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="make it first"):
        learnt.export(tmp_path / "nowhere" / "x.onnx")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a file"):
        OnnxClassifier(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ExportError, match="cannot be read as ONNX"):
        OnnxClassifier(tmp_path / "text.onnx")
    node, opset = onnx.helper.make_node("Identity", ["x"], ["y"]), onnx.helper.make_opsetid("", 18)
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), ir_version=10, opset_imports=[opset]),
        tmp_path / "other.onnx",
    )
    with pytest.raises(ExportError, match="did not write it"):
        OnnxClassifier(tmp_path / "other.onnx")


@pytest.mark.slow
def test_a_file_holds_no_path_of_the_machine_that_made_it(learnt: Learner, tmp_path: Path) -> None:
    learnt.export(tmp_path / "m.onnx")
    assert str(Path(__file__).parent.parent).encode() not in (tmp_path / "m.onnx").read_bytes()
