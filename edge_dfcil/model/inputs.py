"""Inputs of the public calls: images, targets and loaders, checked and read batch by batch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from edge_dfcil.errors import DataError, EdgeDfcilError
from edge_dfcil.model.labels import plain_value
from edge_dfcil.model.pictures import to_image
from edge_dfcil.model.preprocessing import fit
from exporters.decoding import read_picture, to_rgb

AT_ONCE = 256  # images of a batch that `as_images` yields, at most
IMAGE_KEYS = ("image", "images", "pixel_values", "img")
TARGET_KEYS = ("label", "labels", "target", "targets")
_DEAD_WORKER = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")


# Images


def check_images(images: Any, where: str = "images") -> Tensor:
    """Images as a dense tensor (N, 3, H, W), uint8 or float in [0, 1], on their device; float64 becomes float32.

    Raises `DataError` that says what was passed instead.
    """
    images = _dense(_tensor(images, where), where)
    shape = tuple(images.shape)
    if images.dim() != 4 or shape[1] != 3:
        raise DataError(f"{where}: the shape is {shape}; (N, 3, H, W) was expected{_shape_hint(shape)}")
    if 0 in shape[2:]:
        raise DataError(f"{where}: the shape is {shape}; images need at least one pixel")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        hint = "; for whole numbers from 0 to 255, use images.to(torch.uint8)" if "int" in str(images.dtype) else ""
        raise DataError(f"{where}: the dtype is {images.dtype}; pass uint8, or float in [0, 1]{hint}")
    if images.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        images = images.float()  # an accelerator may have no float64, and networks are float32
    if images.numel():
        _check_range(images, where)
    return images


def _tensor(images: Any, where: str) -> Tensor:
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, (Tensor, np.ndarray)) for image in images):
        images = _stacked([_tensor(image, where) for image in images], where)
    if not isinstance(images, (Tensor, str, bytes)) and hasattr(images, "__array__"):
        images = _from_array(np.asarray(images), where)
    if not isinstance(images, Tensor):
        raise DataError(f"{where}: got a {type(images).__name__}; pass a tensor or array of shape (N, 3, H, W)")
    return images


def _stacked(images: Sequence[Tensor], where: str) -> Tensor:
    if any(image.is_nested for image in images):
        raise DataError(f"{where}: got a list of nested tensors; a batch needs one size, so resize the images in the data set")
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise DataError(
            f"{where}: got a list of images of different shapes, such as {shapes[0]} and {shapes[1]}; a batch needs one "
            "size, so resize them in the data set"
        )
    try:
        return torch.stack(list(images))
    except (RuntimeError, TypeError) as error:
        raise DataError(f"{where}: the images of a list cannot be stacked ({error})") from error


def _from_array(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: got an array of dtype {array.dtype}; pass uint8, or float in [0, 1]")
    if array.dtype == np.longdouble:
        array = array.astype(np.float32)
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _dense(images: Tensor, where: str) -> Tensor:
    images = images.detach()
    if images.is_meta:
        raise DataError(f"{where}: got a tensor on the meta device, which has no pixels")
    if images.is_nested:
        raise DataError(f"{where}: got a nested tensor; pass a list of images, or images of one size")
    if images.is_quantized:
        images = images.dequantize()
    return images.to_dense() if images.layout != torch.strided else images


def _shape_hint(shape: tuple[int, ...]) -> str:
    if len(shape) == 4 and shape[3] == 3:
        return "; the channels are last: use images.permute(0, 3, 1, 2)"
    if len(shape) == 4 and shape[1] == 1:
        return "; grey images need three channels, for example images.expand(-1, 3, -1, -1)"
    if len(shape) == 4 and 4 in (shape[1], shape[3]):
        return "; the fourth channel is transparency: blend the images onto a background, and remove it"
    if len(shape) == 3 and shape[0] == 3:
        return "; a single image needs a batch dimension, images[None]"
    if len(shape) == 3:
        return "; a single image needs a batch dimension, and grey images need three channels"
    return ""


def _check_range(images: Tensor, where: str) -> None:
    low, high = (float(bound) for bound in images.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError(f"{where}: a pixel is NaN or infinite; check how the images are read")
    if low < -1e-3:
        raise DataError(
            f"{where}: pixels range from {low:.3g} to {high:.3g}, as after normalisation; pass images in [0, 1] without "
            "normalisation, because the learner normalises them itself"
        )
    if high > 1 + 1e-3:
        raise DataError(f"{where}: pixels reach {high:.4g}; floats must be in [0, 1]: divide by 255, or pass uint8")


# Targets


def check_targets(targets: Any, n: int, where: str) -> list[Any]:
    """Targets as a list of `n` plain integers or names.

    Accepts tensors and arrays (N,) of whole numbers or bools, lists of numbers, of 0-dimensional tensors or of names, and a
    single value for one image. Raises `DataError` that says what was passed and what to do.
    """
    if isinstance(targets, Tensor):
        if targets.is_meta:
            raise DataError(f"{where}: got targets on the meta device, which have no values")
        _check_target_shape(tuple(targets.shape), str(targets.dtype), n, where)
        targets = targets.detach().to_dense().tolist() if targets.layout != torch.strided else targets.tolist()
    elif not isinstance(targets, (str, bytes, int, float, list, tuple)) and hasattr(targets, "__array__"):
        array = np.asarray(targets)
        _check_target_shape(array.shape, str(array.dtype), n, where)
        targets = array.tolist()
    if isinstance(targets, (int, str)) and n == 1:
        targets = [targets]
    if not isinstance(targets, Sequence) or isinstance(targets, (str, bytes)):
        raise DataError(f"{where}: got targets of type {type(targets).__name__}; pass one integer per image, (N,)")
    if len(targets) != n:
        raise DataError(f"{where}: got {n} images with {len(targets)} targets; each image needs one")
    return [_plain_target(target, number, where) for number, target in enumerate(targets)]


def _check_target_shape(shape: tuple[int, ...], dtype: str, n: int, where: str) -> None:
    hint = None
    if len(shape) == 0 and n != 1:
        hint = "one value for all images is not enough"
    elif len(shape) == 2 and shape[1] == 1:
        hint = "targets.squeeze(1) removes the second dimension"
    elif len(shape) == 2:
        hint = "if they are one-hot or probabilities, targets.argmax(1) converts them"
    elif len(shape) > 2:
        hint = "masks and boxes are not targets of a classifier, which gives one class per image"
    elif "float" in dtype:
        hint = "if they are whole numbers, targets.long() converts them"
    elif "complex" in dtype:
        hint = "complex numbers are not classes"
    if hint is not None:
        raise DataError(f"{where}: got targets of shape {shape} and dtype {dtype}; pass one integer per image, (N,): {hint}")


def _plain_target(target: Any, number: int, where: str) -> int | str:
    value = plain_value(target)
    if isinstance(value, (int, str)):
        return str(value) if isinstance(value, str) else int(value)
    length = len(value) if isinstance(value, (list, tuple, Tensor, np.ndarray)) else 0
    if isinstance(value, float):
        hint = "int(target) converts it to a whole number"
    elif isinstance(value, bytes):
        hint = "target.decode() converts it to a string"
    elif length == 1:
        hint = "target[0] takes it out of its list (squeeze)"
    elif length > 1:
        hint = "if it is one-hot or probabilities, the index of the largest (argmax) is the class"
    else:
        hint = "check what the data set gives"
    raise DataError(f"{where}: the target of image {number} is {_brief(target)}; pass one integer or name per image: {hint}")


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}... (a {type(value).__name__})"


# Loaders


def read(loader: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """One pass over a loader: checked images and targets, batch by batch.

    A batch is a pair (images, targets), whose further parts are ignored, or a mapping with one of `IMAGE_KEYS` and one of
    `TARGET_KEYS`.
    """
    for number, batch in enumerate(_batches(loader), start=1):
        where = f"batch {number}"
        if isinstance(batch, Mapping):
            images, targets = _entry(batch, IMAGE_KEYS, where), _entry(batch, TARGET_KEYS, where)
        elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
            images, targets = batch[0], batch[1]
        else:
            raise DataError(
                f"{where}: got a {type(batch).__name__}; each batch must be a pair (images, targets), or a dict of "
                "'image' and 'label'"
            )
        if isinstance(loader, Dataset) and (isinstance(images, Image.Image) or getattr(images, "ndim", 4) == 3):
            raise DataError(
                f"a {type(loader).__name__} is a data set, which gives one image at a time; pass a loader of batches: "
                "DataLoader(dataset, batch_size=32, shuffle=True), with images of one size as tensors"
            )
        images = check_images(images, where)
        yield images, check_targets(targets, len(images), where)


def _batches(loader: Any) -> Iterator[Any]:
    """The batches of a loader. Its own exceptions, such as for a corrupt file, pass unchanged, with a note from Python 3.11 on.

    Raises `DataError` when one of its worker processes died, which torch reports only in the message.
    """
    try:
        batches = iter(loader)
    except TypeError as error:
        raise DataError(
            f"loader={loader!a:.80} is a {type(loader).__name__}, which cannot be iterated over; pass a DataLoader or a list of "
            "(images, targets)"
        ) from error
    for number in itertools.count(1):
        try:
            batch = next(batches)
        except StopIteration:
            return
        except EdgeDfcilError:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and _DEAD_WORKER.search(str(error)):
                raise DataError(
                    f"a worker process of the loader died at batch {number} ({error}); the model is unchanged. It may have run "
                    "out of memory: use fewer workers, or num_workers=0, which shows an error of the data set itself"
                ) from error
            if hasattr(error, "add_note"):
                error.add_note(f"the loader raised this at batch {number}; the model is unchanged")
            raise
        yield batch


def _entry(batch: Mapping[Any, Any], keys: Sequence[str], where: str) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    raise DataError(f"{where}: got a dict with the keys {', '.join(map(str, batch))}; one of {', '.join(keys)} was expected")


# Images of any kind


def as_images(images: Any, size: int) -> Iterator[Tensor]:
    """Checked batches (n, 3, H, W), uint8 or float in [0, 1], of at most `AT_ONCE` images, in order.

    Parameters
    ----------
    images
        - a tensor or array: a batch (N, 3, H, W), (N, H, W, 3), (N, 1, H, W) or (N, H, W, 1), or one image (3, H, W),
          (H, W, 3), (1, H, W), (H, W, 1) or (H, W). An ambiguous shape is read as channels first; one channel is grey.
        - a PIL image or the path of a picture;
        - a list or tuple of any of these, of any sizes;
        - a batch of a loader as a dict, with one of `IMAGE_KEYS`;
        - a loader, or anything else that can be iterated over and yields images or batches: tensors, pairs whose first part
          is the images, or dicts.
    size
        Side in pixels of the square to which single images are scaled and cropped; those of a batch keep their size.

    Raises `DataError` that names the unusable image by its index from 0.
    """
    group: list[Tensor] = []
    for piece in _pieces(images, size):
        if isinstance(piece, _Batch):
            yield from _flushed(group)
            yield from piece.images.split(AT_ONCE)
            continue
        if group and (len(group) == AT_ONCE or piece.dtype != group[0].dtype or piece.device != group[0].device):
            yield from _flushed(group)
        group.append(piece)
    yield from _flushed(group)


class _Batch:
    """Images that were passed as one tensor (N, 3, H, W), in contrast to single ones."""

    def __init__(self, images: Tensor) -> None:
        self.images = images


def _flushed(group: list[Tensor]) -> Iterator[Tensor]:
    if group:
        yield torch.stack(group)
        group.clear()


def _pieces(images: Any, size: int) -> Iterator[Tensor | _Batch]:
    """Each image, fitted, or each batch."""
    if isinstance(images, Mapping):
        images = _entry(images, IMAGE_KEYS, "images")
    if isinstance(images, _SINGLE) or _is_array(images):
        yield _piece(images, size, "images")
        return
    if images is None or isinstance(images, (bytes, int, float, Set)):
        raise DataError(
            f"images: got a {type(images).__name__}; pass a tensor, an array, a PIL image, a path, a list of them, or a loader"
        )
    listed = isinstance(images, (list, tuple))
    for number, item in enumerate(images if listed else _batches(images)):
        where = f"image {number}" if listed else f"batch {number}"
        if isinstance(item, Mapping):
            item = _entry(item, IMAGE_KEYS, where)
        elif isinstance(item, (list, tuple)) and item:
            item = item[0]  # a loader's (images, targets)
        if isinstance(item, (list, tuple)):
            yield from (_piece(part, size, f"{where}, part {place}") for place, part in enumerate(item))
        else:
            yield _piece(item, size, where)


_SINGLE = (str, os.PathLike, Image.Image)


def _is_array(images: Any) -> bool:
    """Whether it is an array of pixels, not of paths or other objects."""
    return isinstance(images, Tensor) or (hasattr(images, "__array__") and np.asarray(images).dtype.kind not in "OU")


def _piece(item: Any, size: int, where: str) -> Tensor | _Batch:
    if isinstance(item, _SINGLE):
        return to_image(_picture(item, where), size)
    images = _channels_first(_dense(_tensor(item, where), where), where)
    if images.dim() == 4:
        return _Batch(check_images(images, where))
    return fit(check_images(images[None], where)[0], size)


def _picture(item: Any, where: str) -> Image.Image:
    try:
        return to_rgb(item) if isinstance(item, Image.Image) else read_picture(item)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # a PIL image that was closed, or whose file is damaged
        raise DataError(f"{where}: the picture cannot be read ({error})") from error


def _channels_first(images: Tensor, where: str) -> Tensor:
    """(3, H, W) or (N, 3, H, W) from one of these, from (H, W), or from channels last; a grey channel is repeated."""
    if images.dim() == 2:
        images = images[None]
    if images.dim() not in (3, 4) or not {images.shape[-3], images.shape[-1]} & {1, 3}:
        hint = {1: "; it looks like targets: pass the images alone", 3: "; grey images of a batch are (N, 1, H, W)"}
        raise DataError(
            f"{where}: the shape is {tuple(images.shape)}; (N, 3, H, W), (3, H, W), channels last or one channel were expected"
            + (hint.get(images.dim(), "") or _shape_hint(tuple(images.shape)))
        )
    for channels in (3, 1):
        if images.shape[-3] == channels:
            break
        if images.shape[-1] == channels:
            images = images.movedim(-1, -3)
            break
    return images.expand(*images.shape[:-3], 3, *images.shape[-2:])
