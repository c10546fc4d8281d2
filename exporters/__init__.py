"""From a classifier to files that ship, and a runtime for them without torch.

Knows nothing of learning. `OnnxClassifier` needs numpy and onnxruntime alone; `export_onnx` imports torch when called.
"""

from exporters.int8 import Int8
from exporters.onnx import ExportReport, export_onnx
from exporters.runtime import OnnxClassifier

__all__ = ["ExportReport", "Int8", "OnnxClassifier", "export_onnx"]
