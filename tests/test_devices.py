"""One code path for every device: what an accelerator does, on the accelerator where there is one."""

from __future__ import annotations

import pytest
import torch

from edge_dfcil import Learner, devices
from edge_dfcil.methods import names
from tests.conftest import NAMES, QUICK, quick_learner

HAS = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.parametrize("method", names())
def test_learns_answers_and_is_kept_on_an_accelerator(device, method, train, test, tmp_path):
    if not HAS[device]:
        pytest.skip(f"no {device} here")
    learner = Learner("resnet8", image_size=16, recipe=QUICK, method=method, device=device)
    for task in (("0", "1"), ("2", "3")):
        learner.learn_task(train.of(task), NAMES, progress=False)
    assert learner.device.type == device
    there = learner.predict(test.images[:50])
    here = Learner.load(learner.save(tmp_path / "m"), "cpu").predict(test.images[:50])
    assert [p.score for p in there] == pytest.approx([p.score for p in here], abs=1e-2)
    assert learner.dream(8, progress=False).shape == (8, 3, 16, 16)
    learner.export(tmp_path / "m.onnx")


@pytest.mark.parametrize("method", names())
def test_every_loss_stands_half_precision(method, train, monkeypatch):
    """CUDA's autocast, asked of the CPU: no term mixes its dtypes up, and none overflows."""
    monkeypatch.setattr(devices, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    learner = quick_learner(method=method)
    for task in (("0", "1"), ("2", "3")):
        report = learner.learn_task(train.of(task), NAMES, progress=False)
    assert all(stage.steps > 0 for stage in report.stages)
    assert all(value.dtype != torch.bfloat16 for value in learner.network.state_dict().values())


def test_full_precision_where_half_would_hurt():
    with devices.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_auto_finds_what_is_there():
    best = next((name for name in ("cuda", "mps") if HAS[name]), "cpu")
    assert devices.find_device("auto").type == best


def test_seeded_draws_do_not_disturb_the_callers():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with devices.seeded(5, torch.device("cpu")):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with devices.seeded(5, torch.device("cpu")):
        assert torch.equal(torch.rand(2), first)
