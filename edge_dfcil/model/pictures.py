"""Pictures on disk: a folder a class, or single files, as batches of uint8 images."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as T

from edge_dfcil.errors import DataError
from edge_dfcil.model.labels import check_names
from edge_dfcil.model.preprocessing import fit
from exporters.decoding import is_picture_content, is_picture_name, read_picture
from exporters.texts import shown

__all__ = ["PictureBatch", "PictureFolder", "open_folder", "read_each", "read_picture", "read_pictures", "to_image"]

# What systems and tools leave behind, in any case; whatever begins with a dot is hidden besides.
_SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found"),
    *("system volume information", "__pycache__"),
}
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


def to_image(picture: Image.Image, size: int) -> Tensor:
    """An RGB picture as a uint8 image (3, size, size)."""
    return fit(T.pil_to_tensor(picture), size)


def read_pictures(paths: Sequence[str | Path], size: int) -> Tensor:
    """Pictures as uint8 images (N, 3, size, size). Raises `DataError` that names the first which cannot be read."""
    images = [to_image(read_picture(path), size) for path in paths]
    return torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)


@dataclass(frozen=True)
class PictureBatch:
    """Some of many pictures, read as far as they can be.

    Attributes
    ----------
    paths
        Of the pictures that were read.
    images
        Those pictures (N, 3, S, S), uint8.
    failed
        The others, each with the reason.
    """

    paths: tuple[Path, ...]
    images: Tensor
    failed: tuple[tuple[Path, str], ...]


def read_each(paths: Iterable[str | Path], size: int, at_once: int = 64) -> Iterator[PictureBatch]:
    """Reads pictures as uint8 images (N, 3, size, size), `at_once` files at a time; one that cannot be read stops none.

    The batches keep the order of `paths`; one in which no picture could be read has images (0, 3, size, size).
    """
    files = iter(paths)
    while chunk := [Path(path) for path in itertools.islice(files, at_once)]:
        good: list[Path] = []
        images: list[Tensor] = []
        failed: list[tuple[Path, str]] = []
        for path in chunk:
            try:
                images.append(to_image(read_picture(path), size))
                good.append(path)
            except DataError as error:
                failed.append((path, str(error)))
        stacked = torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        yield PictureBatch(tuple(good), stacked, tuple(failed))


@dataclass(frozen=True)
class PictureFolder:
    """A folder of pictures, a folder a class.

    Attributes
    ----------
    loader
        Batches of uint8 images (N, 3, S, S) and targets; `loader.dataset.classes` names the classes.
    skipped
        Pictures that cannot be read, and pictures that lie beside the class folders.
    reasons
        Why, by path.
    """

    loader: DataLoader[Any]
    skipped: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures of classes, read when they are asked for.

    Attributes
    ----------
    classes
        The names of the folders, in order; a target is an index into them.
    samples
        Path and target of each picture.
    """

    def __init__(self, classes: list[str], samples: list[tuple[str, int]], size: int) -> None:
        self.classes, self.samples, self.size = classes, samples, size
        self.class_to_idx = {name: target for target, name in enumerate(classes)}
        self.targets = [target for _, target in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        return to_image(read_picture(path), self.size), target


def open_folder(
    path: str | Path, size: int, *, batch_size: int = 32, shuffle: bool = True, strict: bool = False
) -> PictureFolder:
    """Opens a folder that holds a folder a class. Every picture is decoded once, so that damage is found now.

    Pictures may lie in folders within a class's folder. A file is a picture by its ending (by its content, if it has none).
    Hidden folders and files, and those that systems and tools leave behind, are passed over, and so are files that are no
    pictures. A link to a folder is followed once, if it leads out of `path`.

    Raises `DataError` when there is no such folder, no class in it, a class without a readable picture, folders that are
    splits rather than classes, or, if `strict`, a picture that cannot be read. Raises `ClassError` for folders whose names
    cannot be those of classes.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{shown(path)} is not a folder; it should hold a folder of pictures for each class")
    try:
        folders, loose = _class_folders(path)
        check_names([folder.name for folder in folders], "a class folder")
        homes = [Path(os.path.realpath(folder)) for folder in (path, *folders)]
        _check_distinct(folders, homes[1:])
        files = [_picture_files(folder, homes) for folder in folders]
    except OSError as error:
        raise DataError(f"a folder cannot be looked into ({error}); check its permissions") from error
    reasons = {str(file): "it lies beside the class folders, in none of them" for file in loose}
    samples: list[tuple[str, int]] = []
    empty = []
    for target, folder in enumerate(folders):
        before = len(samples)
        for file in files[target]:
            try:
                read_picture(file)
                samples.append((file, target))
            except DataError as error:
                if strict:
                    raise
                reasons[file] = str(error)
        if len(samples) == before:
            empty.append(folder.name)
    if empty:
        raise DataError(_without_pictures(path, empty, len(reasons) - len(loose)))
    pictures = Pictures([folder.name for folder in folders], samples, size)
    loader: DataLoader[Any] = DataLoader(pictures, batch_size=min(batch_size, len(pictures)), shuffle=shuffle)
    return PictureFolder(loader, tuple(reasons), reasons)


# Looking around


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _class_folders(path: Path) -> tuple[list[Path], list[Path]]:
    """The folders of the classes, sorted, and the pictures beside them. Raises `DataError` when there are none."""
    entries = [path / name for name in sorted(os.listdir(path)) if not _is_hidden(name)]
    folders = [entry for entry in entries if os.path.isdir(entry) and not _leads_up(entry, path)]
    loose = [entry for entry in entries if not os.path.isdir(entry) and is_picture_name(entry.name)]
    if not folders:
        hint = f"; it holds {len(loose)} pictures itself: sort them into folders, one for each class" if loose else ""
        raise DataError(f"{shown(path)} should hold a folder of pictures for each class, and it holds no folder{hint}")
    splits = [folder.name for folder in folders if folder.name.lower() in _SPLITS and _holds_folders(folder)]
    if len(splits) >= 2:
        raise DataError(
            f"{shown(path)} holds {' and '.join(splits)}, which look like the parts of a data set and not like classes; "
            f"name one of them, for example {shown(path / splits[0])}"
        )
    return folders, loose


def _leads_up(folder: Path, root: Path) -> bool:
    """Whether it is a link to the picture folder, or to one above: its pictures are those of the classes."""
    place, home = Path(os.path.realpath(folder)), Path(os.path.realpath(root))
    return place == home or place in home.parents


def _holds_folders(folder: Path) -> bool:
    return any(os.path.isdir(folder / name) and not _is_hidden(name) for name in os.listdir(folder))


def _check_distinct(folders: Sequence[Path], places: Sequence[Path]) -> None:
    """Raises `DataError` when a link makes a class's folder, or a part of it, another class's as well."""
    owners: dict[Path, Path] = {}
    for folder, place in zip(folders, places, strict=True):
        other = owners.setdefault(place, folder)
        if other is not folder:
            _refuse_shared(other, folder)
    for folder, place in zip(folders, places, strict=True):
        for above in place.parents:
            if above in owners:
                _refuse_shared(owners[above], folder)


def _refuse_shared(first: Path, second: Path) -> NoReturn:
    raise DataError(
        f"{shown(first)} and {shown(second)} share pictures by a link, so that these would have two names; remove the link"
    )


def _picture_files(folder: Path, homes: Sequence[Path]) -> list[str]:
    """The pictures in a class's folder and in those within it, in the order of their folders and names.

    `homes` are the real places of the picture folder and of every class's folder. A link to one of them, into one or above
    one would count pictures twice, or as another class's.
    """
    seen: set[str] = set()
    found: list[tuple[str, str]] = []

    def is_elsewhere(place: Path) -> bool:
        return not any(place == home or place in home.parents or home in place.parents for home in homes)

    def walk(here: str) -> None:
        seen.add(os.path.realpath(here))
        links = []
        for name in sorted(os.listdir(here)):
            entry = os.path.join(here, name)
            if _is_hidden(name):
                continue
            if not os.path.isdir(entry):
                if is_picture_name(name) or ("." not in name and is_picture_content(entry)):
                    found.append((here, name))
            elif os.path.islink(entry):
                links.append(entry)
            else:
                walk(entry)
        for link in links:
            place = os.path.realpath(link)
            if place not in seen and is_elsewhere(Path(place)):
                walk(link)

    walk(str(folder))
    return [os.path.join(*file) for file in sorted(found)]


def _without_pictures(path: Path, empty: Sequence[str], damaged: int) -> str:
    names = ", ".join(empty)
    note = f"; {damaged} pictures that cannot be read were skipped" if damaged else ""
    return (
        f"{shown(path)} should hold a folder of pictures for each class, and there is no picture that can be read for {names}"
        f"{note}; add some, or remove the folder"
    )
