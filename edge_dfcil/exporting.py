"""From a learner to a file that ships: what `Learner.export` does."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

import exporters
from edge_dfcil import devices
from edge_dfcil._version import __version__
from edge_dfcil.dreaming.inversion import Pool
from edge_dfcil.dreaming.work import Dreaming
from edge_dfcil.errors import DataError, ExportError
from edge_dfcil.model import labels
from edge_dfcil.model.inputs import read
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.model import Model
from edge_dfcil.model.preprocessing import fit
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import MemoryPlan, StageReport
from edge_dfcil.training.augment import augment
from edge_dfcil.training.rehearsal import Rehearsal
from edge_dfcil.training.session import PlainWork, Session
from edge_dfcil.training.stage import Stage
from exporters import ExportReport, Int8, registry
from exporters.onnx import check_input
from exporters.values import is_one_of

BATCH = 32  # images in memory together
MIN_CALIBRATION = 1024  # generated images for an INT8 export, at least: half to calibrate on, half to check
# Factor for the ranges: activations of real images exceed those of generated ones. Chosen on training images of a resnet32 (with
# 1.0, 1.1, 1.25 and 1.5 times the range, 96.3, 98.5, 98.9 and 98.8 % of the answers agreed with the float model).
WIDENING = 1.25


class ExportOptions(TypedDict, total=False):
    """The keywords that `Learner.export` takes for `Exporting`."""

    input: str
    format: str | None
    source: str | Path | None
    calibration: Any | None
    evaluation: Any | None
    classes: Classes | None
    force: bool
    unchecked: bool


class Exporting(PlainWork):
    """The work of a session that writes a classifier as ONNX with its preprocessing, checked against the model.

    Raises `ExportError` when the file cannot be made or disagrees with the model; nothing is written then.

    Parameters
    ----------
    path, format
        The file to write, and its format: "onnx" or another registered one; None chooses by the ending of the path.
    source
        The file of the model, which must not be overwritten.
    quantize
        None for floats; "int8" for static quantization (QDQ, per-channel weights), calibrated on generated images and checked
        on others. The file is a quarter of the size; generating images takes time.
    input
        For ONNX files: "fixed" takes squares of `image_size` pixels, which the app scales and crops. "any" takes images of every
        size, and scales and crops them in the graph as `predict` does; it is checked with images of many sizes.
    calibration
        A loader, as for `learn_task`, to calibrate on instead of generated images. Nothing of it is kept.
    evaluation
        A loader of known classes, on which the INT8 file is checked as well: it may lose one point of accuracy. The report has
        both accuracies.
    classes
        Names by target value for `evaluation`; None takes those of its data set.
    force
        Whether an INT8 file is written even if it is not faster than floats on this machine.
    unchecked
        Whether a file is written even if it cannot be compared with the model on this machine: Core ML outside macOS.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        path: str | Path,
        quantize: str | None = None,
        *,
        input: str = "fixed",
        format: str | None = None,
        source: str | Path | None = None,
        seed: int = 0,
        calibration: Any | None = None,
        evaluation: Any | None = None,
        classes: Classes | None = None,
        force: bool = False,
        unchecked: bool = False,
    ) -> None:
        if quantize is not None and not is_one_of(quantize, ("int8",)):
            raise ExportError(f"quantize={quantize!a:.80} is not a form of quantization; pass None or 'int8'")
        if quantize is None and (calibration is not None or evaluation is not None):
            raise ExportError("calibration and evaluation are for quantize='int8'; a float file is checked without them")
        if quantize is None and force:
            raise ExportError("force is for quantize='int8': it writes a file that is not faster than floats")
        check_input(input)
        model.check_answering()
        registry.find_exporter(path, format).check_options(
            [*(["int8"] if quantize else []), *(["input"] if input != "fixed" else []), *(["unchecked"] if unchecked else [])]
        )
        registry.check_target(path, source)
        self._model, self._recipe, self._path, self._format, self._source = model, recipe, path, format, source
        self._input = input
        self._force, self._unchecked = force, unchecked
        self._seed, self._calibration, self._evaluation, self._classes = seed, calibration, evaluation, classes
        count = max(MIN_CALIBRATION, 8 * len(model.classes))
        self._dreaming = Dreaming(model, recipe, count, None, "fast") if quantize else None

    def prepare(self, session: Session[Any]) -> None:
        for name, loader in (("calibration", self._calibration), ("evaluation", self._evaluation)):
            with devices.seeded(None, session.device):  # a loader that shuffles draws random numbers
                if loader is not None and next(read(loader), None) is None:
                    raise DataError(f"the loader for the {name} gave no image; pass one with images, or none at all")

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        if self._dreaming is not None:
            yield from self._dreaming.stages(session)

    # For the planner

    def smaller(self) -> Sequence[dict[str, int]]:
        return [{}] if self._dreaming is None else self._dreaming.smaller()

    def rehearsal(self, changes: Mapping[str, int]) -> Rehearsal:
        return super().rehearsal(changes) if self._dreaming is None else self._dreaming.rehearsal(changes)

    def keep_to(self, plan: MemoryPlan) -> None:
        if self._dreaming is not None:
            self._dreaming.keep_to(plan)

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> ExportReport:
        model, options = self._model, dict[str, Any]()
        if self._dreaming is not None:
            options = {"int8": self._int8(self._dreaming.pool), "on_batch": lambda done, total: session.check()}
        # Options are passed only if they are set, because other formats do not have them.
        if self._input != "fixed":
            options |= {"input": self._input, "fit": lambda images, size: fit(torch.from_numpy(images), size).numpy()}
        if self._unchecked:
            options["unchecked"] = True
        return exporters.export(
            Merged(model).cpu().eval(),
            self._path,
            format=self._format,
            classes=model.classes,
            image_size=model.image_size,
            temperature=model.temperature,
            thresholds=model.thresholds,
            source=self._source,
            source_sha256=model.digest(),
            version=__version__,
            **options,
        )

    def _int8(self, pool: Pool) -> Int8:
        """Images for the quantization: generated ones, half to calibrate on and half to check with, and those of the caller. All
        are read batch by batch."""
        model, checks, targets = self._model, dict[str, Any](), dict[str, Any]()
        if self._evaluation is not None:
            found = [target for _, batch in read(self._evaluation) for target in batch]
            targets["pictures"] = np.array(labels.outputs_of_targets(found, self._evaluation, self._classes, model.classes))
            checks["pictures"] = Pictures(model, self._evaluation)
        # Alternately, so that both halves have every class.
        order = pool.labels.argsort(stable=True)
        checks["dreams"] = Generated(model, pool, order[1::2])
        if self._calibration is not None:
            return Int8(Pictures(model, self._calibration), checks, targets, force=self._force)
        varied = Generated(model, pool, order[::2], views=2, recipe=self._recipe, seed=self._seed)
        return Int8(varied, checks, targets, widening=WIDENING, force=self._force)


class Merged(nn.Module):
    """A model's network with one output per class: uint8 images (N, 3, S, S) to logits (N, C), whose softmax gives the
    probabilities at the model's temperature."""

    groups: Tensor | None

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self.temperature = copy.deepcopy(model.network), model.temperature
        self.register_buffer("groups", model.groups, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.groups is None:
            return logits
        return (logits.softmax(1) @ self.groups).clamp_min(torch.finfo(logits.dtype).tiny).log()


class Generated:
    """Generated images (n, 3, S, S), uint8, batch by batch: `views` of each image, which are augmented as real images are in
    training if a recipe is given.

    Activations of generated images have the mean and the spread of real ones, but not their tails, which determine the ranges.
    """

    def __init__(
        self, model: Model, pool: Pool, order: Tensor, views: int = 1, recipe: Recipe | None = None, seed: int = 0
    ) -> None:
        self._model, self._pool, self._order, self._views = model, pool, order, views
        self._recipe, self._seed = recipe, seed

    def __len__(self) -> int:
        return self._views * len(self._order)

    def __iter__(self) -> Iterator[Any]:
        for view in range(self._views):
            for number, index in enumerate(self._order.split(BATCH)):
                images = self._model.network.denormalize(self._pool[index].images).cpu()
                if self._recipe is not None:
                    with devices.seeded(self._seed + 1000 * view + number, torch.device("cpu")):
                        images = (255 * augment(images.float() / 255, self._recipe)).round().to(torch.uint8)
                yield images.contiguous().numpy()


class Pictures:
    """The images of a loader as an app feeds them to the file (n, 3, S, S), uint8, batch by batch."""

    def __init__(self, model: Model, loader: Any) -> None:
        self._network, self._loader = model.network, loader

    def __iter__(self) -> Iterator[Any]:
        for images, _ in read(self._loader):
            yield (255 * self._network.pixels(images)).round().to(torch.uint8).cpu().contiguous().numpy()
