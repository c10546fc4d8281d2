"""The residual networks for small images (He et al., CVPR 2016, section 4.2), without their last linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut: subsampled in space, zero-padded in channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra or self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The residual network for small images (He et al., CVPR 2016, section 4.2): depth 6 n + 2, 16/32/64 channels.

    `depth` 32 is the classifier of the ABD paper: 31 BatchNorm layers, 470,004 parameters with 100 outputs.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, channels_in, stages = (depth - 2) // 6, 16, []
        for channels in (16, 32, 64):
            first = BasicBlock(channels_in, channels, stride=1 if channels == 16 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))))
            channels_in = channels
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stages(x)  # (N, 64, S/4, S/4)
        return x.mean((2, 3))  # (N, 64)
