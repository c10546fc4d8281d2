"""Data sets as the benchmarks read them: an .npz of uint8 arrays."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Some classes of a data set as a re-iterable of batches of uint8 images (N, 3, S, S) and targets (N,)."""

    images: Tensor
    targets: Tensor
    batch_size: int
    shuffle: bool

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        for index in order.split(self.batch_size):
            yield self.images[index], self.targets[index]


@dataclass(frozen=True)
class Data:
    """`train_x` (N, S, S, 3) uint8, `train_y` (N,), `test_x`, `test_y` and `class_names`."""

    arrays: dict[str, np.ndarray]

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.arrays["class_names"]]

    def part(self, which: str, classes: Sequence[int], batch_size: int) -> Part:
        """The `which` ("train" or "test") images of some classes; training images come shuffled."""
        y = self.arrays[f"{which}_y"]
        chosen = np.isin(y, classes)
        images = torch.from_numpy(self.arrays[f"{which}_x"][chosen].transpose(0, 3, 1, 2).copy())
        return Part(images, torch.from_numpy(y[chosen].astype(np.int64)), batch_size, shuffle=which == "train")


def load(path: Path) -> Data:
    """An .npz of the form above, or the folder that holds `cifar100.npz`."""
    path = path / "cifar100.npz" if path.is_dir() else path
    with np.load(path) as arrays:
        return Data({name: arrays[name] for name in ("train_x", "train_y", "test_x", "test_y", "class_names")})


def class_order(n: int, run: int) -> list[int]:
    """The published class order of a run: Python's `random` seeded with its number (ABD's protocol)."""
    order = list(range(n))
    random.Random(run).shuffle(order)
    return order
