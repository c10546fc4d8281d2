"""From a classifier to files that ship, and a runtime for them without torch.

Knows nothing of learning. The distribution edge-dfcil-runtime has `OnnxClassifier` and what it needs: numpy and onnxruntime.
The distribution edge-dfcil adds the formats, which need torch, in files of its own. Names are imported when they are first used.
Importing this package switches off the telemetry of ONNX Runtime for the process, see `exporters.telemetry`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from exporters import telemetry
from exporters.errors import DataError, EdgeDfcilError, ExportError, SettingError
from exporters.predictions import Prediction

telemetry.switch_off()

if TYPE_CHECKING:
    from exporters.checks import max_difference
    from exporters.int8 import Int8
    from exporters.onnx import export_onnx
    from exporters.registry import (
        About,
        Artifact,
        ExportReport,
        check_target,
        export,
        find_exporter,
        list_exporters,
        register_exporter,
    )
    from exporters.runtime import OnnxClassifier

_REGISTRY = "About Artifact ExportReport check_target export find_exporter list_exporters register_exporter"
# The modules of edge-dfcil, with the names that they define. edge-dfcil-runtime has none of them.
_WITH_TORCH = {
    "exporters.checks": "max_difference",
    "exporters.int8": "Int8",
    "exporters.onnx": "export_onnx",
    "exporters.registry": _REGISTRY,
}
_HOME = {name: home for home, names in _WITH_TORCH.items() for name in names.split()} | {"OnnxClassifier": "exporters.runtime"}

__all__ = ["DataError", "EdgeDfcilError", "ExportError", "OnnxClassifier", "Prediction", "SettingError"]
if importlib.util.find_spec("exporters.registry") is not None:
    __all__ += [
        "About",
        "Artifact",
        "ExportReport",
        "Int8",
        "check_target",
        "export",
        "export_onnx",
        "find_exporter",
        "list_exporters",
        "max_difference",
        "register_exporter",
    ]


def __getattr__(name: str) -> Any:
    if f"exporters.{name}" in _WITH_TORCH:
        return _module(f"exporters.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return getattr(_module(_HOME[name]), name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ExportError(
            f"{name} is not installed: it needs torch, and edge-dfcil-runtime, which is installed, answers without; "
            "pip install edge-dfcil"
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
