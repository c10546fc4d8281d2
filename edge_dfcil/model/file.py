"""The model file: one safetensors file, whose metadata holds the settings as JSON with a schema version and a SHA-256.

Nothing in it can run code, and nothing else is in it: weights, BatchNorm statistics, class names, settings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edge_dfcil.errors import ModelFileError
from exporters.files import replace_file

SCHEMA = 1


def digest(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 over the settings and every tensor's name, dtype, shape and bytes, in order of name."""
    state = hashlib.sha256(_canonical(settings))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def write(path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Path:
    """Writes a model file aside, flushes it and renames it into place.

    Raises `ModelFileError` when it cannot be written; a file that was there before is untouched then.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ModelFileError(f"{path.parent} is not a folder; make it first")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {
        "edge_dfcil": json.dumps({"schema": SCHEMA, "sha256": digest(plain, settings)}),
        "settings": _canonical(settings).decode(),
    }
    try:
        replace_file(path, save(plain, metadata))
    except OSError as error:
        raise ModelFileError(
            f"{path} could not be written: {error.strerror or error}; what was there before is untouched"
        ) from error
    return path


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and settings of a model file whose SHA-256 is right.

    Raises `ModelFileError` for a file that is missing, foreign, damaged or from a later version.
    """
    if not os.path.isfile(path):
        raise ModelFileError(f"{path} is not a file; `learner.save` or `edge-dfcil learn` writes one")
    try:
        with safe_open(os.fspath(path), "pt") as file:
            metadata = file.metadata() or {}
            if "edge_dfcil" not in metadata:
                raise ModelFileError(f"{path} is a safetensors file, but edge-dfcil did not write it")
            about, settings = json.loads(metadata["edge_dfcil"]), json.loads(metadata["settings"])
            written = about["sha256"]
            if about["schema"] < 1:
                raise ModelFileError(f"{path} is damaged: there is no schema {about['schema']}")
            if about["schema"] > SCHEMA:
                raise ModelFileError(
                    f"{path} has schema {about['schema']}; this version reads up to {SCHEMA}. Upgrade edge-dfcil"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ModelFileError(f"{path} is not an edge-dfcil model file, or it is damaged ({error})") from error
    if digest(tensors, settings) != written:
        raise ModelFileError(f"{path} is damaged: its SHA-256 is not the one written. Restore it from a copy")
    return tensors, settings


def _canonical(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
