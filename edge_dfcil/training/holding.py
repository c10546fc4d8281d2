"""Images that training leaves out, for what must be found on images that were not learnt from."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def held_out(images: Tensor, share: float) -> Tensor:
    """Which images (B, 3, H, W) of a batch are held out, (B,) bool on the CPU: `share` of all of them, chosen by their content.

    An image is held out in every pass or in none, in whatever order a loader gives them, and nothing is kept to know it by. A
    loader that augments makes other images of it; these are chosen afresh.
    """
    if not share:
        return torch.zeros(len(images), dtype=torch.bool)
    found = images.detach().cpu().contiguous()
    codes = [zlib.crc32(image.view(torch.uint8).numpy()) for image in found]
    return torch.tensor([code < share * 2**32 for code in codes], dtype=torch.bool)


def without(images: Tensor, targets: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """A batch (B, 3, H, W), (B,) of the same size in which others take the places of images that are left out, (B,) bool; as
    it is where all are."""
    if not bool(left_out.any()) or bool(left_out.all()):
        return images, targets
    stay = torch.nonzero(~left_out).flatten()
    places = torch.arange(len(images))
    places[left_out] = stay[torch.arange(int(left_out.sum())) % len(stay)]
    return images[places.to(images.device)], targets[places.to(targets.device)]
