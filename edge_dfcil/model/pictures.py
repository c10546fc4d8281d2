"""Pictures on disk, one folder per class or single files, as batches of uint8 images."""

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

# Folders that systems and tools create, in lower or upper case. Names that begin with a dot are also treated as hidden.
_SYSTEM_FOLDERS = {
    *("__macosx", "@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found"),
    *("system volume information", "__pycache__"),
}
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


def to_image(picture: Image.Image, size: int) -> Tensor:
    """An RGB picture as a uint8 image (3, size, size)."""
    return fit(T.pil_to_tensor(picture), size)


def read_pictures(paths: Sequence[str | Path], size: int) -> Tensor:
    """Pictures as uint8 images (N, 3, size, size). Raises `DataError` that names the first unreadable one."""
    images = [to_image(read_picture(path), size) for path in paths]
    return torch.stack(images) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)


@dataclass(frozen=True)
class PictureBatch:
    """A part of many pictures, as far as they are readable.

    Attributes
    ----------
    paths
        Paths of the pictures that were read.
    images
        Those pictures (N, 3, S, S), uint8.
    failed
        Paths of the others, each with the reason.
    """

    paths: tuple[Path, ...]
    images: Tensor
    failed: tuple[tuple[Path, str], ...]


def read_each(paths: Iterable[str | Path], size: int, at_once: int = 64) -> Iterator[PictureBatch]:
    """Reads pictures as uint8 images (N, 3, size, size), `at_once` files at a time; unreadable ones are skipped.

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
    """A folder of pictures, with one subfolder per class.

    Attributes
    ----------
    loader
        Batches of uint8 images (N, 3, S, S) and targets; `loader.dataset.classes` names the classes.
    skipped
        Paths of pictures that cannot be read, and of pictures outside the class folders.
    reasons
        The reason by path.
    """

    loader: DataLoader[Any]
    skipped: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures of classes, read on access.

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
    """Opens a folder that contains one folder per class. Every picture is decoded once, to find damaged ones immediately.

    Pictures may be in subfolders of a class's folder. Picture files are recognised by their extension, or by content if they
    have none. Other files, hidden folders and files, and folders that systems and tools create are ignored. A link to a folder
    is followed once, if it leads out of `path`.

    Raises `DataError` when there is no such folder, no class in it, a class without a readable picture, folders that are
    splits rather than classes, or, if `strict`, a picture that cannot be read. Raises `ClassError` for folders whose
    names are invalid as class names.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{shown(path)} is not a folder; it must be a folder with a folder of pictures for each class")
    try:
        folders, loose = _class_folders(path)
        check_names([folder.name for folder in folders], "a class folder")
        homes = [Path(os.path.realpath(folder)) for folder in (path, *folders)]
        _check_distinct(folders, homes[1:])
        files = [_picture_files(folder, homes) for folder in folders]
    except OSError as error:
        raise DataError(f"a folder cannot be read ({error}); check its permissions") from error
    reasons = {str(file): "it is not in a class folder" for file in loose}
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


# Finding folders and files


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def _class_folders(path: Path) -> tuple[list[Path], list[Path]]:
    """The class folders, sorted, and the pictures next to them. Raises `DataError` when there is no class folder."""
    entries = [path / name for name in sorted(os.listdir(path)) if not _is_hidden(name)]
    folders = [entry for entry in entries if os.path.isdir(entry) and not _leads_up(entry, path)]
    loose = [entry for entry in entries if not os.path.isdir(entry) and is_picture_name(entry.name)]
    if not folders:
        hint = f"; it contains {len(loose)} pictures itself: sort them into folders, one for each class" if loose else ""
        raise DataError(f"{shown(path)} must contain a folder of pictures for each class, and it contains no folder{hint}")
    splits = [folder.name for folder in folders if folder.name.lower() in _SPLITS and _holds_folders(folder)]
    if len(splits) >= 2:
        raise DataError(
            f"{shown(path)} contains {' and '.join(splits)}, which look like the parts of a data set and not like classes; "
            f"name one of them, for example {shown(path / splits[0])}"
        )
    return folders, loose


def _leads_up(folder: Path, root: Path) -> bool:
    """Whether it is a link to the picture folder, or to one above it: its pictures are already those of the classes."""
    place, home = Path(os.path.realpath(folder)), Path(os.path.realpath(root))
    return place == home or place in home.parents


def _holds_folders(folder: Path) -> bool:
    return any(os.path.isdir(folder / name) and not _is_hidden(name) for name in os.listdir(folder))


def _check_distinct(folders: Sequence[Path], places: Sequence[Path]) -> None:
    """Raises `DataError` when a link makes a class folder, or a part of it, part of another class too."""
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
        f"{shown(first)} and {shown(second)} share pictures by a link, so these would have two class names; remove the link"
    )


def _picture_files(folder: Path, homes: Sequence[Path]) -> list[str]:
    """The pictures in a class folder and its subfolders, in the order of their folders and names.

    `homes` are the resolved paths of the picture folder and of every class folder. A link to, into or above one of them would
    count pictures twice, or for another class.
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
        f"{shown(path)} must contain a folder of pictures for each class, and there is no readable picture for {names}"
        f"{note}; add some, or remove the folder"
    )
