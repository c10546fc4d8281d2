"""A file that is exported with input="any" answers as the model does for images of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import exporters
from edge_dfcil import Callback, ExportError, Learner
from edge_dfcil.model.preprocessing import fit
from edge_dfcil.training.stage import Stage
from exporters import Artifact, Int8, OnnxClassifier, registry, resize, scaling
from tests.conftest import Conv

SIDE = 16
SETTINGS: dict[str, Any] = {"classes": ["a", "b", "c"], "image_size": SIDE}
SIZES = [(16, 16), (17, 16), (5, 9), (1, 40), (90, 16), (48, 64), (200, 90), (90, 200), (480, 640)]


def session(content: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(graph: Any, images: Any) -> Any:
    return graph.run(None, {"images": images})[0]


def noise(*shape: Any, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def graphs() -> Any:
    """Graphs that scale, by the side of their squares."""
    return {size: session(scaling.scaling_graph(size).SerializeToString()) for size in (8, 16, 33, 70)}


@settings(max_examples=80, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.sampled_from([8, 16, 33, 70]))
@example(height=480, width=640, size=70)
@example(height=768, width=576, size=33)
@example(height=1, width=199, size=16)
@example(height=199, width=2, size=16)
@example(height=64, width=64, size=16)
@example(height=16, width=16, size=16)
def test_a_graph_scales_as_torch_does(graphs: Any, height: int, width: int, size: int) -> None:
    photo = noise(2, 3, height, width, seed=height * width)
    found = run(graphs[size], photo).astype(int)
    assert found.shape == (2, 3, size, size)
    assert np.abs(found - fit(torch.from_numpy(photo), size).numpy()).max() <= 1
    # Equal, except where a processor rounds a weight to its neighbour. ONNX Runtime's Resize differs in up to a quarter.
    assert (found != resize.fit(photo, size)).mean() < 1e-3


@pytest.mark.parametrize("size", [(64, 64), (31, 32), (480, 640), (40, 40)])
def test_whole_numbers_are_torchs_own(size: Any) -> None:
    photo = noise(1, 3, *size)
    scale = 32 / min(size)
    scaled = F.interpolate(
        torch.from_numpy(photo), [round(side * scale) for side in size], mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (round((side - 32) / 2) for side in scaled.shape[2:])
    expected = scaled[:, :, top : top + 32, left : left + 32].numpy()
    assert (resize.fit(photo, 32) != expected).mean() < 1e-3


@pytest.fixture(scope="module")
def exported(_learnt: Learner, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("any") / "digits.onnx"
    return _learnt, _learnt.export(path, input="any"), path


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_a_file_answers_as_the_learner_does_for_every_size(exported: Any, size: tuple[int, int]) -> None:
    learner, _, path = exported
    photos = noise(3, 3, *size)
    found = run(session(str(path)), photos)
    classifier = OnnxClassifier(path)
    np.testing.assert_allclose(found, classifier.probabilities(photos), atol=1e-3)
    # Where torch does not resize uint8 by itself, a pixel differs by 1/255, and the network amplifies that.
    np.testing.assert_allclose(found, learner.probabilities(photos).numpy(), atol=1e-4 if size == (16, 16) else 0.05)
    assert [p.label for p in classifier.predict(photos)] == [p.label for p in learner.predict(photos)]


@pytest.mark.slow
def test_photographs_in_every_form_are_the_graphs_own(exported: Any, tmp_path: Path) -> None:
    photo = noise(40, 56, 3)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    expected = run(session(str(exported[2])), np.ascontiguousarray(photo.transpose(2, 0, 1))[None])
    for form in (photo, photo.transpose(2, 0, 1), Image.fromarray(photo), tmp_path / "photo.png", [photo, photo]):
        for found in OnnxClassifier(exported[2]).probabilities(form):
            np.testing.assert_allclose(found, expected[0], atol=1e-3)


@pytest.mark.slow
def test_a_file_says_that_it_takes_every_size(exported: Any) -> None:
    _, report, path = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    (entry,) = model.graph.input
    batch, channels, *sides = entry.type.tensor_type.shape.dim
    assert batch.dim_param and channels.dim_value == 3
    assert all(side.dim_param for side in sides)
    metadata = {p.key: p.value for p in model.metadata_props}
    assert (metadata["input"], metadata["image_size"], report.input) == ("any", "16", "any")
    assert report.bytes == report.float_bytes == path.stat().st_size
    assert report.max_difference < 0.05


@pytest.mark.slow
def test_int8_takes_every_size_too_whatever_onnx_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "IR_VERSION", 99)
    monkeypatch.setattr(onnx.helper, "IR_VERSION", 99, raising=False)
    images, path = noise(8, 3, SIDE, SIDE), tmp_path / "m.onnx"
    report = exporters.export(Conv(), path, int8=Int8(images, {"images": images}, force=True), input="any", **SETTINGS)
    graph = session(str(path))
    for size in ((40, 30), (7, 90)):
        photos = noise(2, 3, *size)
        np.testing.assert_allclose(run(graph, photos), run(graph, resize.fit(photos, SIDE)), atol=1e-3)
    assert (report.format, report.input, report.bytes) == ("onnx-int8", "any", path.stat().st_size)
    model = onnx.load(path)
    assert model.ir_version <= 10
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert {node.op_type for node in model.graph.node} >= {"If", "QuantizeLinear"}


@pytest.mark.slow
def test_a_graph_that_scales_otherwise_than_the_model_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"what was there before")

    def squeeze(images: Any, size: int) -> Any:
        return F.interpolate(torch.from_numpy(images), [size, size], mode="bilinear", antialias=True).numpy()

    with pytest.raises(
        ExportError, match=r"scales images of \d+ x \d+ pixels differently from the model: a pixel differs by \d+/255"
    ):
        exporters.export(Conv(), path, input="any", fit=squeeze, **SETTINGS)
    assert path.read_bytes() == b"what was there before"


def test_another_answer_at_another_size_is_refused() -> None:
    def answer(squares: Any) -> Any:
        return squares.astype(np.float64).mean((2, 3)) / 255

    def run(images: Any) -> Any:
        return answer(resize.fit(images, SIDE)) + (0.01 if images.shape[2] == 640 else 0)

    def scale(images: Any) -> Any:
        return resize.fit(images, SIDE)

    with pytest.raises(ExportError, match=r"disagrees with the model on images of 640 x 480 pixels.*0.01"):
        exporters.checks.max_difference_at_sizes(run, scale, answer, SIDE, resize.fit)


def test_what_it_refuses(learnt: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_EXPORTERS", dict(registry._EXPORTERS))
    exporters.register_exporter("text", ".txt", lambda classifier, about: Artifact(b"text", 0.0))
    with pytest.raises(ExportError, match="input='all' is not known; pass 'any' for images of every size, or 'fixed'"):
        learnt.export(tmp_path / "m.onnx", input="all")
    with pytest.raises(ExportError, match="'text' does not take 'input'; pass format='onnx'"):
        learnt.export(tmp_path / "m.txt", input="any")
    begun = list[str]()

    class Stages(Callback):
        def on_stage_begin(self, stage: Stage) -> None:
            begun.append(stage.name)

    with pytest.raises(ExportError, match="'text' does not take 'int8'"):
        learnt.export(tmp_path / "m.txt", "int8", callbacks=[Stages()])
    assert begun == []  # no image was generated for a format that has no use for it
    assert learnt.export(tmp_path / "m.txt").input == "fixed"
