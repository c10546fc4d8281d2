"""Formats beside ONNX, a file each, which registers itself. Its extra is imported when the format is asked for."""
