"""Held-out images: training leaves them out, because a calibration needs images that were not learnt from."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


def held_out(images: Tensor, share: float) -> Tensor:
    """Which images (B, 3, H, W) of a batch are held out, (B,) bool on the CPU: `share` of all of them, chosen by their content.

    An image is held out in every pass or in none, independent of its place, and nothing has to be stored to recognise it. If the
    loader augments, its images differ in each pass, and the choice is made for each of them.
    """
    if not share:
        return torch.zeros(len(images), dtype=torch.bool)
    found = images.detach().cpu().contiguous()
    codes = [zlib.crc32(image.view(torch.uint8).numpy()) for image in found]
    return torch.tensor([code < share * 2**32 for code in codes], dtype=torch.bool)


def without(images: Tensor, targets: Tensor, left_out: Tensor) -> tuple[Tensor, Tensor]:
    """A batch (B, 3, H, W), (B,) of the same size, in which other images replace those that are left out, (B,) bool; unchanged
    if all or none are left out."""
    if not bool(left_out.any()) or bool(left_out.all()):
        return images, targets
    stay = torch.nonzero(~left_out).flatten()
    places = torch.arange(len(images))
    places[left_out] = stay[torch.arange(int(left_out.sum())) % len(stay)]
    return images[places.to(images.device)], targets[places.to(targets.device)]
