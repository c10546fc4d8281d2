"""From images of any size to the square that a network sees."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import functional as T

LONGEST = 4  # times the short side: the rest is cut off before scaling, because the crop removes it anyway


def fit(images: Tensor, size: int) -> Tensor:
    """Images (..., 3, H, W) scaled until the short side is `size`, then cropped to the centre square; dtype kept.

    If one side is more than `LONGEST` times the other, only the middle part of that length is scaled: otherwise an image of
    1 x 20,000 pixels would first be scaled to 224 x 4,480,000 pixels.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    longest = LONGEST * min(height, width)
    if max(height, width) > longest:
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        images = images[..., top : top + longest, left : left + longest]
        height, width = images.shape[-2:]
    scale = size / min(height, width)
    scaled = [max(size, round(height * scale)), max(size, round(width * scale))]
    return T.center_crop(T.resize(images, scaled, antialias=True), [size, size])
