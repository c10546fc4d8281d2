"""Telemetry of the libraries below, switched off before they are loaded.

ONNX Runtime's wheels from 1.27 on may write a device id and a queue of events for its vendor into the user's cache folder as
soon as they are imported; huggingface_hub, which timm loads weights with, may report its use. Both read environment variables.
The variables are set when `exporters` is imported, unless the user has set them, and stay set, so that processes started later
inherit them. The other dependencies have no telemetry (their sources were searched in 2026).
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from exporters.errors import ExportError

VARIABLES = {"onnxruntime": "ORT_DISABLE_TELEMETRY", "huggingface_hub": "HF_HUB_DISABLE_TELEMETRY"}

logger = logging.getLogger("edge_dfcil")


def switch_off() -> None:
    """Sets the variables that are not set. Warns in the log when a library was imported before them, which is too late."""
    for library, variable in VARIABLES.items():
        if variable not in os.environ:
            os.environ[variable] = "1"
            if library in sys.modules:
                logger.warning(
                    "%s was imported before edge_dfcil and may have recorded telemetry; set %s=1 before the program starts",
                    library,
                    variable,
                )


def runtime_library() -> Any:
    """The module `onnxruntime` with its telemetry off; every import of it in this package goes through here.

    Raises `ExportError` if it is not installed.
    """
    switch_off()
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"ONNX Runtime cannot be loaded ({error}); pip install onnxruntime") from error
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime
