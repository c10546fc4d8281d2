"""The inversion terms against cases worked by hand (ABD, eqs. 1 to 5)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edge_dfcil import Learner
from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.generator import DoublingConv2d, Generator
from edge_dfcil.dreaming.inversion import Dreamer
from tests.conftest import QUICK


def test_content_is_cross_entropy_of_scaled_logits() -> None:
    o = torch.tensor([[1000.0, 0.0]])
    assert objective.content(o, torch.tensor([0]), 1000.0).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_label_diversity_is_zero_when_even_and_one_when_all_are_alike() -> None:
    even = torch.tensor([[50.0, 0.0], [0.0, 50.0]])
    alike = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    assert objective.label_diversity(even).item() == pytest.approx(0, abs=1e-6)
    assert objective.label_diversity(alike).item() == pytest.approx(1, abs=1e-6)


def test_label_diversity_by_hand() -> None:
    o = torch.tensor([[math.log(3.0), 0.0]])  # p = 3/4, 1/4
    expected = 1 + (0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert objective.label_diversity(o).item() == pytest.approx(expected, abs=1e-6)


def test_label_diversity_does_not_underflow_to_nan() -> None:
    o = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = objective.label_diversity(o)
    loss.backward()
    assert torch.isfinite(loss)
    assert o.grad is not None and torch.isfinite(o.grad).all()


def test_label_diversity_of_one_class_is_nothing() -> None:
    assert objective.label_diversity(torch.randn(4, 1)).item() == 0


def kl(m: Any, r: Any, u: Any, v: Any) -> Tensor:
    """KL(N(m, r) || N(u, v)) from its definition."""
    p, q = torch.distributions.Normal(m, r.sqrt()), torch.distributions.Normal(u, v.sqrt())
    return torch.distributions.kl_divergence(p, q)


def test_statistics_alignment_is_the_kl_of_two_gaussians_averaged_over_channels_then_layers() -> None:
    def value(*xs: Any) -> Tensor:
        return torch.tensor(xs)

    one = (value(0.0, 1.0), value(1.0, 2.0), value(0.5, 1.0), value(2.0, 2.0))
    two = (value(3.0), value(0.5), value(2.0), value(0.25))
    expected = (kl(*one).mean() + kl(*two).mean()) / 2
    assert objective.statistics_alignment([one, two]).item() == pytest.approx(expected.item(), rel=1e-5)


@given(st.floats(-3, 3), st.floats(0.01, 4))
def test_statistics_alignment_vanishes_only_where_both_agree(mean: float, variance: float) -> None:
    m, r = torch.tensor([mean]), torch.tensor([variance])
    assert objective.statistics_alignment([(m, r, m, r)]).item() == pytest.approx(0, abs=1e-5)
    assert objective.statistics_alignment([(m, r, m + 1, r)]) > 0.1
    assert objective.statistics_alignment([(m, r, m, r * 4)]) > 0.1


def test_statistics_alignment_survives_a_dead_channel() -> None:
    zero = torch.zeros(1, requires_grad=True)
    loss = objective.statistics_alignment([(torch.zeros(1), torch.zeros(1), zero, zero)])
    loss.backward()
    assert torch.isfinite(loss)
    assert zero.grad is not None and torch.isfinite(zero.grad).all()


def test_smoothness_is_zero_for_flat_images_and_grows_with_roughness() -> None:
    flat = torch.full((1, 3, 8, 8), 0.3)
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(1, 3, 8, 8)
    assert objective.smoothness(flat).item() == pytest.approx(0, abs=1e-10)
    assert objective.smoothness(board) > objective.smoothness(board * 0.5) > 0.01


def test_smoothness_by_hand_at_one_point() -> None:
    """The blur of a single bright pixel is the kernel itself."""
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    row = torch.exp(-torch.tensor([4.0, 1.0, 0.0, 1.0, 4.0]) / 4)
    kernel = torch.outer(row, row) / row.sum() ** 2
    expected = (kernel.square().sum() - kernel[2, 2] ** 2 + (1 - kernel[2, 2]) ** 2) / 81
    assert objective.smoothness(image).item() == pytest.approx(expected.item(), rel=1e-5)


def test_batch_statistics_are_those_of_batchnorm_inputs_and_only_while_recording() -> None:
    layer = nn.BatchNorm2d(2)
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
    network = nn.Sequential(layer).eval()
    x = torch.randn(4, 2, 3, 3)
    statistics = objective.BatchStatistics(network)
    with statistics.recording() as seen:
        network(x)
    network(x)
    ((m, r, u, v),) = seen
    assert torch.equal(m, layer.running_mean)
    assert torch.equal(r, layer.running_var)
    assert torch.allclose(u, x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(v, x.var((0, 2, 3), correction=0), atol=1e-6)
    assert not layer._forward_pre_hooks


@given(st.integers(1, 9), st.integers(0, 99))
def test_channel_statistics_and_their_gradients_are_those_of_var_mean(side: int, seed: int) -> None:
    x = (3 * torch.randn(4, 3, side, side + 1, generator=torch.Generator().manual_seed(seed)) + 2).requires_grad_()
    v, u = torch.var_mean(x, (0, 2, 3), correction=0)
    found = objective.batch_statistics(x)
    assert torch.allclose(found[0], u, atol=1e-5)
    assert torch.allclose(found[1], v, rtol=1e-4)
    ours, theirs = (torch.autograd.grad((m.sin() * s.log()).sum(), x)[0] for m, s in (found, (u, v)))
    assert torch.allclose(ours, theirs, atol=1e-5)


@given(st.integers(1, 7), st.integers(1, 7))
def test_doubling_and_convolving_at_once_is_doubling_then_convolving(height: int, width: int) -> None:
    layer = DoublingConv2d(3, 5).double()
    x = torch.randn(2, 3, height, width, dtype=torch.double, requires_grad=True)
    plain = F.conv2d(F.interpolate(x, scale_factor=2.0), layer.weight, layer.bias, padding=1)
    assert torch.allclose(layer(x), plain, atol=1e-12)
    assert layer.bias is not None
    inputs = [x, layer.weight, layer.bias]
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (layer(x), plain))
    assert all(torch.allclose(one, other, atol=1e-10) for one, other in zip(ours, theirs, strict=True))


def test_the_published_generator() -> None:
    generator = Generator(32)
    assert sum(p.numel() for p in generator.parameters()) == 8_423_939
    assert [m.eps for m in generator.modules() if isinstance(m, nn.BatchNorm2d)] == [1e-5, 0.8, 0.8, 1e-5]
    assert generator(torch.randn(2, 1000)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(("size", "side", "doublings"), [(16, 8, 1), (32, 8, 2), (64, 8, 3), (96, 6, 4), (224, 7, 5), (50, 7, 3)])
def test_generator_sizes(size: int, side: int, doublings: int) -> None:
    generator = Generator(size, latent=8, width=4)
    assert generator.side == side
    assert sum(isinstance(m, DoublingConv2d) for m in generator.modules()) == doublings
    assert generator(torch.randn(2, 8)).shape == (2, 3, size, size)


@pytest.mark.parametrize("at_once", [16, 6])
def test_the_gradients_of_a_split_batch_are_those_of_the_whole(learnt: Learner, at_once: int) -> None:
    """Except for the generator's own BatchNorm, which is in eval mode here.

    The tolerance is 1e-4 of the largest value of each gradient (rounding leaves 4e-6): a value that cancels to almost zero
    has no accurate digits.
    """
    teacher, recipe = learnt.network.frozen(), QUICK.changed({"generator.batch": 16})
    dreamer = Dreamer(teacher, torch.arange(2), recipe)
    stage = dreamer.stage()
    z = dreamer.noise(16)
    dreamer.generator.eval()
    found = []
    for parts in ([z], list(z.split(at_once))):
        if len(parts) > 1:
            assert stage.before_parts is not None
            stage.before_parts(parts)
        dreamer.generator.zero_grad()
        value = torch.zeros(())
        for part in parts:
            loss = len(part) / 16 * torch.stack(list(stage.loss(part).values())).sum()
            loss.backward()
            value += loss.detach()
        gradients = [p.grad.clone() for p in dreamer.generator.parameters() if p.grad is not None]
        found.append([value, *gradients])
    for whole, split in zip(*found, strict=True):
        assert (whole - split).abs().max() <= 1e-4 * whole.abs().max()
