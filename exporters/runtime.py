"""OnnxClassifier: answers from an exported file, with numpy and onnxruntime alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dfcil.errors import DataError, ExportError, SettingError
from edge_dfcil.results import Prediction
from exporters.timing import session


class OnnxClassifier:
    """An exported classifier.

    Parameters
    ----------
    path
        A file that `learner.export` or `edge-dfcil export` wrote.
    threads
        CPU threads for one answer; 0 lets ONNX Runtime choose.

    Attributes
    ----------
    classes
        The class names, in the order of the outputs.
    image_size
        The side in pixels of the images it takes.

    Raises `ExportError` for a file that is missing, damaged or from elsewhere.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        if not os.path.isfile(path):
            raise ExportError(f"{path} is not a file; `edge-dfcil export MODEL {path}` writes one")
        try:
            self._session = session(os.fspath(path), threads)
            metadata = self._session.get_modelmeta().custom_metadata_map
            self.classes: tuple[str, ...] = tuple(json.loads(metadata["classes"]))
            self.image_size = int(metadata["image_size"])
        except KeyError as error:
            raise ExportError(f"{path} is an ONNX file, but edge-dfcil did not write it: its metadata has no {error}") from error
        except Exception as error:  # onnxruntime's errors share no public base
            raise ExportError(f"{path} cannot be read as ONNX ({str(error).splitlines()[0]}); export it again") from error

    def probabilities(self, images: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Probabilities (N, C) of images (N, 3, S, S), uint8 or float in [0, 1]."""
        answer: npt.NDArray[np.float32] = self._session.run(["probabilities"], {"images": self._check(images)})[0]
        return answer

    def predict(self, images: npt.ArrayLike, top_k: int = 1) -> list[Prediction]:
        """Names images (N, 3, S, S), uint8 or float in [0, 1]; answers as `Learner.predict` does.

        Raises `DataError` for images of another shape, size, dtype or range.
        """
        if top_k < 1:
            raise SettingError(f"top_k={top_k}; it must be 1 or more")
        predictions = []
        for row in self.probabilities(images):
            best = np.argsort(-row, kind="stable")[:top_k]
            top = tuple((self.classes[output], float(row[output])) for output in best)
            predictions.append(Prediction(top[0][0], top[0][1], top))
        return predictions

    def _check(self, images: Any) -> npt.NDArray[np.uint8]:
        array, side = np.asarray(images), self.image_size
        if array.ndim != 4 or array.shape[1:] != (3, side, side):
            raise DataError(
                f"the images have shape {array.shape}; this classifier takes (N, 3, {side}, {side}): resize them first"
            )
        if array.dtype == np.uint8:
            return array
        if not np.issubdtype(array.dtype, np.floating):
            raise DataError(f"the images have dtype {array.dtype}; pass uint8, or float in [0, 1]")
        if array.size and not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
            raise DataError(
                f"pixels reach from {array.min():.3g} to {array.max():.3g}; floats must lie in [0, 1], not normalised, "
                "because the file normalises by itself"
            )
        return (array.clip(0, 1) * 255).round().astype(np.uint8)
