"""What a loader may give, checked once and read batch by batch: never more than the batch in flight is held."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_dfcil.errors import DataError
from edge_dfcil.model.inputs import read
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.augment import augment

SMALLEST_STD = 0.02  # per channel; images of one flat colour have none


@dataclass(frozen=True)
class Batch:
    """Real images and their outputs (B,).

    Attributes
    ----------
    source
        Images as they came (B, 3, H, W).
    see
        From those to what the backbone sees; done for a part at a time when a batch is split.
    """

    source: Tensor
    targets: Tensor
    see: Callable[[Tensor], Tensor] = lambda images: images

    @cached_property
    def images(self) -> Tensor:
        """As the backbone sees them, (B, 3, S, S)."""
        return self.see(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.source[part], self.targets[part], self.see)


@dataclass(frozen=True)
class Scan:
    """One pass over a loader: images by target value, the sizes of its batches, and the pixels' statistics.

    `mean` and `std` are per channel, over all pixels of all images in [0, 1]: six numbers for a whole task.
    """

    counts: Mapping[Any, int]
    batch_sizes: Mapping[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def images(self) -> int:
        return sum(self.counts.values())


def scan(loader: Any) -> Scan:
    """Reads every batch once, so that bad input is told before anything is trained.

    Raises `DataError` for a loader that is empty, can be read only once, or whose batches cannot be learnt from.
    """
    if isinstance(loader, Iterator):
        raise DataError(
            f"a {type(loader).__name__} can be read only once, but learning takes several passes; "
            "pass a DataLoader or a list of batches"
        )
    counts: Counter[Any] = Counter()
    sizes: Counter[int] = Counter()
    first, second = np.zeros(3), np.zeros(3)  # moments, each image weighing the same
    for images, targets in read(loader):
        if len(images):
            counts.update(targets)
            sizes[len(images)] += 1
            pixels = images.float() / (255 if images.dtype == torch.uint8 else 1)
            first += pixels.mean((2, 3)).sum(0).cpu().numpy()
            second += pixels.square().mean((2, 3)).sum(0).cpu().numpy()
    if not counts:
        raise DataError("the loader gave no image; a task needs at least two")
    if max(sizes) < 2:
        raise DataError(
            "the loader gives one image at a time, and BatchNorm cannot learn from one image; use "
            "batches of at least 2 images, better 32 or more"
        )
    mean = first / sum(counts.values())
    std = np.sqrt(np.maximum(second / sum(counts.values()) - mean**2, SMALLEST_STD**2))
    return Scan(counts, sizes, tuple(mean.tolist()), tuple(std.tolist()))


class RealBatches:
    """A task's images as the student sees them: augmented, normalised, on the device. One pass is an epoch."""

    def __init__(self, loader: Any, scanned: Scan, outputs: Mapping[Any, int], network: Network, recipe: Recipe) -> None:
        self._loader, self._outputs, self._network, self._recipe = loader, outputs, network, recipe
        # One image alone cannot go through BatchNorm in train mode; the paper drops every incomplete batch.
        self._largest = max(scanned.batch_sizes)
        self._smallest = self._largest if recipe.schedule.drop_incomplete else 2
        self._sizes = sorted((size for size in scanned.batch_sizes if size >= self._smallest), reverse=True)
        self._length = sum(n for size, n in scanned.batch_sizes.items() if size >= self._smallest)

    def __len__(self) -> int:
        return self._length

    @property
    def largest(self) -> int:
        """Images of the largest batch."""
        return self._largest

    def first(self) -> RealBatches:
        """A batch of each size there is, for a rehearsal; all cut from one."""
        few = copy.copy(self)
        batches = ((images, targets) for images, targets in read(self._loader) if len(images) >= self._smallest)
        images, targets = max(itertools.islice(batches, 2), key=lambda batch: len(batch[0]))
        few._loader = [(images[:size], targets[:size]) for size in self._sizes if size <= len(images)]
        few._length = len(few._loader)
        return few

    def __iter__(self) -> Iterator[Batch]:
        yield from self._read(self.see, self._smallest)

    def plain(self) -> Iterator[Batch]:
        """One pass over every image, normalised but not augmented."""
        network = self._network
        return self._read(lambda images: network.normalize(network.pixels(images)), smallest=1)

    def see(self, images: Tensor) -> Tensor:
        """Images of any size as the student sees them in training."""
        return self._network.normalize(augment(self._network.pixels(images), self._recipe))

    def _read(self, see: Callable[[Tensor], Tensor], smallest: int) -> Iterator[Batch]:
        for images, targets in read(self._loader):
            if len(images) < smallest:
                continue
            try:
                outputs = [self._outputs[target] for target in targets]
            except KeyError as error:
                raise DataError(
                    f"target {error.args[0]!r} appeared on a later pass over the loader but not on the first"
                ) from error
            yield Batch(images, torch.tensor(outputs, device=self._network.mean.device), see)
