"""From a classifier to files that ship, and a runtime for them without torch.

Knows nothing of learning. `OnnxClassifier` needs numpy and onnxruntime alone; `export` imports torch when called. Importing
this package switches off the telemetry of ONNX Runtime for the process, see `exporters.telemetry`.
"""

from exporters import telemetry

telemetry.switch_off()

from exporters.checks import max_difference  # noqa: E402  telemetry first
from exporters.int8 import Int8  # noqa: E402
from exporters.onnx import export_onnx  # noqa: E402
from exporters.registry import (  # noqa: E402
    About,
    Artifact,
    ExportReport,
    check_target,
    export,
    find_exporter,
    list_exporters,
    register_exporter,
)
from exporters.runtime import OnnxClassifier  # noqa: E402

__all__ = [
    "About",
    "Artifact",
    "ExportReport",
    "Int8",
    "OnnxClassifier",
    "check_target",
    "export",
    "export_onnx",
    "find_exporter",
    "list_exporters",
    "max_difference",
    "register_exporter",
]
