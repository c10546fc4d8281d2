"""Data sets as the benchmarks read them: an .npz of uint8 arrays, torchvision's CIFAR-100, or folders of pictures."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edge_dfcil.errors import DataError
from edge_dfcil.model.pictures import open_folder

DATASETS = ("cifar100", "tiny_imagenet_50", "sign_digits", "folder")
PARTS = ("train", "test")


@dataclass(frozen=True)
class Part:
    """Some classes of a data set as a re-iterable of batches of uint8 images (N, 3, S, S) and targets (N,)."""

    images: Tensor
    targets: Tensor
    batch_size: int
    shuffle: bool

    def few(self, n: int | Mapping[int, int], seed: int) -> Part:
        """At most `n` images of each class (`n[target]` if `n` is a mapping), drawn with a seed."""
        draw = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(self.targets), generator=draw)
        most = {target: n if isinstance(n, int) else n[target] for target in self.targets.unique().tolist()}
        chosen = [shuffled[self.targets[shuffled] == target][: most[target]] for target in most]
        index = torch.cat(chosen).sort().values
        return Part(self.images[index], self.targets[index], self.batch_size, self.shuffle)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))
        for index in order.split(self.batch_size):
            yield self.images[index], self.targets[index]


@dataclass(frozen=True)
class Data:
    """`train_x` (N, S, S, 3) uint8, `train_y` (N,), `test_x`, `test_y` and `class_names`; how they were packed, if so."""

    arrays: dict[str, np.ndarray]
    packed: str | None = None

    @property
    def names(self) -> list[str]:
        return [str(name) for name in self.arrays["class_names"]]

    def part(self, which: str, classes: Sequence[int], batch_size: int) -> Part:
        """The `which` ("train" or "test") images of some classes; training images come shuffled."""
        y = self.arrays[f"{which}_y"]
        chosen = np.isin(y, classes)
        images = torch.from_numpy(self.arrays[f"{which}_x"][chosen].transpose(0, 3, 1, 2).copy())
        return Part(images, torch.from_numpy(y[chosen].astype(np.int64)), batch_size, shuffle=which == "train")


def load(path: Path, dataset: str = "cifar100", image_size: int = 32) -> Data:
    """Reads a data set from disk.

    Parameters
    ----------
    path
        An .npz with the arrays of `Data` or made by `pack`; a folder with `DATASET.npz` in it; the folder that contains
        torchvision's `cifar-100-python`; or a folder with `train` and `test`, each with a folder of pictures for each class.
    image_size
        For folders of pictures: the side to which they are scaled and cropped.

    Raises `DataError` that says what was expected.
    """
    if path.is_file():
        return _npz(path)
    if (path / f"{dataset}.npz").is_file():
        return _npz(path / f"{dataset}.npz")
    if dataset == "cifar100" and (path / "cifar-100-python").is_dir():
        return _torchvision(path)
    for folder in (path / dataset, path):
        if all((folder / part).is_dir() for part in PARTS):
            return _folders(folder, image_size)
    raise DataError(
        f"{path} contains no {dataset}.npz, no folder of torchvision's CIFAR-100 and no folders train/ and test/ with a folder "
        "of pictures for each class"
    )


def _npz(path: Path) -> Data:
    with np.load(path) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    packed = str(found.pop("packed")) if "packed" in found else None
    for part in PARTS:
        if f"{part}_sheet" in found:
            n = len(found[f"{part}_y"])
            found[f"{part}_x"] = _cut(found.pop(f"{part}_sheet"), n)
    missing = {"train_x", "train_y", "test_x", "test_y", "class_names"} - set(found)
    if missing:
        raise DataError(f"{path} lacks {', '.join(sorted(missing))}")
    return Data(found, packed)


def _torchvision(path: Path) -> Data:
    from torchvision.datasets import CIFAR100

    arrays: dict[str, np.ndarray] = {}
    for part in PARTS:
        found = CIFAR100(str(path), train=part == "train")
        arrays |= {f"{part}_x": found.data, f"{part}_y": np.array(found.targets), "class_names": np.array(found.classes)}
    return Data(arrays)


def _folders(path: Path, image_size: int) -> Data:
    arrays: dict[str, np.ndarray] = {}
    names: list[str] | None = None
    for part in PARTS:
        loader = open_folder(path / part, image_size, batch_size=256, shuffle=False).loader
        found: list[str] = cast(Any, loader.dataset).classes
        if names is not None and found != names:
            raise DataError(f"{path / part} contains other classes than {path / PARTS[0]}")
        names = found
        batches = list(loader)
        arrays[f"{part}_x"] = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy()
        arrays[f"{part}_y"] = torch.cat([targets for _, targets in batches]).numpy()
    return Data(arrays | {"class_names": np.array(names)})


def class_order(n: int, run: int) -> list[int]:
    """The published class order of a run: Python's `random` seeded with its number (ABD's protocol)."""
    order = list(range(n))
    random.Random(run).shuffle(order)
    return order


# Packing: CIFAR-100 is 184 MB of pixels, and 92 MB with the best lossless coding that we know. To fit into a limit such as
# 60 MiB, training images become JPEG without chroma subsampling, whose 8x8 blocks stay inside a 32x32 image; test images stay
# exact.

COLUMNS = 100  # images per row of a sheet


def pack(data: Data, path: Path, limit: int) -> str:
    """Writes `data` to an .npz of at most `limit` bytes, at the best JPEG quality that fits, and says how.

    Raises `DataError` if none fits.
    """
    test = _sheet(data.arrays["test_x"], "WEBP", lossless=True)
    rest = {name: data.arrays[name] for name in ("train_y", "test_y", "class_names")} | {"test_sheet": test}
    for quality in range(98, 40, -3):
        train = _sheet(data.arrays["train_x"], "JPEG", quality=quality, subsampling=0)
        if train.nbytes + sum(array.nbytes for array in rest.values()) + 4096 <= limit:
            packed = f"training images as JPEG of quality {quality} (4:4:4), test images without loss"
            rest |= {"train_sheet": train, "packed": np.array(packed)}
            np.savez(path, allow_pickle=False, **rest)
            return packed
    raise DataError(f"the data does not fit into {limit} bytes at any JPEG quality that is good enough to learn from")


def _sheet(images: np.ndarray, form: str, **settings: object) -> np.ndarray:
    """Images (N, S, S, 3) as coded sheets of a thousand images each, one after the other, with their lengths in front."""
    size, coded = images.shape[1], []
    for begin in range(0, len(images), COLUMNS * 10):
        part = images[begin : begin + COLUMNS * 10]
        rows = math.ceil(len(part) / COLUMNS)
        tiles = np.zeros((rows * COLUMNS, size, size, 3), np.uint8)
        tiles[: len(part)] = part
        sheet = tiles.reshape(rows, COLUMNS, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(rows * size, COLUMNS * size, 3)
        file = io.BytesIO()
        Image.fromarray(sheet).save(file, form, **settings)
        coded.append(np.frombuffer(file.getvalue(), np.uint8))
    head = np.array([size, len(coded), *map(len, coded)], np.int64)
    return np.concatenate([head.view(np.uint8), *coded])


def _cut(sheets: np.ndarray, n: int) -> np.ndarray:
    """The images of `_sheet` again, (n, S, S, 3)."""
    size, count = sheets[:16].view(np.int64)
    lengths = sheets[16 : 16 + 8 * count].view(np.int64)
    images, at = [], 16 + 8 * int(count)
    for length in lengths:
        sheet = np.asarray(Image.open(io.BytesIO(sheets[at : at + length].tobytes())).convert("RGB"))
        rows = sheet.shape[0] // size
        images.append(sheet.reshape(rows, size, COLUMNS, size, 3).transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3))
        at += int(length)
    return np.concatenate(images)[:n]
