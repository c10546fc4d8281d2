"""The generator that dreams: noise in, images in the classifier's normalised space out (ABD, supplement)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SMALLEST_MAP = 8  # the generator starts from a feature map of at most this side and doubles it until the image's size


class Generator(nn.Module):
    """z (N, latent) to images (N, 3, S, S).

    With `latent` 1000, `width` 128 and 32 px this is the published generator of 8.42 M parameters: linear to
    128 x 8 x 8, two nearest-neighbour doublings, two BatchNorms of eps 0.8, tanh, a last BatchNorm without affine.
    64 px has one doubling more; 224 px starts from 7 x 7.
    """

    def __init__(self, image_size: int, *, latent: int = 1000, width: int = 128) -> None:
        super().__init__()
        doublings = 0
        while image_size / 2**doublings > SMALLEST_MAP:
            doublings += 1
        self.image_size, self.latent, self.width = image_size, latent, width
        self.side = -(-image_size // 2**doublings)  # rounded up; forward crops
        self.linear = nn.Linear(latent, width * self.side**2)
        self.stem = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        for doubling in range(doublings):
            last = doubling == doublings - 1
            out = width // 2 if last else width
            blocks += [
                nn.Upsample(scale_factor=2.0),
                nn.Conv2d(width, out, 3, padding=1),
                nn.BatchNorm2d(out, eps=0.8),
                nn.LeakyReLU(0.2),
            ]
        channels = width // 2 if doublings else width
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(channels, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False))

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).view(len(z), self.width, self.side, self.side)
        x = x.contiguous(memory_format=torch.channels_last)
        images: Tensor = self.blocks(self.stem(x))
        return images[:, :, : self.image_size, : self.image_size]
