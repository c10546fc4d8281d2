"""The training loop: a batch in micro-batches has the effect of the whole batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edge_dfcil import SettingError
from edge_dfcil.demo import Batches
from edge_dfcil.training.loop import fit
from edge_dfcil.training.stage import StageSpec
from tests.conftest import NAMES, QUICK, quick_learner, weights

CPU = torch.device("cpu")


def summed(layer: nn.Module, part: Tensor) -> dict[str, Tensor]:
    return {"sum": layer(part).sum()}


def trained(n: int, at_once: int | None, steps: int = 3) -> tuple[list[torch.Tensor], dict[str, float], int]:
    torch.manual_seed(0)
    model, images = nn.Linear(4, 2), torch.randn(n, 4)
    sizes = []

    def loss(part: Any) -> dict[str, Any]:
        sizes.append(len(part))
        return {"square": model(part).square().mean(), "mean": model(part).mean()}

    stage = StageSpec(
        "learn", [images], steps, loss, lambda: torch.optim.SGD(model.parameters(), 0.1), trains=[model], micro_batch=at_once
    )
    report = fit(stage, CPU)
    return [p.detach() for p in model.parameters()], report.losses, max(sizes)


@given(st.integers(2, 20), st.integers(1, 20))
def test_a_split_batch_teaches_what_the_whole_does(n: int, at_once: int) -> None:
    whole, whole_losses, _ = trained(n, None)
    split, split_losses, largest = trained(n, at_once)
    assert largest <= at_once or n <= at_once
    for one, other in zip(whole, split, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert split_losses == pytest.approx(whole_losses, abs=1e-5)


def test_running_statistics_move_as_far_in_parts() -> None:
    moved = []
    for at_once in (None, 2):
        layer = nn.BatchNorm1d(1, momentum=0.5)
        images = torch.ones(8, 1)
        stage = StageSpec(
            "learn",
            [images],
            1,
            partial(summed, layer),
            partial(torch.optim.SGD, layer.parameters(), 0.0),
            trains=[layer],
            micro_batch=at_once,
        )
        fit(stage, CPU)
        assert layer.running_mean is not None
        moved.append(layer.running_mean.item())
        assert layer.momentum == 0.5
    assert moved[0] == pytest.approx(0.5)
    assert moved[1] == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["abd", "finetune"])
def test_frozen_layers_stay_as_the_first_task_left_them(method: str, train: Batches) -> None:
    learner = quick_learner(method=method, recipe=QUICK.changed({"schedule.freeze": 0.4}))
    found = []
    for names in (("0", "1"), ("2",), ("3",)):
        learner.learn_task(train.of(names), NAMES, progress=False)
        found.append(weights(learner))
    first, second, third = found
    frozen = {name for name in first if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.stages.0"))}
    for name in first:
        if name.startswith("head") or name.endswith("num_batches_tracked"):
            continue
        assert torch.equal(first[name], second[name]) == (name in frozen), name
        assert torch.equal(second[name], third[name]) == (name in frozen), name


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_no_other_share_can_be_frozen(share: float) -> None:
    with pytest.raises(SettingError, match=r"schedule\.freeze"):
        QUICK.changed({"schedule.freeze": share})
