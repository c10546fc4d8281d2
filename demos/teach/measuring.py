"""Accuracy after every commit, on ready pictures of the server that are never used for learning."""

from __future__ import annotations

import random
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from edge_dfcil import DataError, Model


class Measured:
    """Counts of right answers by class, after each commit.

    Only classes that were taught from ready pictures are measured: no picture of the page's own classes is held back.

    Parameters
    ----------
    test
        Held-back pictures by the name under which they are ready: uint8 images (N, 3, S, S).

    Attributes
    ----------
    taught
        Names of the ready classes of the task that is being learnt; they are measured from its first commit on.
    history
        `{"label": what happened, "right": {class: (right, pictures)}}`, in order.
    """

    def __init__(self, test: Mapping[str, Tensor]) -> None:
        self._test = test
        self._sources: dict[str, str] = {}  # by the class's current name: the name of its ready pictures
        self.taught: tuple[str, ...] = ()
        self.history: list[dict[str, Any]] = []

    @property
    def has_samples(self) -> bool:
        return bool(self._sources)

    def measure(self, model: Model, label: str) -> None:
        """Adds an entry to the history, unless there are no pictures to measure with."""
        self._sources |= {name: name for name in self.taught if name in self._test and name in model.classes}
        self.taught = ()
        if not self._sources:
            return
        batches = [
            (images, torch.full((len(images),), place))
            for place, source in enumerate(self._sources.values())
            for images in self._test[source].split(64)
        ]
        found = model.evaluate(batches, list(self._sources))
        counts = {name: row for name, row in zip(found.classes, found.confusion, strict=True) if name in self._sources}
        right = {name: (row[found.classes.index(name)], sum(row)) for name, row in counts.items()}
        self.history = [*self.history, {"label": label, "right": right}]

    def forget(self, name: str) -> None:
        self._sources.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        self._sources = {new if name == old else name: source for name, source in self._sources.items()}
        self.history = [
            {**entry, "right": {new if name == old else name: count for name, count in entry["right"].items()}}
            for entry in self.history
        ]

    def sample(self) -> tuple[str, bytes]:
        """The name of a measured class, and a held-back picture of it, as PNG. Raises `DataError` if there is none."""
        if not self._sources:
            raise DataError("no picture of a known class was held back; drop one of your own")
        name, source = random.choice(list(self._sources.items()))
        images = self._test[source]
        file = BytesIO()
        Image.fromarray(images[random.randrange(len(images))].permute(1, 2, 0).numpy()).save(file, "PNG")
        return name, file.getvalue()
