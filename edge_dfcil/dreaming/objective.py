"""The inversion objectives: what is minimised to generate images from a frozen classifier.

ABD's terms are for a generator (Smith et al., ICCV 2021, section 4, eqs. 1 to 5), DeepInversion's for pixels (Yin et al.,
CVPR 2020, section 3); the adaptive term is for both. Each function follows its equation. `o` are the teacher's
logits (N, K) over the K old classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil.model.backbones import batchnorm_layers

LayerStatistics = tuple[Tensor, Tensor, Tensor, Tensor]  # running mean and variance, batch mean and variance: (C,) each

# The smallest variance in a logarithm or a quotient; a dead channel has a variance of 0.
TINY = 1e-5


def content(o: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of o / temperature against the label of each dream (eq. 1). The paper's label is argmax o."""
    return F.cross_entropy(o / temperature, labels)


def label_diversity(o: Tensor) -> Tensor:
    """1 + sum_k p_k ln p_k / ln K, with p the batch mean of softmax(o) (eq. 2): 0 when all classes are generated equally often.

    `torch.xlogy` makes 0 ln 0 = 0, where the plain product underflows to NaN. With one class the term is 0.
    """
    return diversity_of(o.softmax(1).mean(0))


def diversity_of(p: Tensor) -> Tensor:
    """The same for a mean prediction p (K,)."""
    classes = len(p)
    if classes == 1:
        return p.new_zeros(())
    return 1 + torch.xlogy(p, p.clamp_min(torch.finfo(p.dtype).tiny)).sum() / math.log(classes)


def statistics_alignment(statistics: Sequence[LayerStatistics]) -> Tensor:
    """Mean over BatchNorm layers of the channel-mean of KL(N(m, r) || N(u, v)) (eq. 4).

    `statistics` contains, for each layer, running mean m, running variance r, batch mean u and batch variance v: (C,) each.
    """
    m, r, u, v, sizes = _joined(statistics)
    r, v = r.clamp_min(TINY), v.clamp_min(TINY)
    kl = 0.5 * (v.log() - r.log()) - 0.5 * (1 - (r + (m - u) ** 2) / v)  # (sum of C,)
    return torch.stack([layer.mean() for layer in kl.split(sizes)]).mean()


def _joined(statistics: Sequence[LayerStatistics]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """The channels of all layers joined, and the number of each layer: accelerators are slow at many small operations."""
    m, r, u, v = (torch.cat(column) for column in zip(*statistics, strict=True))
    return m, r, u, v, [len(layer[0]) for layer in statistics]


def smoothness(images: Tensor) -> Tensor:
    """Mean squared difference between images and their blur (eq. 3): 5x5 Gaussian, sigma sqrt 2, reflected edges."""
    offsets = torch.arange(-2, 3, device=images.device, dtype=images.dtype)
    row = torch.exp(-(offsets**2) / (2 * 2.0))  # sigma squared = 2
    kernel = torch.outer(row, row)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 5, 5)
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    return F.mse_loss(F.conv2d(padded, kernel, groups=images.shape[1]), images)


def feature_statistics(statistics: Sequence[LayerStatistics], first: float = 1.0) -> Tensor:
    """Sum over BatchNorm layers of ||u - m||_2 + ||v - r||_2, the first layer's times `first` (DeepInversion, eq. 4)."""
    m, r, u, v, sizes = _joined(statistics)
    squares = torch.cat([(u - m) ** 2, (v - r) ** 2]).split([*sizes, *sizes])
    norms = torch.stack([layer.sum() for layer in squares]).clamp_min(TINY**4).sqrt()  # (2 L,); a root of 0 has no gradient
    means, variances = norms.chunk(2)
    layers = means + variances
    return first * layers[0] + layers[1:].sum()


def total_variation(images: Tensor) -> Tensor:
    """L2 norm of the differences between neighbours along rows, columns and both diagonals; mean over images."""
    x = images
    differences = (
        x[:, :, :, 1:] - x[:, :, :, :-1],
        x[:, :, 1:] - x[:, :, :-1],
        x[:, :, 1:, 1:] - x[:, :, :-1, :-1],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
    )
    # TINY keeps the root's gradient finite where an image is flat.
    return torch.stack([(d.square().flatten(1).sum(1) + TINY).sqrt().mean() for d in differences]).sum()


def l2(images: Tensor) -> Tensor:
    """L2 norm of an image, mean over images."""
    return (images.square().flatten(1).sum(1) + TINY).sqrt().mean()


def competition(o: Tensor, student: Tensor, temperature: float = 3.0) -> Tensor:
    """1 - JS(softmax(o / T), softmax(student / T)), mean over images (Adaptive DeepInversion, eqs. 7 and 8): small if the
    student, whose logits are (N, K) as well, still answers differently from its teacher."""
    p, q = (o / temperature).log_softmax(1), (student / temperature).log_softmax(1)  # logarithms: nothing underflows
    middle = torch.logaddexp(p, q) - math.log(2)
    js = 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1)
    return 1 - js.mean()


class BatchStatistics:
    """Reads the statistics of every BatchNorm input of a frozen network while `recording()`; keeps none afterwards."""

    def __init__(self, network: nn.Module) -> None:
        self._layers = batchnorm_layers(network)
        self._seen: list[LayerStatistics] = []

    @contextmanager
    def recording(self) -> Iterator[list[LayerStatistics]]:
        """Inside, each forward pass appends (m, r, u, v) for each layer to the list that is yielded."""
        seen = self._seen
        handles = [layer.register_forward_pre_hook(self._record) for layer in self._layers]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
            self._seen = []

    def _record(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        u, v = batch_statistics(inputs[0])
        self._seen.append((layer.running_mean, layer.running_var, u, v))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of each channel of (N, C, ...), in full precision, with gradients."""
    if x.device.type != "cuda":  # CUDA's kernel accumulates in full precision without a copy of x
        x = x.float()
    if x.device.type in ("cpu", "cuda"):
        u, v = _BatchStatistics.apply(x)
    else:
        v, u = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
    return u, v


class _BatchStatistics(torch.autograd.Function):
    """`var_mean` by BatchNorm's own kernel: on the CPU, forward and backward take a tenth of the time, and on CUDA
    neither makes copies of half-precision activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = torch.batch_norm_update_stats(x, None, None, 0.0)
        ctx.save_for_backward(x, u)
        return u, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x, u), (du, dv) = ctx.saved_tensors, gradients
        n = x.numel() / x.shape[1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # d/dx of mean and variance is 1/n and 2 (x - u)/n: one pass over x.
        scale = 2 * dv / n
        return torch.addcmul((du / n - scale * u).view(shape), x, scale.view(shape))
