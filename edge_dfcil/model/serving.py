"""The half of `Learner` that forwards calls to the current model, which may be replaced at any time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from edge_dfcil.model.labels import Classes
from edge_dfcil.model.model import Model
from edge_dfcil.model.network import Network
from edge_dfcil.results import Evaluation, Prediction


class Serving:
    """Forwards to the current model. Each call reads it once, so an answer comes from one model even during a commit."""

    _model: Model

    @property
    def model(self) -> Model:
        """The current model: immutable, and sufficient for inference. A committed task replaces it."""
        return self._model

    @property
    def network(self) -> Network:
        """The current network, plain pixels to logits. Do not change it."""
        return self._model.network

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class name learnt, in the order in which they were learnt."""
        return self._model.classes

    @property
    def tasks(self) -> tuple[tuple[str, ...], ...]:
        """The class names that each task added."""
        return self._model.tasks

    @property
    def image_size(self) -> int:
        """The side in pixels of the network's input images."""
        return self._model.image_size

    @property
    def backbone(self) -> str | None:
        """The backbone's registered name; None for a module of the caller."""
        return self._model.backbone

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self._model.device

    def to(self, device: str | torch.device) -> Self:
        """Moves the current model to a device, and returns the learner."""
        self._replace(self._model.to(device))
        return self

    def settings(self) -> dict[str, Any]:
        """The settings in the model file, as JSON values."""
        return self._model.settings()

    def check_answering(self) -> None:
        """Raises `NotLearnedError` before the first task."""
        self._model.check_answering()

    def predict(self, images: Any, top_k: int = 1, reject: bool = False) -> list[Prediction]:
        """The most probable classes of each image; see `Model.predict`."""
        return self._model.predict(images, top_k, reject)

    def probabilities(self, images: Any) -> Tensor:
        """Probabilities (N, C) of the classes; see `Model.probabilities`."""
        return self._model.probabilities(images)

    def embed(self, images: Any) -> Tensor:
        """Features (N, F); see `Model.embed`."""
        return self._model.embed(images)

    def evaluate(self, loader: Any, classes: Classes | None = None) -> Evaluation:
        """Accuracy over a loader; see `Model.evaluate`."""
        return self._model.evaluate(loader, classes)

    def calibrate(self, loader: Any, classes: Classes | None = None, *, false_rejections: float = 0.05) -> None:
        """Finds a temperature and a threshold on images that were not learnt from; see `Model.calibrate`."""
        self._replace(self._model.calibrate(loader, classes, false_rejections=false_rejections))

    def forget(self, names: str | Iterable[str]) -> None:
        """Forgets classes; see `Model.forget`, also for what the weights still contain."""
        self._replace(self._model.forget(names))

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives classes other names, `{old: new}`; see `Model.rename`."""
        self._replace(self._model.rename(names))

    def merge(self, names: Sequence[str], into: str) -> None:
        """Treats several classes as one; see `Model.merge`."""
        self._replace(self._model.merge(names, into))

    def _replace(self, model: Model) -> None:
        """Makes another model the current one."""
        raise NotImplementedError
