"""Export formats: a new format is one function, and none may overwrite a model or write a file with a wrong ending."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import exporters
from edge_dfcil import ExportError
from edge_dfcil.model import file as storage
from exporters import Artifact, Int8, registry
from tests.conftest import Conv

SETTINGS: dict[str, Any] = {"classes": ["a", "b", "c"], "image_size": 16}


class Means(nn.Module):
    """The mean of each channel, scaled by one weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, images: Any) -> Any:
        return images.float().mean((2, 3)) / 255 * self.weight


def run_text(content: Any, images: Any) -> Any:
    logits = images.mean((2, 3)) / 255 * np.array(content.split(), np.float64)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def to_text(classifier: Any, about: Any, *, digits: Any = 9) -> Artifact:
    content = " ".join(f"{weight:.{digits}f}" for weight in classifier.weight.tolist()).encode()
    return Artifact(content, exporters.max_difference(lambda images: run_text(content, images), classifier, about.image_size))


@pytest.fixture
def text_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_EXPORTERS", dict(registry._EXPORTERS))
    exporters.register_exporter("text", ".txt", to_text)


@pytest.mark.usefixtures("text_format")
def test_a_format_is_one_function(tmp_path: Path) -> None:
    report = exporters.export(Means(), tmp_path / "m.TXT", source_sha256="abc", **SETTINGS)
    assert (report.format, report.opset, report.classes, report.source_sha256) == ("text", None, 3, "abc")
    assert report.bytes == report.float_bytes == (tmp_path / "m.TXT").stat().st_size
    assert report.max_difference is not None and report.max_difference < 1e-6
    assert exporters.list_exporters().items() >= {"onnx": ".onnx", "text": ".txt"}.items()
    assert exporters.export(Means(), tmp_path / "m", format="text", **SETTINGS).format == "text"
    with pytest.raises(ExportError, match="disagrees"):
        exporters.export(Means(), tmp_path / "coarse.txt", digits=0, **SETTINGS)
    with pytest.raises(ExportError, match="'text' does not take 'int8'; pass format='onnx'"):
        exporters.export(Means(), tmp_path / "n.txt", int8=None, **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.TXT"]


@pytest.mark.usefixtures("text_format")
@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("m.bin", None, r"no format has the ending '.bin'; there are onnx \(.onnx\), .*text \(.txt\)"),
        ("m.safetensors", None, "no format has the ending '.safetensors'; there are onnx"),
        ("m.MLPACKAGE", None, r"no format has the ending '.mlpackage'; a Core ML package is a folder; .* .mlmodel"),
        ("m.onnx", "tflite", "format='tflite' is not known; there are onnx"),
        ("m.txt", "onnx", "has the ending '.txt', a file of the format 'onnx' has '.onnx'"),
        ("m.tflite", "onnx", "rename it"),
    ],
)
def test_a_wrong_ending_is_refused(tmp_path: Path, name: str, format: str | None, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        exporters.export(Means(), tmp_path / name, format=format, **SETTINGS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ending", "message"), [("txt", "dot"), (".safetensors", "model files"), (".ONNX", "already")])
def test_endings_that_cannot_be_registered(ending: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        exporters.register_exporter("mine", ending, to_text)


@pytest.mark.usefixtures("text_format")
def test_a_model_is_not_overwritten(tmp_path: Path) -> None:
    model = storage.write(tmp_path / "model.txt", {"a": torch.zeros(1)}, {})
    checkpoint = storage.write(tmp_path / "c.onnx", {}, {}, kind="checkpoint")
    link, hard = tmp_path / "link.txt", tmp_path / "hard"
    link.symlink_to(model)
    os.link(model, hard)
    before = model.read_bytes()
    for path in (model, link, hard, checkpoint):
        with pytest.raises(ExportError, match="is an edge-dfcil model file"):
            exporters.export(Means(), path, **SETTINGS)
    source = tmp_path / "source.txt"
    source.write_text("a damaged model")
    with pytest.raises(ExportError, match="is the model itself"):
        exporters.export(Means(), tmp_path / "." / "source.txt", source=source, **SETTINGS)
    assert source.read_text() == "a damaged model"
    assert model.read_bytes() == before


@pytest.mark.parametrize(("name", "message"), [("no/m.onnx", "make it first"), ("", "folder"), ("x" * 300, "too long")])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, message: str
) -> None:
    monkeypatch.setattr(Means, "forward", lambda self, images: pytest.fail("nothing needs to be computed for that"))
    with pytest.raises(ExportError, match=message):
        exporters.export(Means(), tmp_path / name, **SETTINGS)


def test_the_host_application_is_left_as_it_was(tmp_path: Path) -> None:
    logging_before = [(logger, logger.level, [*logger.handlers], [*logger.filters]) for logger in map(logging.getLogger, LOGGERS)]
    filters, classifier = [*warnings.filters], Conv()
    classifier.conv.eval()
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16)).astype(np.uint8)
    exporters.export(classifier, tmp_path / "m.onnx", int8=Int8(images, {}, force=True), **SETTINGS)
    assert classifier.training and not classifier.conv.training
    assert warnings.filters == filters
    for logger, level, handlers, found in logging_before:
        assert (logger.level, logger.handlers, logger.filters) == (level, handlers, found)


LOGGERS = ("", "torch.onnx", "onnxruntime", "edge_dfcil")


@pytest.mark.parametrize("int8", [False, True])
def test_a_file_is_of_ir_10_and_opset_18_whatever_onnx_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16)).astype(np.uint8)
    monkeypatch.setattr(onnx, "IR_VERSION", 99)
    monkeypatch.setattr(onnx.helper, "IR_VERSION", 99, raising=False)
    exporters.export(Conv(), tmp_path / "m.onnx", int8=Int8(images, {}, force=True) if int8 else None, **SETTINGS)
    model = onnx.load(tmp_path / "m.onnx")
    assert model.ir_version <= 10
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    assert "short side" in {entry.key: entry.value for entry in model.metadata_props}["resize"]
