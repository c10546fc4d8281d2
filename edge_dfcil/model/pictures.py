"""Pictures on disk: a folder a class, or single files, as batches of uint8 images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as T

from edge_dfcil.errors import DataError
from edge_dfcil.model.preprocessing import fit


def read_picture(path: str | Path) -> Image.Image:
    """A picture as RGB, upright as its EXIF says. Raises `DataError` that names a file which is none, or is damaged."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a picture that can be read ({error})") from error


def read_pictures(paths: Sequence[str | Path], size: int) -> Tensor:
    """Pictures as uint8 images (N, 3, size, size). Raises `DataError` that names the first which cannot be read."""
    return torch.stack([_to_image(read_picture(path), size) for path in paths])


@dataclass(frozen=True)
class PictureFolder:
    """A folder of pictures, a folder a class.

    Attributes
    ----------
    loader
        Batches of uint8 images (N, 3, S, S) and targets; its data set names the classes.
    skipped
        Files with the ending of a picture that cannot be read.
    """

    loader: DataLoader[Any]
    skipped: tuple[str, ...]


def open_folder(
    path: str | Path, size: int, *, batch_size: int = 32, shuffle: bool = True, strict: bool = False
) -> PictureFolder:
    """Opens a folder that holds a folder a class. Every picture is decoded once, so that damage is told now.

    Raises `DataError` when there is no such folder, no class in it, a class without a readable picture, or, if
    `strict`, a picture that cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; it should hold a folder of pictures for each class")
    skipped: list[str] = []

    def is_readable(file: str) -> bool:
        if not file.lower().endswith(IMG_EXTENSIONS):
            return False
        try:
            read_picture(file)
        except DataError:
            if strict:
                raise
            skipped.append(file)
            return False
        return True

    try:
        pictures = ImageFolder(
            str(path), lambda picture: _to_image(picture, size), loader=read_picture, is_valid_file=is_readable
        )
    except FileNotFoundError as error:
        note = f"; {len(skipped)} damaged ones were skipped" if skipped else ""
        raise DataError(f"{path} should hold a folder of pictures for each class: {str(error).splitlines()[0]}{note}") from error
    loader: DataLoader[Any] = DataLoader(pictures, batch_size=min(batch_size, len(pictures)), shuffle=shuffle)
    return PictureFolder(loader, tuple(skipped))


def _to_image(picture: Image.Image, size: int) -> Tensor:
    return fit(T.pil_to_tensor(picture), size)
