"""Scales and crops photographs to the square that a network sees, in NumPy, as `edge_dfcil.model.preprocessing` does in torch.

Each side is resampled with the triangle filter, stretched by the scale when the image shrinks (antialiased bilinear, as in
Pillow and torch). Only the pixels of the centre square are computed. uint8 images are computed as in torch and Pillow, with
weights of 16 bits and a rounding after each side, and are bit-identical; floats are not rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST = 4  # times the short side: what is further from the centre is cut off before scaling, as in `fit`
BITS, MOST_BITS = 15, 22  # of a weight for uint8 images: without the sign, and at most after the binary point


def fit(images: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Images (..., H, W), uint8 or float32, scaled until the short side is `size`, then cropped to the centre (size, size).

    The dtype is kept. For uint8 the result is bit-identical to torch's where torch does not convert to floats first, as on CPUs
    with AVX2; elsewhere, and for floats, a pixel differs by 1/255 at most.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    images = _without_far_ends(images)
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    columns = _Taps(width, max(size, round(width * scale)), size)
    rows = _Taps(height, max(size, round(height * scale)), size)
    resample = _of_integers if images.dtype == np.uint8 else _of_floats
    # Rows are added up faster than columns, so the image is transposed for the first pass.
    seen = images[..., rows.first : rows.last + 1, columns.first : columns.last + 1]
    narrow = resample(np.ascontiguousarray(seen.swapaxes(-1, -2)), columns)
    return np.ascontiguousarray(resample(np.ascontiguousarray(narrow.swapaxes(-1, -2)), rows))


def _without_far_ends(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    height, width = images.shape[-2:]
    longest = LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return images[..., top : top + longest, left : left + longest]


class _Taps:
    """The input pixels and weights of the `size` middle ones of `after` output pixels.

    Attributes
    ----------
    pixels, weights
        For each output pixel, the indices of its input pixels minus `first`, and their weights, float64, which add up to 1; both
        (size, taps).
    whole, bits
        The weights times 2**bits, as whole numbers. The largest weight of all `after` pixels takes `BITS` bits.
    first, last
        The first and the last of the input pixels that are needed.
    """

    def __init__(self, before: int, after: int, size: int) -> None:
        scale = before / after
        reach = max(scale, 1.0)
        centers = scale * (np.arange(after) + 0.5)
        first = np.maximum((centers - reach + 0.5).astype(np.intp), 0)
        last = np.minimum((centers + reach + 0.5).astype(np.intp), before)
        pixels = first[:, None] + np.arange(int((last - first).max()))
        weights = np.maximum(0.0, 1.0 - np.abs(pixels - centers[:, None] + 0.5) * (1 / reach))
        weights[pixels >= last[:, None]] = 0.0
        weights /= weights.sum(1, keepdims=True)
        self.bits = max(bits for bits in range(MOST_BITS + 1) if not bits or weights.max() * 2**bits < 2**BITS - 0.5)
        offset = round((after - size) / 2)
        kept = slice(offset, offset + size)
        self.weights = weights[kept]
        self.whole = (self.weights * 2**self.bits + 0.5).astype(np.int32)
        self.first, self.last = int(first[kept].min()), int(last[kept].max()) - 1
        self.pixels = np.minimum(pixels[kept], self.last) - self.first


def _of_integers(images: npt.NDArray[np.uint8], taps: _Taps) -> npt.NDArray[np.uint8]:
    """uint8 images (..., H, W) to (..., size, W): each row the weighted sum of `taps` rows, one tap at a time to need little
    memory."""
    found = np.full((*images.shape[:-2], len(taps.pixels), images.shape[-1]), 1 << (taps.bits - 1), np.int32)
    for pixels, weights in zip(taps.pixels.T, taps.whole.T, strict=True):
        found += weights[:, None] * images[..., pixels, :]
    return (found >> taps.bits).clip(0, 255).astype(np.uint8)


def _of_floats(images: npt.NDArray[np.float32], taps: _Taps) -> npt.NDArray[np.float32]:
    """The same for float32 images."""
    found = np.zeros((*images.shape[:-2], len(taps.pixels), images.shape[-1]), np.float32)
    for pixels, weights in zip(taps.pixels.T, taps.weights.T.astype(np.float32), strict=True):
        found += weights[:, None] * images[..., pixels, :]
    return found
