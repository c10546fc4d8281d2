"""Augmentation on the device, with separate random draws for each image (torchvision's transforms draw once per batch)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_dfcil.recipe import Recipe

if TYPE_CHECKING:
    from edge_dfcil.model.network import Network

GREY = (0.2989, 0.587, 0.114)


def augment(pixels: Tensor, recipe: Recipe) -> Tensor:
    """Colour jitter, flip and crop of float images (N, 3, S, S) in [0, 1], in the order of the ABD paper."""
    pixels = jitter(pixels, recipe.augmentation.brightness, recipe.augmentation.contrast)
    if recipe.augmentation.flip:
        flipped = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
        pixels = torch.where(flipped, pixels.flip(3), pixels)
    return crop(pixels, recipe.augmentation.crop_padding) if recipe.augmentation.crop_padding else pixels


def views(images: Tensor, network: Network, recipe: Recipe) -> Tensor:
    """The same for images that are normalised for a network; the result is normalised as well."""
    return network.normalize(augment(images * network.std + network.mean, recipe))


def jitter(pixels: Tensor, brightness: float, contrast: float) -> Tensor:
    """Changes brightness and contrast by factors from 1 - x to 1 + x, x being the argument. Factors and their order are drawn
    for each image."""
    if not brightness and not contrast:
        return pixels
    light, depth = _factors(pixels, brightness), _factors(pixels, contrast)
    light_first = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    return torch.where(light_first, _contrast(_brighten(pixels, light), depth), _brighten(_contrast(pixels, depth), light))


def _factors(pixels: Tensor, spread: float) -> Tensor:
    low = max(0.0, 1 - spread)
    return low + (1 + spread - low) * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)


def _brighten(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * factor).clamp(0, 1)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """Mixes images with the mean of their grey."""
    weights = torch.tensor(GREY, device=pixels.device).view(1, 3, 1, 1)
    grey = (pixels * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    return torch.lerp(grey.expand_as(pixels), pixels, factor).clamp(0, 1)


def crop(pixels: Tensor, padding: int) -> Tensor:
    """A random crop, of the old size, from each image padded with `padding` zeros on every side."""
    n, _, height, width = pixels.shape
    padded = F.pad(pixels, [padding] * 4).permute(0, 2, 3, 1)  # (N, H + 2p, W + 2p, 3): gathers whole pixels
    rows, columns = torch.randint(2 * padding + 1, (2, n, 1, 1), device=pixels.device)
    rows = rows + torch.arange(height, device=pixels.device).view(1, -1, 1)
    columns = columns + torch.arange(width, device=pixels.device).view(1, 1, -1)
    image = torch.arange(n, device=pixels.device).view(-1, 1, 1)
    return padded[image, rows, columns].permute(0, 3, 1, 2)  # channels-last in memory
