"""A loader's batches, checked once and then read one by one: only the current batch is in memory."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from edge_dfcil.errors import Cancelled, DataError
from edge_dfcil.model.inputs import read
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.augment import augment
from edge_dfcil.training.holding import held_out, without

SMALLEST_STD = 0.02  # per channel; images of one uniform colour have a standard deviation of 0
PASSES = 3  # over the loader, at most, to find out whether a class is always left out or only by chance


@dataclass(frozen=True)
class Batch:
    """Real images and their outputs (B,).

    Attributes
    ----------
    source
        Images as the loader gives them (B, 3, H, W).
    see
        Converts them to what the backbone sees; called for one part at a time when a batch is split.
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
    """One pass over a loader: numbers of images by target value, the sizes of its batches, and the pixels' statistics.

    Attributes
    ----------
    counts
        Number of images by target value.
    batch_sizes
        Number of batches by their number of images.
    mean, std
        Per channel, over all pixels of all images in [0, 1]: six numbers for a whole task.
    counts_by_size
        Number of images by target value, separately for each size of batch.
    """

    counts: Mapping[Any, int]
    batch_sizes: Mapping[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts_by_size: Mapping[int, Mapping[Any, int]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return sum(self.counts.values())


def scan(loader: Any, cancelled: Callable[[], bool] = lambda: False) -> Scan:
    """Reads every batch once, so that bad input is found before anything is trained.

    `cancelled` is called after each batch, because a loader may have no end.

    Raises `DataError` for a loader that is empty, can be read only once, or whose batches cannot be learnt from, and
    `Cancelled`.
    """
    if isinstance(loader, Iterator):
        raise DataError(
            f"a {type(loader).__name__} can be read only once, but learning takes several passes; "
            "pass a DataLoader or a list of batches"
        )
    by_size: defaultdict[int, Counter[Any]] = defaultdict(Counter)
    sizes: Counter[int] = Counter()
    first, second = np.zeros(3), np.zeros(3)  # moments, with equal weight for each image
    for images, targets in read(loader):
        if cancelled():
            raise Cancelled("learning was cancelled while the loader was read for the first time; nothing has changed")
        if len(images):
            by_size[len(images)].update(targets)
            sizes[len(images)] += 1
            pixels = images.float() / (255 if images.dtype == torch.uint8 else 1)
            first += pixels.mean((2, 3)).sum(0).cpu().numpy()
            second += pixels.square().mean((2, 3)).sum(0).cpu().numpy()
    counts = sum(by_size.values(), Counter[Any]())
    if not counts:
        raise DataError("the loader gave no image; a task needs at least two")
    if max(sizes) < 2:
        raise DataError(
            "the loader gives one image at a time, and BatchNorm cannot learn from one image; use "
            "batches of at least 2 images, better 32 or more"
        )
    mean = first / sum(counts.values())
    std = np.sqrt(np.maximum(second / sum(counts.values()) - mean**2, SMALLEST_STD**2))
    return Scan(counts, sizes, tuple(mean.tolist()), tuple(std.tolist()), dict(by_size))


class RealBatches:
    """A task's images as the student sees them: augmented, normalised, on the device. One pass is an epoch.

    Batches too small to learn from are left out: those of one image, and with `schedule.drop_incomplete` all that are smaller
    than the largest. Warns (`UserWarning`) of images that are left out, unless the loader has torch's `RandomSampler`, which
    leaves out others in each epoch.

    Attributes
    ----------
    left_out
        Images that an epoch leaves out. A loader that shuffles leaves out others each time.

    Raises `DataError` when all images of a class are left out; `names` are those of the targets, for its message.
    """

    def __init__(
        self,
        loader: Any,
        scanned: Scan,
        outputs: Mapping[Any, int],
        network: Network,
        recipe: Recipe,
        names: Mapping[Any, str] | None = None,
    ) -> None:
        self._loader, self._outputs, self._network, self._recipe = loader, outputs, network, recipe
        # One image alone cannot go through BatchNorm in train mode; the paper drops every incomplete batch.
        self._largest = max(scanned.batch_sizes)
        self._smallest = self._largest if recipe.schedule.drop_incomplete else 2
        self._sizes = sorted((size for size in scanned.batch_sizes if size >= self._smallest), reverse=True)
        self._augments, self._batches = True, sum(scanned.batch_sizes.values())
        self._held_out = recipe.refine.held_out if recipe.refine.calibrate else 0.0
        few = (outputs[target] for target, count in scanned.counts.items() if count * self._held_out < 1)
        self._few = torch.tensor(sorted(few), dtype=torch.long, device=network.mean.device)  # classes without held-out images
        self._length = sum(n for size, n in scanned.batch_sizes.items() if size >= self._smallest)

        self.left_out = sum(size * n for size, n in scanned.batch_sizes.items() if size < self._smallest)
        if self.left_out:
            self._check_seen(scanned, names or {})
            if not isinstance(getattr(loader, "sampler", None), RandomSampler):
                self._warn_of_left_out(scanned)

    def __len__(self) -> int:
        return self._length

    @property
    def largest(self) -> int:
        """Images of the largest batch."""
        return self._largest

    def first(self) -> RealBatches:
        """One batch of each size, for a rehearsal; all are cut from one batch."""
        few = copy.copy(self)
        batches = ((images, targets) for images, targets in read(self._loader) if len(images) >= self._smallest)
        images, targets = max(itertools.islice(batches, 2), key=lambda batch: len(batch[0]))
        few._loader = [(images[:size], targets[:size]) for size in self._sizes if size <= len(images)]
        few._length = few._batches = len(few._loader)
        return few

    def __iter__(self) -> Iterator[Batch]:
        yield from self._read(self.see, self._smallest)

    def plain(self) -> RealBatches:
        """The same with every image, normalised but not augmented."""
        every = copy.copy(self)
        every._augments, every._smallest, every._length = False, 1, self._batches
        return every

    def held_out(self, batch: Batch) -> Tensor:
        """Which images of a batch of `plain()` are never trained on, (B,) bool on the CPU: a share `refine.held_out` of each
        class, if that is at least one image and the recipe asks for a calibration."""
        return held_out(batch.source, self._held_out) & ~torch.isin(batch.targets, self._few).cpu()

    def see(self, images: Tensor) -> Tensor:
        """Images of any size as the student sees them in training."""
        pixels = self._network.pixels(images)
        return self._network.normalize(augment(pixels, self._recipe) if self._augments else pixels)

    def _check_seen(self, scanned: Scan, names: Mapping[Any, str]) -> None:
        """Raises `DataError` for a class of which no image is learnt from, in this pass or in another one."""

        def unseen(by_size: Mapping[int, Mapping[Any, int]]) -> set[Any]:
            seen = {target for size, counts in by_size.items() if size >= self._smallest for target in counts}
            return {target for counts in by_size.values() for target in counts} - seen

        missing = unseen(scanned.counts_by_size)
        for _ in range(PASSES):  # a loader that shuffles may have left out a small class by chance
            if not missing:
                return
            by_size: defaultdict[int, Counter[Any]] = defaultdict(Counter)
            for images, targets in read(self._loader):
                by_size[len(images)].update(targets)
            missing &= unseen(by_size)
        if missing:
            classes = ", ".join(
                repr(names[target]) if target in names else f"target {target!r}" for target in sorted(missing, key=str)
            )
            raise DataError(f"no image of {classes} would be learnt from: {self._reason()}")

    def _reason(self) -> str:
        if self._smallest > 2:
            return (
                f"they are all in batches of fewer than {self._largest} images, which the recipe leaves out; give the loader "
                "batches of one size, shuffle it, or set schedule.drop_incomplete to False in the recipe"
            )
        return (
            "each of them is alone in a batch, and BatchNorm cannot learn from one image; give the loader batches of another "
            "size, shuffle it, or add images"
        )

    def _warn_of_left_out(self, scanned: Scan) -> None:
        kind = "of one image" if self._smallest == 2 else f"of fewer than {self._largest} images"
        warnings.warn(
            f"{self.left_out} of {scanned.images} images are left out of an epoch, because they are in batches {kind}; unless "
            "the loader shuffles, they are never learnt from; choose a batch size that leaves no such remainder",
            UserWarning,
            stacklevel=3,
        )

    def _read(self, see: Callable[[Tensor], Tensor], smallest: int) -> Iterator[Batch]:
        for images, targets in read(self._loader):
            if len(images) < smallest:
                continue
            try:
                outputs = [self._outputs[target] for target in targets]
            except KeyError as error:
                raise DataError(
                    f"target {error.args[0]!r} appeared on a later pass over the loader but not on the first; "
                    "pass a loader that gives the same targets on every pass"
                ) from error
            batch = Batch(images, torch.tensor(outputs, device=self._network.mean.device), see)
            if self._augments and self._held_out:
                batch = Batch(*without(batch.source, batch.targets, self.held_out(batch)), see)
            yield batch
