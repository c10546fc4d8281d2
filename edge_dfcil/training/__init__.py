"""Runs stages: the loop, its data, sessions and callbacks. Independent of the methods."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

# Names from when this package was a module, kept for one release.
_MOVED = {
    "Callback": "edge_dfcil.training.callbacks",
    "Stage": "edge_dfcil.training.stage",
    "Terms": "edge_dfcil.training.stage",
    "Task": "edge_dfcil.methods.task",
    "fit": "edge_dfcil.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module 'edge_dfcil.training' has no attribute {name!r}")
    warnings.warn(f"edge_dfcil.training.{name} has moved to {_MOVED[name]}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(_MOVED[name]), name)
