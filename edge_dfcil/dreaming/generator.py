"""The generator: noise in, images in the classifier's normalised space out (ABD, supplement)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil import devices

SMALLEST_MAP = 8  # the generator starts from a feature map of at most this side and doubles it until the image's size


class DoublingConv2d(nn.Conv2d):
    """Nearest-neighbour doubling and a 3x3 convolution, (N, C, S, S) to (N, C', 2S, 2S), in one step.

    After doubling, the three taps along a side fall on only two pixels. The pair therefore equals a transposed convolution with
    stride 2 and a 4x4 kernel of sums of taps: the same function of the same weights, with 4/9 of the multiplications.
    """

    taps: Tensor

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 3, padding=1)
        taps = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])  # which of the 3 taps add up to each of the 4
        self.register_buffer("taps", taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("ax,by,oixy->ioab", self.taps, self.taps, self.weight)
        return F.conv_transpose2d(x, kernel, self.bias, stride=2, padding=1)


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
                DoublingConv2d(width, out),
                nn.BatchNorm2d(out, eps=0.8),
                nn.LeakyReLU(0.2),
            ]
        channels = width // 2 if doublings else width
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(channels, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False))

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).view(len(z), self.width, self.side, self.side)
        x = x.contiguous(memory_format=devices.memory_format(x.device))
        images: Tensor = self.blocks(self.stem(x))
        return images[:, :, : self.image_size, : self.image_size]
