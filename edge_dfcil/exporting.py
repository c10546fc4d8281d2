"""From a learner to a file that ships: what `Learner.export` does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_dfcil import devices
from edge_dfcil._version import __version__
from edge_dfcil.dreaming.work import Dreaming
from edge_dfcil.errors import DataError, ExportError
from edge_dfcil.model import labels
from edge_dfcil.model.inputs import read
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.model import Model
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import StageReport
from edge_dfcil.training.augment import augment
from edge_dfcil.training.session import PlainWork, Session
from edge_dfcil.training.stage import Stage
from exporters import ExportReport, Int8, export_onnx

MIN_CALIBRATION = 1024  # generated images for an INT8 export, at least: half to calibrate on, half to check
# Real images reach further than generated ones. Chosen on training images of a resnet32 (the answers of 1.0, 1.1, 1.25 and 1.5
# times the range agreed with the float ones for 96.3, 98.5, 98.9 and 98.8 %).
WIDENING = 1.25


class Exporting(PlainWork):
    """The work of a session that writes a classifier as ONNX with its preprocessing, checked against the model.

    Parameters
    ----------
    quantize
        None for floats; "int8" for a static quantization (QDQ, a scale a channel), calibrated on generated images and checked
        on others. It takes a quarter of the space, and generating images takes its time.
    calibration
        A loader, as for `learn_task`, to calibrate on instead. Nothing of it is kept.
    evaluation
        A loader of known classes, on which the INT8 file is checked as well; the report has both accuracies.
    classes
        Names by target value for `evaluation`; None takes its data set's.

    Raises `ExportError` when the file cannot be made or disagrees with the model; nothing is written then.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        path: str | Path,
        quantize: str | None = None,
        *,
        seed: int = 0,
        calibration: Any | None = None,
        evaluation: Any | None = None,
        classes: Classes | None = None,
    ) -> None:
        if quantize not in (None, "int8"):
            raise ExportError(f"quantize={quantize!r} is no form of quantization; pass None or 'int8'")
        if quantize is None and (calibration is not None or evaluation is not None):
            raise ExportError("calibration and evaluation are for quantize='int8'; a float file is checked without them")
        model.check_answering()
        if not Path(path).parent.is_dir():
            raise ExportError(f"{Path(path).parent} is not a folder; make it first")
        self._model, self._recipe, self._path, self._seed = model, recipe, path, seed
        self._quantize, self._calibration, self._evaluation, self._classes = quantize, calibration, evaluation, classes
        count = max(MIN_CALIBRATION, 8 * len(model.classes))
        self._dreaming = Dreaming(model, recipe, count, None, "fast") if quantize else None

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        if self._dreaming is not None:
            yield from self._dreaming.stages(session)

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> ExportReport:
        model, int8 = self._model, None
        if self._dreaming is not None:
            dreams = self._dreaming.finish(session, reports)
            int8 = _int8(model, self._recipe, dreams, self._seed, self._calibration, self._evaluation, self._classes)
        return export_onnx(
            copy.deepcopy(model.network).cpu(),
            self._path,
            classes=model.classes,
            image_size=model.image_size,
            source_sha256=model.digest(),
            version=__version__,
            int8=int8,
        )


def _int8(
    model: Model,
    recipe: Recipe,
    dreams: Tensor,
    seed: int,
    calibration: Any | None,
    evaluation: Any | None,
    classes: Classes | None,
) -> Int8:
    """Images to quantize with: generated ones, half to calibrate on and half to check, and what was given besides."""
    pictures = _pictures(model, calibration)[0] if calibration is not None else None
    checks, targets = {}, {}
    if evaluation is not None:
        checks["pictures"], found = _pictures(model, evaluation)
        outputs = labels.outputs_of(labels.name_targets(set(found), evaluation, classes), model.classes)
        targets["pictures"] = np.array([outputs[target] for target in found])
    # In turns, so that both halves have every class: generated images come sorted.
    checks["dreams"] = dreams[1::2].numpy()
    if pictures is not None:
        return Int8(pictures, checks, targets)
    return Int8(_varied(dreams[::2], recipe, seed), checks, targets, widening=WIDENING)


def _varied(images: Tensor, recipe: Recipe, seed: int) -> Any:
    """Generated images (N, 3, S, S), uint8, each twice, with the brightness, contrast and place of real images in training.

    They have the mean and the spread of real activations, but not their tails, and ranges are made of those.
    """
    with devices.seeded(seed, torch.device("cpu")):
        varied = augment(torch.cat([images, images]).float() / 255, recipe)
    return (255 * varied).round().to(torch.uint8).contiguous().numpy()


def _pictures(model: Model, loader: Any) -> tuple[Any, list[Any]]:
    """All images of a loader as an app feeds them to the file (N, 3, S, S), uint8, and their targets."""
    chunks, targets = [], []
    for images, found in read(loader):
        chunks.append((255 * model.network.pixels(images)).round().to(torch.uint8).cpu().numpy())
        targets += found
    if not targets:
        raise DataError("the loader gave no image")
    return np.concatenate(chunks), targets
