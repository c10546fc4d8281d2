"""Formats besides ONNX: they say what to install, and a written file predicts as the model does."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import exporters
from edge_dfcil import ExportError, Learner
from edge_dfcil.cli import main
from exporters.formats import coreml, executorch, litert
from tests.conftest import Conv

SETTINGS: dict[str, Any] = {"classes": ["a", "b", "c"], "image_size": 16}


@pytest.mark.parametrize(
    ("ending", "module", "extra"),
    [(".tflite", "litert_torch", "litert"), (".pte", "executorch.exir", "executorch"), (".mlmodel", "coremltools", "coreml")],
)
def test_a_format_without_its_extra_names_the_command(
    ending: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # cannot be imported
    options: dict[str, Any] = {"unchecked": True} if extra == "coreml" else {}
    with pytest.raises(ExportError, match=rf"needs {module}, .* pip install 'edge-dfcil\[{extra}\]'"):
        exporters.export(Conv(), tmp_path / f"m{ending}", **SETTINGS, **options)
    assert not list(tmp_path.iterdir())


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


class Method:
    """A fake of the program that ExecuTorch's runtime gives; it runs torch's own exported program."""

    def __init__(self, program: Any, shift: float) -> None:
        self._program, self._shift = program, shift

    def load_method(self, name: str) -> Any:
        assert name == "forward"
        return SimpleNamespace(execute=lambda inputs: [self._program.module()(*inputs).detach() + self._shift])


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_executorch_is_checked_image_by_image(shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def lower(program: Any, partitioner: Any, constant_methods: Any) -> Any:
        seen.update(program=program, about=json.loads(constant_methods["about"]))
        return SimpleNamespace(to_executorch=lambda: SimpleNamespace(buffer=b"program"))

    runtime = SimpleNamespace(load_program=lambda content: Method(seen["program"], shift))
    _stand_in(monkeypatch, "executorch.exir", to_edge_transform_and_lower=lower)
    _stand_in(monkeypatch, "executorch.runtime", Runtime=SimpleNamespace(get=lambda: runtime))
    _stand_in(monkeypatch, "executorch.backends.xnnpack.partition.xnnpack_partitioner", XnnpackPartitioner=object)
    for parent in ("executorch", "executorch.backends", "executorch.backends.xnnpack", "executorch.backends.xnnpack.partition"):
        _stand_in(monkeypatch, parent, __path__=[])
    if shift:
        with pytest.raises(ExportError, match="disagrees with the model"):
            exporters.export(Conv(), tmp_path / "m.pte", **SETTINGS)
        assert not list(tmp_path.iterdir())
    else:
        report = exporters.export(Conv(), tmp_path / "m.pte", **SETTINGS)
        assert (report.format, report.bytes) == ("executorch", len(b"program"))
        assert report.max_difference is not None and report.max_difference < 1e-6
        assert json.loads(seen["about"]["classes"]) == ["a", "b", "c"]


class Converted:
    """A fake of the model that coremltools makes; it contains torch's trace instead of a network."""

    def __init__(self, traced: Any, labels: list[str], shift: float) -> None:
        self.user_defined_metadata: dict[str, str] = {}
        self._traced, self._labels, self._shift = traced, labels, shift

    def get_spec(self) -> Any:
        labels = SimpleNamespace(stringClassLabels=SimpleNamespace(vector=self._labels))
        return SimpleNamespace(SerializeToString=lambda: b"network", neuralNetworkClassifier=labels)

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        image = torch.from_numpy(np.array(inputs["image"]).transpose(2, 0, 1)[None])
        found = self._traced(image).detach()[0] + self._shift
        return {"probabilities": dict(sorted(zip(self._labels, found.tolist(), strict=True), reverse=True))}


def _coremltools(monkeypatch: pytest.MonkeyPatch, shift: float = 0.0) -> list[Converted]:
    made: list[Converted] = []

    def convert(traced: Any, *, classifier_config: list[str], **settings: Any) -> Converted:
        made.append(Converted(traced, classifier_config, shift))
        return made[-1]

    content: dict[str, Any] = {
        "convert": convert,
        "ImageType": lambda **settings: settings,
        "TensorType": lambda **settings: settings,
        "ClassifierConfig": lambda labels, **names: labels,
        "colorlayout": SimpleNamespace(RGB="RGB"),
        "ComputeUnit": SimpleNamespace(CPU_ONLY="cpu"),
        "models": SimpleNamespace(MLModel=lambda path, compute_units: made[-1]),
    }
    _stand_in(monkeypatch, "coremltools", **content)
    return made


@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_core_ml_is_checked_on_macos(shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _coremltools(monkeypatch, shift)
    monkeypatch.setattr(coreml, "sys", SimpleNamespace(platform="darwin"))
    if shift:
        with pytest.raises(ExportError, match="disagrees with the model"):
            exporters.export(Conv(), tmp_path / "m.mlmodel", unchecked=True, **SETTINGS)
        assert not list(tmp_path.iterdir())
    else:
        report = exporters.export(Conv(), tmp_path / "m.mlmodel", **SETTINGS)
        assert (report.format, report.bytes) == ("coreml", len(b"network"))
        assert report.max_difference is not None and report.max_difference < 1e-6
        assert json.loads(made[0].user_defined_metadata["classes"]) == ["a", "b", "c"]


def test_core_ml_elsewhere_is_written_unchecked_alone(learnt: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _coremltools(monkeypatch)
    monkeypatch.setattr(coreml, "sys", SimpleNamespace(platform="linux"))
    path = tmp_path / "m.mlmodel"
    with pytest.raises(ExportError, match=r"only on macOS.*Nothing was written.*unchecked=True"):
        learnt.export(path, progress=False)
    with pytest.raises(ExportError, match="'onnx' does not take 'unchecked'; pass format='coreml'"):
        learnt.export(tmp_path / "m.onnx", unchecked=True, progress=False)
    assert not list(tmp_path.iterdir())
    assert learnt.export(path, unchecked=True, progress=False).max_difference is None
    learnt.save(tmp_path / "m.safetensors")
    command = ["export", str(tmp_path / "m.safetensors"), str(path), "--unchecked"]
    shown = CliRunner().invoke(main, command, catch_exceptions=False).stdout
    assert "not compared with the model" in shown and path.read_bytes() == b"network"


@pytest.mark.slow
def test_a_real_core_ml_file_holds_names_image_and_probabilities(tmp_path: Path) -> None:
    reason = "pip install 'edge-dfcil[coreml]'"
    coremltools = pytest.importorskip("coremltools", reason=reason)
    exporters.export(Conv(), tmp_path / "m.mlmodel", unchecked=True, **SETTINGS)
    spec = coremltools.proto.Model_pb2.Model.FromString((tmp_path / "m.mlmodel").read_bytes())
    assert list(spec.neuralNetworkClassifier.stringClassLabels.vector) == ["a", "b", "c"]
    image, outputs = spec.description.input[0], {output.name for output in spec.description.output}
    assert (image.name, image.type.imageType.width, image.type.imageType.height) == ("image", 16, 16)
    assert outputs == {"probabilities", "class"}
    assert json.loads(spec.description.metadata.userDefined["classes"]) == ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["executorch", "litert"])
def test_a_real_file_answers_as_the_model_and_holds_the_names(format: str, tmp_path: Path) -> None:
    reason = f"pip install 'edge-dfcil[{format}]' in an environment of its own"
    if format == "litert":
        pytest.importorskip("litert_torch", reason=reason)
        form: Any = litert
        reader = importlib.import_module("ai_edge_litert.interpreter")
    else:
        pytest.importorskip("executorch.exir", reason=reason)
        form, reader = executorch, importlib.import_module("executorch.runtime")
    path, images = tmp_path / "m", np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16)).astype(np.uint8)
    classifier = Conv().to(memory_format=torch.channels_last)  # as learning leaves it
    report = exporters.export(classifier, path, format=format, **SETTINGS)
    content = path.read_bytes()
    answer = form.run(content, reader)
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(images)).softmax(1).numpy()
    assert report.max_difference is not None and report.max_difference < 1e-4
    assert np.abs(np.concatenate([answer(images[index : index + 1]) for index in range(3)]) - expected).max() < 1e-4
    assert b'\\"c\\"' in content and b"image_size" in content, "the names are in the file"
