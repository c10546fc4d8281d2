"""The loop itself: a batch in parts teaches what the whole batch teaches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edge_dfcil.training import Stage, fit

CPU = torch.device("cpu")


def trained(n: int, at_once: int | None, steps: int = 3) -> tuple[list[torch.Tensor], dict[str, float], int]:
    torch.manual_seed(0)
    model, images = nn.Linear(4, 2), torch.randn(n, 4)
    sizes = []

    def loss(part):
        sizes.append(len(part))
        return {"square": model(part).square().mean(), "mean": model(part).mean()}

    stage = Stage("learn", [images], steps, loss, torch.optim.SGD(model.parameters(), 0.1), trains=[model], at_once=at_once)
    report = fit(stage, CPU, (), lambda: False)
    return [p.detach() for p in model.parameters()], report.losses, max(sizes)


@given(st.integers(2, 20), st.integers(1, 20))
def test_a_split_batch_teaches_what_the_whole_does(n, at_once):
    whole, whole_losses, _ = trained(n, None)
    split, split_losses, largest = trained(n, at_once)
    assert largest <= at_once or n <= at_once
    for one, other in zip(whole, split, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert split_losses == pytest.approx(whole_losses, abs=1e-5)


def test_running_statistics_move_as_far_in_parts():
    moved = []
    for at_once in (None, 2):
        layer = nn.BatchNorm1d(1, momentum=0.5)
        images = torch.ones(8, 1)
        stage = Stage(
            "learn", [images], 1, lambda part, layer=layer: {"sum": layer(part).sum()},
            torch.optim.SGD(layer.parameters(), 0.0), trains=[layer], at_once=at_once,
        )  # fmt: skip
        fit(stage, CPU, (), lambda: False)
        moved.append(layer.running_mean.item())
        assert layer.momentum == 0.5
    assert moved[0] == pytest.approx(0.5)
    assert moved[1] == pytest.approx(0.5)
