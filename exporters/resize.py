"""Photographs of any size to the square that a network sees, in NumPy: what `edge_dfcil.model.preprocessing.fit` does in torch.

Each side is resampled with the triangle filter, stretched by the scale when the image shrinks (antialiased bilinear, as in
Pillow and torch). Only the pixels of the centre square are computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST = 4  # times the short side: what is further from the centre is cut off before scaling, as in `fit`


def fit(images: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Images (..., H, W), uint8 or float32, scaled until the short side is `size`, then cropped to the centre (size, size).

    The dtype is kept. A pixel differs from torch's by 1/255 at most.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    images = _without_far_ends(images)
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    rows, row_weights = _taps(height, max(size, round(height * scale)), size)
    columns, column_weights = _taps(width, max(size, round(width * scale)), size)
    first, last = int(columns.min()), int(columns.max())
    found = _resample(images[..., first : last + 1], rows, row_weights)
    found = _resample(found.swapaxes(-1, -2), columns - first, column_weights).swapaxes(-1, -2)
    if images.dtype == np.uint8:
        return np.ascontiguousarray(np.rint(found).clip(0, 255).astype(np.uint8))
    return np.ascontiguousarray(found)


def _without_far_ends(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    height, width = images.shape[-2:]
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return images[..., top : top + longest, left : left + longest]


def _taps(before: int, after: int, size: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """For the `size` middle ones of `after` output pixels: the input pixels that each is made of, and their weights, both
    (size, taps); the weights of a pixel add up to 1."""
    scale = before / after
    reach = max(scale, 1.0)
    offset = round((after - size) / 2)
    centers = scale * (np.arange(offset, offset + size) + 0.5)
    first = np.maximum((centers - reach + 0.5).astype(np.intp), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.intp), before)
    pixels = first[:, None] + np.arange(int((last - first).max()))
    weights = np.maximum(0.0, 1.0 - np.abs(pixels + 0.5 - centers[:, None]) / reach)
    weights[pixels >= last[:, None]] = 0.0
    weights /= weights.sum(1, keepdims=True)
    return np.minimum(pixels, before - 1), weights.astype(np.float32)


def _resample(
    images: npt.NDArray[Any], pixels: npt.NDArray[np.intp], weights: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Images (..., H, W) to (..., size, W): each row the weighted sum of `taps` rows, one tap at a time to need little memory."""
    found = np.zeros((*images.shape[:-2], len(pixels), images.shape[-1]), np.float32)
    for tap in range(pixels.shape[1]):
        found += weights[:, tap, None] * images[..., pixels[:, tap], :]
    return found
