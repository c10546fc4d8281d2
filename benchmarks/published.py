"""ABD's two steps as published, plainly transcribed with the work they waste: what our speed is measured against.

It follows the description of the published code in our reference, in our own words. The waste is kept on purpose:
teacher logits on real images that nobody uses, three teacher passes where one would do, a second student pass only to
detach its features, statistics hooks that always run, and teacher parameters that collect gradients.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil.dreaming.generator import DoublingConv2d, Generator
from edge_dfcil.model.network import Network


class Published:
    """Teacher, student and generator with their optimisers; `generator_step` and `classifier_step` take one step each."""

    def __init__(self, teacher: Network, student: Network, generator: Generator) -> None:
        contiguous = torch.contiguous_format
        self.teacher = copy.deepcopy(teacher).to(memory_format=contiguous).eval().requires_grad_(True)
        self.student = copy.deepcopy(student).to(memory_format=contiguous).train()
        self.generator, self.latent = plain(generator), generator.latent
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
        self.statistics = [Hook(m) for m in self.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        row = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 4)
        kernel = torch.outer(row, row)
        self.blur = (kernel / kernel.sum()).expand(3, 1, 5, 5).to(next(student.parameters()).device)

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, self.latent, device=self.blur.device)

    def generator_step(self, n: int) -> dict[str, float]:
        self.generator.train()
        images = self.generator(self.noise(n))
        o = self.teacher.head(self.teacher.backbone(images))
        p = o.softmax(1).mean(0)
        smooth = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), self.blur, groups=3)
        losses = {
            "content": F.cross_entropy(o / 1000, o.argmax(1)),
            "diversity": 1 + (p * p.log()).sum() / math.log(o.shape[1]),
            "statistics": 50 * sum(hook.divergence for hook in self.statistics) / len(self.statistics),
            "smoothness": 1e-3 * F.mse_loss(smooth, images),
        }
        self.generator_optimizer.zero_grad()
        sum(losses.values()).backward()
        self.generator_optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    def classifier_step(self, images: Tensor, targets: Tensor) -> dict[str, float]:
        n, n_old = len(images), self.teacher.n_classes
        rho = n_old / self.student.n_classes
        with torch.no_grad():
            dreams = self.generator.eval()(self.noise(n))
            labels = self.teacher.head(self.teacher.backbone(dreams)).argmax(1)
            self.teacher.head(self.teacher.backbone(images))  # for nobody
            both = torch.cat([images, dreams])
            before = self.teacher.head(self.teacher.backbone(both))
        features = self.student.backbone(both)
        detached = self.student.backbone(both).detach()
        all_targets = torch.cat([targets, labels])
        weights = torch.where(all_targets < n_old, rho, 1 - rho)
        head = F.cross_entropy(self.student.head(detached), all_targets, reduction="none")
        losses = {
            "local": (1 - rho) * F.cross_entropy(self.student.head(features[:n])[:, n_old:], targets - n_old),
            "head": (weights * head).mean(),
            "distillation": 0.1 * F.mse_loss(self.teacher.head(features), before),
        }
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}


def plain(generator: Generator) -> nn.Sequential:
    """The same weights, doubling first and convolving then, in torch's default memory order."""
    layers: list[nn.Module] = [
        generator.linear,
        nn.Unflatten(1, (generator.width, generator.side, generator.side)),
        generator.stem,
    ]
    for layer in generator.blocks:
        if isinstance(layer, DoublingConv2d):
            convolution = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)
            convolution.load_state_dict(layer.state_dict())
            layers += [nn.Upsample(scale_factor=2.0), convolution]
        else:
            layers.append(layer)
    device = next(generator.parameters()).device
    return copy.deepcopy(nn.Sequential(*layers)).to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]


class Hook:
    """Computes a BatchNorm layer's divergence at every forward pass, wanted or not."""

    divergence: Tensor

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        layer.register_forward_hook(self._compute)

    def _compute(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        u = x.mean([0, 2, 3])
        v = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        m, r = layer.running_mean, layer.running_var
        self.divergence = (torch.log(v.sqrt() / r.sqrt()) - 0.5 * (1 - (r + (m - u) ** 2) / v)).mean()
