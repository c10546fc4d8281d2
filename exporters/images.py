"""Converts the inputs of `OnnxClassifier` to uint8 squares: all that `Learner.predict` takes, without torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.errors import DataError
from exporters.resize import fit

Batch = npt.NDArray[np.uint8]
KEYS = ("image", "images", "pixel_values", "img")  # of the images in a dict
LARGEST_IMAGE = 4096  # side in pixels of what a network sees; one image would take 200 MB as floats
DEEPEST = 8  # levels of nested lists that are searched for a number
EXPECTED = "(N, 3, H, W), (3, H, W), channels last, or one channel"


def batches(images: Any, side: int, at_once: int) -> Iterator[Batch]:
    """Images of any size as batches (n, 3, side, side) of uint8 with n up to 2 `at_once`, in order.

    Raises a `DataError` that names the unusable image by its index from 0.
    """
    waiting: list[Batch] = []
    for some in _pieces(images):
        for start in range(0, len(some), at_once):
            waiting.append(_squares(some[start : start + at_once], side))
            if sum(map(len, waiting)) >= at_once:
                yield np.concatenate(waiting)
                waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _pieces(images: Any) -> Iterator[npt.NDArray[Any]]:
    """The images as checked arrays (n, 3, H, W); images that were passed as one array stay together."""
    if isinstance(images, Mapping):
        images = _entry(images, "images")
    if _is_single(images) or _is_number(images):
        yield _array(images, "images")
        return
    if isinstance(images, (bytes, Set)) or not isinstance(images, Iterable):
        raise DataError(
            f"images: got a {type(images).__name__}; pass an array, a tensor, a PIL image, a path, a list of them, or a loader"
        )
    listed = isinstance(images, (list, tuple))
    for number, item in enumerate(images):
        where = f"image {number}" if listed else f"batch {number}"
        if isinstance(item, Mapping):
            item = _entry(item, where)
        elif isinstance(item, (list, tuple)) and item:
            item = item[0]  # a loader's (images, targets)
        for part in item if isinstance(item, (list, tuple)) else (item,):
            yield _array(part, where)


def _entry(item: Mapping[Any, Any], where: str) -> Any:
    for key in KEYS:
        if key in item:
            return item[key]
    raise DataError(f"{where}: got a dict with the keys {sorted(map(str, item))}; one of {', '.join(KEYS)} was expected")


def _is_single(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike)) or _is_pillow(item) or hasattr(item, "__array__")


def _is_number(item: Any) -> bool:
    """Whether it is a number, or nested lists of them."""
    for _ in range(DEEPEST):  # a list may contain itself
        if isinstance(item, (list, tuple)) and item:
            item = item[0]
    return isinstance(item, (int, float))


def _is_pillow(item: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # if it is not imported, there is no PIL image
    return pillow is not None and isinstance(item, pillow.Image)


def _array(item: Any, where: str) -> npt.NDArray[Any]:
    if isinstance(item, (str, os.PathLike)) or _is_pillow(item):
        return _checked(_picture(item, where), where)
    try:
        if hasattr(item, "detach"):  # a tensor, whose library need not be loaded here
            item = item.detach().cpu()
            item = item if str(item.dtype) != "torch.bfloat16" else item.float()
        array = np.asarray(item)
    except Exception as error:  # whatever an array type of another library raises
        raise DataError(f"{where}: this {type(item).__name__} is not an array of pixels ({error})") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: got a {type(item).__name__}; pass an array of pixels of one size")
    return _checked(array, where)


def _picture(item: Any, where: str) -> npt.NDArray[np.uint8]:
    try:
        from exporters.decoding import read_picture, to_rgb
    except ImportError as error:
        raise DataError(f"{where}: a picture needs Pillow ({error}); pip install pillow, or pass an array") from error
    try:
        return np.asarray(to_rgb(item) if _is_pillow(item) else read_picture(item))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # a PIL image that was closed, or whose file is damaged
        raise DataError(f"{where}: the picture cannot be read ({error})") from error


def _checked(array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """The array as (n, 3, H, W)."""
    shape: Sequence[int] = array.shape
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or not {array.shape[1], array.shape[3]} & {1, 3} or 0 in array.shape[1:]:
        raise DataError(f"{where}: the shape is {tuple(shape)}; {EXPECTED} was expected, with at least one pixel")
    for channels in (3, 1):
        if array.shape[1] == channels:
            break
        if array.shape[3] == channels:
            array = array.transpose(0, 3, 1, 2)
            break
    _check_values(array, where)
    return np.broadcast_to(array, (len(array), 3, *array.shape[2:]))


def _check_values(array: npt.NDArray[Any], where: str) -> None:
    if array.dtype == np.uint8:
        return
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"{where}: the dtype is {array.dtype}; pass uint8, or float in [0, 1]")
    if array.size and not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):
        raise DataError(
            f"{where}: pixels range from {array.min():.3g} to {array.max():.3g}; floats must be in [0, 1], not normalised, "
            "because the file normalises them itself"
        )


def _squares(images: npt.NDArray[Any], side: int) -> Batch:
    if images.dtype == np.uint8:
        return fit(images, side)
    found = fit(images.astype(np.float32), side)
    return np.rint(found.clip(0, 1) * 255).astype(np.uint8)
