"""Formats beside ONNX: they say what to install, and what is written answers as the model does."""

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

import exporters
from edge_dfcil import ExportError
from exporters.formats import executorch, litert
from tests.conftest import Conv

SETTINGS: dict[str, Any] = {"classes": ["a", "b", "c"], "image_size": 16}


@pytest.mark.parametrize(
    ("ending", "module", "extra"), [(".tflite", "litert_torch", "litert"), (".pte", "executorch.exir", "executorch")]
)
def test_a_format_without_its_extra_names_the_command(
    ending: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # cannot be imported
    with pytest.raises(ExportError, match=rf"needs {module}, .* pip install 'edge-dfcil\[{extra}\]'"):
        exporters.export(Conv(), tmp_path / f"m{ending}", **SETTINGS)
    assert not list(tmp_path.iterdir())


def _stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


class Method:
    """An ExecuTorch program as its runtime gives it, of torch's own exported program."""

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
        assert (report.format, report.bytes) == ("executorch", len(b"program")) and report.max_difference < 1e-6
        assert json.loads(seen["about"]["classes"]) == ["a", "b", "c"]


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
    assert report.max_difference < 1e-4
    assert np.abs(np.concatenate([answer(images[index : index + 1]) for index in range(3)]) - expected).max() < 1e-4
    assert b'\\"c\\"' in content and b"image_size" in content, "the names are in the file"
