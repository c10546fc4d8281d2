"""Exports a classifier to files for deployment, and runs them without torch.

It is independent of learning. The distribution edge-dfcil contains all of it. edge-dfcil-runtime, for devices without torch,
contains the same files except those of the formats, which need torch. Names are imported when they are first used.
Importing this package switches off the telemetry of ONNX Runtime for the process, see `exporters.telemetry`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from exporters import telemetry
from exporters._version import __version__
from exporters.errors import DataError, EdgeDfcilError, ExportError, SettingError, SignatureError
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
# Modules that edge-dfcil-runtime does not have, with the names that they define.
_WITH_TORCH = {
    "exporters.checks": "max_difference",
    "exporters.int8": "Int8",
    "exporters.onnx": "export_onnx",
    "exporters.registry": _REGISTRY,
}
_HOME = {name: home for home, names in _WITH_TORCH.items() for name in names.split()} | {"OnnxClassifier": "exporters.runtime"}


def _what_to_install(name: str) -> str:
    return (
        f"{name} is not installed: edge-dfcil-runtime contains only what works without torch; "
        "pip uninstall edge-dfcil-runtime, then pip install edge-dfcil"
    )


class _NotInstalled:
    """If only edge-dfcil-runtime is installed, makes `from exporters.registry import x` say what to install. The last finder."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith("exporters."):
            raise ModuleNotFoundError(_what_to_install(name), name=name)


__all__ = [
    "DataError",
    "EdgeDfcilError",
    "ExportError",
    "OnnxClassifier",
    "Prediction",
    "SettingError",
    "SignatureError",
    "__version__",
]
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
else:
    sys.meta_path.append(_NotInstalled)


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
        raise ExportError(_what_to_install(name)) from error


def __dir__() -> list[str]:
    return sorted(__all__)
