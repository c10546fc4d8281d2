"""Formats other than ONNX, one file each, which registers itself. Its extra is imported when the format is used."""
