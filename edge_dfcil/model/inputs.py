"""What the public calls accept: images, targets and loaders, checked and read batch by batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_dfcil.errors import DataError, EdgeDfcilError


def check_images(images: Any, where: str = "images") -> Tensor:
    """Images as a tensor (N, 3, H, W), uint8 or float in [0, 1]. Raises `DataError` that says what came instead."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise DataError(f"{where}: a {type(images).__name__} came; pass a tensor or array of shape (N, 3, H, W)")
    shape = tuple(images.shape)
    if images.dim() != 4 or shape[1] != 3:
        hint = ""
        if images.dim() == 4 and shape[3] == 3:
            hint = "; the channels come last, permute(0, 3, 1, 2) puts them second"
        elif images.dim() == 4 and shape[1] == 1:
            hint = "; grey images need three channels, for example images.expand(-1, 3, -1, -1)"
        elif images.dim() == 3:
            hint = "; a single image needs a batch dimension, images[None]"
        raise DataError(f"{where}: the shape is {shape}; (N, 3, H, W) was expected{hint}")
    if 0 in shape[2:]:
        raise DataError(f"{where}: the shape is {shape}; images need at least one pixel")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"{where}: the dtype is {images.dtype}; pass uint8, or float in [0, 1]")
    if images.numel():
        low, high = (float(bound) for bound in images.aminmax())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(f"{where}: a pixel is NaN or infinite; check how the images are read")
        if low < -1e-3:
            raise DataError(
                f"{where}: pixels reach from {low:.3g} to {high:.3g}, as after normalisation; pass plain images in [0, 1], "
                "because the learner normalises by itself"
            )
        if high > 1 + 1e-3:
            raise DataError(f"{where}: pixels reach {high:.4g}; floats must lie in [0, 1]: divide by 255, or pass uint8")
    return images


def check_targets(targets: Any, n: int, where: str) -> list[Any]:
    """Targets as a list of `n` integers or names. Raises `DataError`."""
    if isinstance(targets, (Tensor, np.ndarray)):
        if (
            targets.ndim != 1
            or (isinstance(targets, Tensor) and targets.is_floating_point())
            or getattr(targets.dtype, "kind", "i") == "f"
        ):
            raise DataError(
                f"{where}: targets of shape {tuple(targets.shape)} and dtype {targets.dtype} came; "
                "pass one integer an image, (N,)"
            )
        targets = targets.tolist()
    if not isinstance(targets, (list, tuple)):
        raise DataError(f"{where}: targets of type {type(targets).__name__} came; pass one integer an image, (N,)")
    if len(targets) != n:
        raise DataError(f"{where}: {n} images came with {len(targets)} targets; each image needs one")
    return list(targets)


def read(loader: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    """One pass over a loader: checked images and targets, batch by batch."""
    try:
        batches = iter(loader)
    except TypeError as error:
        raise DataError(
            f"a {type(loader).__name__} cannot be iterated over; pass a DataLoader or a list of (images, targets)"
        ) from error
    for number in itertools.count(1):
        where = f"batch {number}"
        try:
            batch = next(batches)
        except StopIteration:
            return
        except EdgeDfcilError:
            raise
        except Exception as error:  # whatever the caller's data set raises, a corrupt file for instance
            raise DataError(f"{where}: the loader raised {type(error).__name__}: {error}") from error
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise DataError(f"{where}: a {type(batch).__name__} came; each batch must be a pair (images, targets)")
        images = check_images(batch[0], where)
        yield images, check_targets(batch[1], len(images), where)
