"""From images of any size to the square that a network sees."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import functional as T


def fit(images: Tensor, size: int) -> Tensor:
    """Images (..., 3, H, W) scaled until the short side is `size`, then cropped to the centre square; dtype kept."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    scale = size / min(height, width)
    scaled = [max(size, round(height * scale)), max(size, round(width * scale))]
    return T.center_crop(T.resize(images, scaled, antialias=True), [size, size])
