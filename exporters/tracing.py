"""What the formats share: the network as they write it, their extras, and one export at a time."""

from __future__ import annotations

import contextlib
import importlib
import json
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.checks import Run
from exporters.errors import ExportError
from exporters.registry import About

if TYPE_CHECKING:
    from torch import nn

RESIZE = "short side to image_size, antialiased bilinear; centre square"

# torch traces with global state, and `warnings` keeps its filters for the whole process.
_TRACING = threading.Lock()


@contextlib.contextmanager
def tracing(name: str) -> Iterator[None]:
    """For a conversion to the format of that name: what the conversion raises becomes an `ExportError`."""
    try:
        with _TRACING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # converters raise many kinds; the message is the useful part
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"torch could not write this network as {name}: {reason}") from error


def serving(classifier: nn.Module) -> nn.Module:
    """The classifier with a softmax at its end: uint8 images (N, 3, S, S) to probabilities (N, C)."""
    import torch

    class Serving(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = classifier

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.classifier(images).softmax(1)

    return Serving().eval()


def metadata(about: About, form: str) -> dict[str, str]:
    """The metadata of a file, by key."""
    return {
        "format": form,
        "image_size": str(about.image_size),
        "resize": RESIZE,
        "input": "fixed",
        "classes": json.dumps(about.classes),
        "source_sha256": about.source_sha256,
        "version": about.version,
        "temperature": repr(about.temperature),
        "thresholds": json.dumps(about.thresholds),
    }


def needed(module: str, extra: str) -> Any:
    """A module of an extra. Raises an `ExportError` with the command to install it, if it cannot be imported."""
    try:
        with _TRACING, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise ExportError(
            f"this format needs {module}, which cannot be imported here ({error}): pip install 'edge-dfcil[{extra}]' in an "
            "environment of its own, since it may need another version of torch; the model file can be exported there"
        ) from error


def one_by_one(answer: Run) -> Run:
    """Extends a function for one image (1, 3, S, S) to several (N, 3, S, S)."""
    return lambda images: np.concatenate([answer(images[index : index + 1]) for index in range(len(images))])
