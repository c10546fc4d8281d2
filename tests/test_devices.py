"""One code path for every device, tested on an accelerator if there is one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from edge_dfcil import BudgetError, Learner, SettingError, devices
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.compression.latency import LatencyTable
from edge_dfcil.compression.pruning import Cutter
from edge_dfcil.demo import Batches
from edge_dfcil.dreaming.inversion import Dream
from edge_dfcil.methods import names
from edge_dfcil.model.backbones import build
from edge_dfcil.recipe import find_recipe
from tests.conftest import NAMES, QUICK, quick_learner

HAS = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


@pytest.fixture(params=["cuda", "mps"])
def device(request: pytest.FixtureRequest) -> str:
    if not HAS[request.param]:
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.fixture
def taught(device: str, train: Batches) -> Learner:
    learner = quick_learner(
        device=device, recipe=QUICK.changed({"schedule.min_steps": 120, "pixels.steps": 4, "pixels.batch": 32})
    )
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    return learner


def answers(learner: Learner, test: Batches) -> Any:
    return [prediction.score for prediction in learner.predict(test.images[:50])]


@pytest.mark.parametrize("method", names())
def test_learns_answers_and_is_kept_on_an_accelerator(
    device: str, method: Any, train: Batches, test: Batches, tmp_path: Path
) -> None:
    learner = quick_learner(method=method, device=device)
    for task in (("0", "1"), ("2", "3")):
        learner.learn_task(train.of(task), NAMES, progress=False)
    assert learner.device.type == device
    here = Learner.load(learner.save(tmp_path / "m"), "cpu")
    assert answers(learner, test) == pytest.approx(answers(here, test), abs=1e-2)
    assert learner.dream(8, progress=False).shape == (8, 3, 16, 16)
    learner.export(tmp_path / "m.onnx")


def test_remembers_through_pixel_dreams_on_an_accelerator(taught: Learner, train: Batches, test: Batches) -> None:
    taught.recipe = taught.recipe.changed({"remember.dreams": "pixels", "remember.pool": 64})
    taught.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert len(taught.predict(test.images[:5], top_k=4)[0].top) == 4
    assert taught.dream(8, quality="best", progress=False).shape == (8, 3, 16, 16)


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_a_student_learns_on_an_accelerator(taught: Learner, quality: Literal["fast", "best"], test: Batches) -> None:
    lesson = Distillation(rounds=2, dreams=32, generator_steps=2, steps=2, batch=16, quality=quality)
    student, report = distill(taught, "resnet14", settings=lesson, progress=False)
    assert student.device == taught.device and 0 <= report.agreement <= 1
    assert len(answers(student, test)) == 50


def test_prunes_on_an_accelerator_what_it_prunes_on_the_cpu(taught: Learner, tmp_path: Path) -> None:
    """The same channels can be pruned: rounding on an accelerator does not hide that a layer can lose some."""
    table = LatencyTable(tmp_path / "latency.json", lambda shape: shape.flops / 1e6)
    settings = Pruning(ratio=0.2, group=4, repair=Distillation(rounds=1, dreams=32, generator_steps=2, steps=2, batch=16))
    smaller, report = prune(taught, settings, table=table, timing=False, progress=False)
    assert report.filters[1] <= 0.8 * report.filters[0] and smaller.device == taught.device
    dream = Dream(torch.rand(8, 3, 16, 16), torch.randn(8, 2))
    networks = (taught.network.grown(0), Learner.load(taught.save(tmp_path / "m"), "cpu").network.grown(0))
    there, here = (Cutter(n, Dream(dream.images.to(n.mean.device), dream.logits), settings, table) for n in networks)
    assert len(there.roots) == len(here.roots) > 0


def test_int8_from_an_accelerator(taught: Learner, tmp_path: Path) -> None:
    report = taught.export(tmp_path / "m.onnx", "int8", force=True)
    assert report.bytes < report.float_bytes and report.agreement["dreams"] >= 0.9


@pytest.mark.filterwarnings("ignore:.*nothing to invert")
def test_adopts_and_relearns_on_an_accelerator(device: str, train: Batches) -> None:
    module = nn.Sequential(build("resnet8"), nn.Linear(64, 2)).eval()
    learner = Learner.from_classifier(module, ["0", "1"], image_size=16, recipe=QUICK, device=device)
    learner.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert learner.tasks == (("0", "1"), ("2", "3"))


def test_a_budget_holds_on_an_accelerator(device: str, train: Batches) -> None:
    learner = quick_learner(device=device, memory_budget="400MB")
    for task in (("0", "1"), ("2", "3")):
        report = learner.learn_task(train.of(task), NAMES, progress=False)
        assert 0 < report.peak_bytes <= 400e6
    with pytest.raises(BudgetError):
        quick_learner(device=device, memory_budget=10_000).learn_task(train.of(("0", "1")), NAMES, progress=False)


@pytest.mark.parametrize("method", names())
@pytest.mark.slow
def test_every_loss_stands_half_precision(method: Any, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast, on the CPU: no term mixes dtypes, and none overflows."""
    monkeypatch.setattr(devices, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    learner = quick_learner(method=method)
    for task in (("0", "1"), ("2", "3")):
        report = learner.learn_task(train.of(task), NAMES, progress=False)
    assert all(stage.steps > 0 for stage in report.stages)
    assert all(value.dtype != torch.bfloat16 for value in learner.network.state_dict().values())


@pytest.mark.slow
def test_the_published_recipe_computes_in_float32(train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    """`paper` follows the paper exactly; `edge` may compute in bf16 on a device that has it."""
    regions: list[torch.device] = []

    def autocast(device: torch.device) -> Any:
        regions.append(device)
        return nullcontext()

    monkeypatch.setattr(devices, "autocast", autocast)
    assert not find_recipe("paper").schedule.mixed_precision and find_recipe("edge").schedule.mixed_precision
    learner = quick_learner(recipe=QUICK.changed({"schedule.mixed_precision": False}))
    for task in (("0", "1"), ("2", "3")):
        learner.learn_task(train.of(task), NAMES, progress=False)
    assert not regions


def test_full_precision_where_half_would_hurt() -> None:
    with devices.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_auto_finds_what_is_there() -> None:
    best = next((name for name in ("cuda", "mps") if HAS[name]), "cpu")
    assert devices.find_device("auto").type == best


def test_seeded_draws_do_not_disturb_the_callers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with devices.seeded(5, torch.device("cpu")):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with devices.seeded(5, torch.device("cpu")):
        assert torch.equal(torch.rand(2), first)


@pytest.mark.parametrize("seed", [0, 7, 2**53])
def test_seeds_are_whole_numbers(seed: Any) -> None:
    assert devices.check_seed(seed) == seed
    torch.default_generator.clone_state().manual_seed(seed * 1009 + 1000)  # what a learner's last task would be seeded with


@pytest.mark.parametrize("seed", [-1, 2**53 + 1, 1.0, "1", None, True])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(SettingError, match="whole number from 0"):
        devices.check_seed(seed)


def test_channels_last_but_on_mps() -> None:
    formats = {name: devices.memory_format(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert formats == {"cpu": torch.channels_last, "cuda": torch.channels_last, "mps": torch.contiguous_format}


def test_float64_images_are_float32_before_they_move(learnt: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has no float64. Simulated here: moving a float64 tensor fails."""
    move = torch.Tensor.to

    def to(self: Any, *args: Any, **settings: Any) -> Any:
        assert self.dtype != torch.float64, "float64 must not move to a device"
        return move(self, *args, **settings)

    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = learnt.predict(images.float())
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert learnt.predict(images) == expected
