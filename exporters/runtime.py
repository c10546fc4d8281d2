"""OnnxClassifier: predicts with an exported file, with only numpy and onnxruntime."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters import seals
from exporters.errors import ExportError, SettingError
from exporters.images import LARGEST_IMAGE, batches
from exporters.predictions import Prediction
from exporters.rejection import margins
from exporters.signatures import check_signature
from exporters.telemetry import runtime_library
from exporters.texts import parse_json, problem, shown
from exporters.timing import session
from exporters.values import whole_number

_UNSEALED = "edge-dfcil/1"  # the format of files that have no SHA-256
AT_ONCE = 64  # images that are answered together

# "Unsupported model IR version: 99, max supported IR version: 13"; "... Opset 99 is under development ... is till opset 25."
_TOO_NEW = re.compile(r"(IR version)\D*(\d+)\D+IR version\D*(\d+)|([Oo]pset) (\d+) is under development.*till opset (\d+)", re.S)


# The key, in any encoding of its length, by which ONNX refers to another file for a tensor. Exported files are self-contained.
_ELSEWHERE = re.compile(rb"(?:\n|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)location")


class OnnxClassifier:
    """An exported classifier.

    Raises `ExportError` for a file that is missing, damaged, of another program, or too new for the runtime; `SignatureError`
    for one that the owner of `public_key` has not signed.

    Parameters
    ----------
    path
        A file that `learner.export` or `edge-dfcil export` wrote.
    threads
        CPU threads for one answer; 0 lets ONNX Runtime choose.
    verify
        Whether the file must be exactly as it was exported, by the SHA-256 at its end. Files of earlier versions have none and
        are accepted without it. False is for a file that other tools have changed on purpose.
    public_key
        An Ed25519 key (a PEM file): the file must be signed by its owner, see `exporters.signatures`.

    Attributes
    ----------
    classes
        The class names, in the order of the outputs.
    image_size
        S, the side in pixels of the square that the network sees. Images of other sizes are scaled and cropped to it.
    temperature
        The model's logits are divided by it; the file's probabilities include it.
    thresholds
        Of each class, for `predict(reject=True)`; empty if the model had none.
    sealed
        Whether the SHA-256 of the file was checked.
    """

    def __init__(self, path: str | Path, *, threads: int = 0, verify: bool = True, public_key: str | Path | None = None) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise ExportError(f"path={path!a:.80} is a {type(path).__name__}; pass the path of a file")
        if not os.path.isfile(path):
            raise ExportError(f"{path} is not a file; `edge-dfcil export MODEL {path}` writes one")
        try:
            content = Path(path).read_bytes()  # read once, so that what is checked is what is opened
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
        if public_key is not None:
            check_signature(path, public_key, content=content)
        self.sealed = verify and seals.is_sealed(content)
        if self.sealed and not seals.is_intact(content):
            raise _changed(path, seals.ir_version(content))
        if _ELSEWHERE.search(content):
            raise ExportError(f"{path} reads tensors from other files, which an exported file never does; export it again")
        try:
            self._session = session(content, threads)
        except ExportError:
            raise
        except Exception as error:  # onnxruntime's errors share no public base
            raise _refusal(path, str(error)) from error
        del content
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map  # fails for a text that is not UTF-8
            if verify and not self.sealed and ("sha256" in metadata or metadata.get("format", _UNSEALED) != _UNSEALED):
                raise _changed(path)
            self.classes = _classes(metadata["classes"])
            self.image_size = int(metadata["image_size"])
            self.temperature = float(metadata.get("temperature", 1.0))  # older files have neither
            self.thresholds = _thresholds(metadata.get("thresholds", "[]"), len(self.classes))
            self._check_graph()
        except KeyError as error:
            raise ExportError(f"{path} is an ONNX file, but edge-dfcil did not write it: its metadata has no {error}") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            reason = shown(error)[:300]
            raise ExportError(f"{path} is damaged: its metadata cannot be read ({reason}); export it again") from error

    def _check_graph(self) -> None:
        """Raises `ValueError` unless the graph takes and gives what the metadata says."""
        if not 1 <= self.image_size <= LARGEST_IMAGE or not 0 < self.temperature < math.inf:
            raise ValueError(f"image_size={self.image_size}, temperature={self.temperature}")
        taken, given = self._session.get_inputs(), self._session.get_outputs()
        if [one.name for one in taken] != ["images"] or "probabilities" not in [one.name for one in given]:
            raise ValueError("its graph is not from `images` to `probabilities`")
        shape, (probabilities,) = taken[0].shape, [one.shape for one in given if one.name == "probabilities"]
        sizes = {size for size in shape[2:] if isinstance(size, int)}
        if taken[0].type != "tensor(uint8)" or len(shape) != 4 or shape[1] != 3 or not sizes <= {self.image_size}:
            raise ValueError(f"its graph takes {taken[0].type} of the shape {shape}, for image_size={self.image_size}")
        if len(probabilities) != 2 or probabilities[1] != len(self.classes):
            raise ValueError(f"its graph gives the shape {probabilities}, for {len(self.classes)} classes")

    def probabilities(self, images: Any) -> npt.NDArray[np.float32]:
        """Probabilities (N, C) of N images; `images` as for `predict`."""
        found = [
            self._session.run(["probabilities"], {"images": batch})[0] for batch in batches(images, self.image_size, AT_ONCE)
        ]
        return np.concatenate(found) if found else np.zeros((0, len(self.classes)), np.float32)

    def predict(self, images: Any, top_k: int = 1, reject: bool = False) -> list[Prediction]:
        """Predicts the classes of images as `Learner.predict` does.

        Raises `DataError` for images of another shape, dtype or range, or that cannot be read; `SettingError` for a `top_k`
        below 1, and for `reject` when the file has no thresholds.

        Parameters
        ----------
        images
            Arrays or tensors (N, 3, H, W), (N, H, W, 3), or one image (3, H, W), (H, W, 3), grey ones with one channel: uint8,
            or float in [0, 1]; a PIL image or a path, with Pillow installed; a list of images, which may differ in size; or a
            loader. Whatever the size, the short side is scaled to S and the centre is cropped, as the learner does.
        top_k
            Number of names for each image, 1 or more.
        reject
            Whether the label of an image that belongs to no known class is None.
        """
        most = whole_number("top_k", top_k)
        if reject and not self.thresholds:
            raise SettingError(
                "this file has no thresholds for reject=True; export a model for which predict(images, reject=True) works"
            )
        predictions, probabilities = [], self.probabilities(images)
        known = margins(probabilities, self.thresholds) >= 0 if reject else [True] * len(probabilities)
        for row, is_known in zip(probabilities, known, strict=True):
            best = np.argsort(-row, kind="stable")[:most]
            top = tuple((self.classes[output], float(row[output])) for output in best)
            predictions.append(Prediction(top[0][0] if is_known else None, top[0][1], top))
        return predictions


def _classes(text: str) -> tuple[str, ...]:
    """The class names in a file's metadata. Raises `ValueError` unless they are printable strings without duplicates."""
    names = parse_json(text)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError("its classes are not a list of names")
    for name in names:
        found = next(filter(None, (problem(name, place) for place in range(len(name)))), None)
        if found:
            raise ValueError(f"the class name {name!a} has {found}")
    if len(set(names)) < len(names):
        raise ValueError("it has two classes with the same name")
    return tuple(names)


def _thresholds(text: str, classes: int) -> tuple[float, ...]:
    """The thresholds in a file's metadata. Raises `ValueError` or `TypeError` unless there are none or one per class, finite."""
    values = parse_json(text)
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError("its thresholds are not a list of numbers")
    found = tuple(map(float, values))
    if found and (len(found) != classes or not np.isfinite(found).all()):
        raise ValueError(f"the thresholds are {text}, for {classes} classes")
    return found


def _changed(path: str | Path, ir_version: int | None = None) -> ExportError:
    newer = ""
    if ir_version is not None and ir_version > seals.IR_VERSION:
        newer = f", and its ONNX IR version is {ir_version}, where edge-dfcil writes {seals.IR_VERSION} at most"
    return ExportError(
        f"{path} is not as it was exported: its SHA-256 does not match{newer}. Restore it from a copy or export it again; "
        "OnnxClassifier(path, verify=False) opens a file that you have changed on purpose"
    )


def _refusal(path: str | Path, message: str) -> ExportError:
    version = runtime_library().__version__
    if found := _TOO_NEW.search(message):
        what, has, highest = (group for group in found.groups() if group)
        return ExportError(
            f"{path} has ONNX {what} {has}, and onnxruntime {version}, which is installed here, reads up to {highest}. "
            "Upgrade onnxruntime, or export the model again with this version of edge-dfcil"
        )
    reason = shown((message.splitlines() or [""])[0])[:300]
    return ExportError(f"{path} cannot be read as ONNX ({reason}); export it again")
