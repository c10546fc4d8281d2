"""The memory budget: planned before learning, kept during it, reported after it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edge_dfcil import BudgetError, Callback, Cancelled, Learner, SettingError
from edge_dfcil.budget.allocator import capped
from edge_dfcil.budget.meter import Meter, parse
from edge_dfcil.budget.planner import Rehearsed, refusal
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.demo import Batches
from edge_dfcil.dreaming.inversion import Dream, Dreamer, Pool
from edge_dfcil.methods.abd import ABD
from edge_dfcil.model.backbones import build
from edge_dfcil.training.checkpointing import blocks, recomputing
from edge_dfcil.training.stage import Stage
from tests.conftest import NAMES, QUICK, quick_learner, same_weights, weights


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("kB", 10**3), (" MB", 10**6), ("GiB", 2**30)]))
def test_sizes_are_read(number: int, unit: Any) -> None:
    assert parse(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize("size", ["", "MB", "-1MB", "0", "12 XB", "1e3", True, -5, 0, "1.2.3MB"])
def test_what_is_no_size_is_refused(size: str | bool | int) -> None:
    with pytest.raises(SettingError, match="is not a size"):
        parse(size)


def test_a_budget_is_read_when_it_is_set(learnt: Learner) -> None:
    learnt.memory_budget = "64MB"
    assert learnt.memory_budget == 64 * 10**6
    with pytest.raises(SettingError, match="is not a size"):
        learnt.memory_budget = "much"
    assert learnt.memory_budget == 64 * 10**6


class TestPlan:
    def test_says_what_each_stage_takes(self, learnt: Learner, train: Batches) -> None:
        plan = learnt.plan(train.of(("2", "3")), NAMES)
        assert [stage.name for stage in plan.stages] == ["dream", "learn", "refine"]
        for stage in plan.stages:
            assert stage.peak_bytes <= sum(stage.items.values())
            assert stage.items["weights"] > 0
        dream, learn, _ = plan.stages
        assert dream.items["generator"] > 0 and learn.items["generator"] == 0  # the generator is freed before this stage
        assert learn.items["pool of dreams"] == QUICK.remember.pool * (3 * 16**2 + 4 * (2 + 2))
        assert (
            learn.items["optimiser"]
            == learn.items["gradients"]
            == 4 * sum(p.numel() for p in learnt.network.grown(2).parameters())
        )
        assert plan.peak_bytes == max(stage.peak_bytes for stage in plan.stages)
        assert json.loads(json.dumps(plan.to_dict()))["budget"] is None
        assert "activations" in str(plan)

    @pytest.mark.slow
    def test_changes_nothing(self, learnt: Learner, train: Batches) -> None:
        before = weights(learnt)
        learnt.plan(train.of(("2", "3")), NAMES)
        assert same_weights(before, learnt) and learnt.classes == ("0", "1")

    @pytest.mark.slow
    def test_takes_a_batch_for_a_task(self, learnt: Learner, train: Batches) -> None:
        task = train.of(("2", "3"))
        plan = learnt.plan((task.images[:32], task.targets[:32]), NAMES)
        assert max(stage.at_once for stage in plan.stages) == 32

    @pytest.mark.parametrize(
        "settings",
        [{"method": "finetune"}, {"method": "lwf_mc"}, {"method": "lda"}, {"recipe": QUICK.changed({"remember.pool": 0})}],
    )
    @pytest.mark.slow
    def test_other_methods_and_fresh_dreams(self, train: Batches, settings: dict[str, Any]) -> None:
        learner = quick_learner(**settings)
        for names in (("0", "1"), ("2",)):
            assert learner.plan(train.of(names), NAMES).peak_bytes > 0
            learner.learn_task(train.of(names), NAMES, progress=False)

    def test_can_be_cancelled(self, learnt: Learner, train: Batches) -> None:
        class Loader(list[Any]):
            def __iter__(self) -> Any:
                learnt.cancel()
                return super().__iter__()

        batch = next(iter(train.of(("2", "3"))))
        with pytest.raises(Cancelled):
            learnt.plan(Loader([batch]), NAMES)

    @pytest.mark.slow
    def test_counts_the_weights_of_a_large_network(self) -> None:
        """In a separate process. Weights, gradients and momentum are most of the memory that a network of 45 MB takes."""
        done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
        weights, planned, taken = json.loads(done.stdout)
        assert planned > 3 * weights
        assert planned == pytest.approx(taken, rel=0.2)


LARGE = """
import json, torch
torch.set_num_threads(1)
from edge_dfcil import Learner
from tests.conftest import QUICK

torch.manual_seed(0)
loader = [(torch.rand(8, 3, 32, 32), torch.arange(8) % 2)] * 6
learner = Learner("resnet18", image_size=32, recipe=QUICK, device="cpu", memory_budget="400MB")
report = learner.learn_task(loader, ["a", "b"], progress=False)
weights = sum(p.nbytes for p in learner.network.parameters())
print(json.dumps([weights, report.plan.peak_bytes, report.stages[0].peak_bytes]))
"""


class Announced(Callback):
    """Records how often planning was announced, and whether that was before the first stage."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_plan_begin(self) -> None:
        self.calls.append("plan")

    def on_stage_begin(self, stage: Stage) -> None:
        if not self.calls or self.calls[-1] != "stages":
            self.calls.append("stages")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"), [({}, ["stages"]), ({"memory_budget": "8GB", "time_budget": "1h"}, ["plan", "stages"])]
)
def test_planning_is_announced_once_and_only_where_something_is_planned(
    train: Batches, settings: dict[str, Any], expected: list[str]
) -> None:
    learner = quick_learner(method="finetune", precision="float32", memory_budget=settings.get("memory_budget"))
    callback = Announced()
    time_budget = settings.get("time_budget")
    learner.learn_task(train.of(("0", "1")), NAMES, time_budget=time_budget, callbacks=[callback], progress=False)
    assert callback.calls == expected
    callback.calls.clear()
    learner.dream(2, callbacks=[callback], progress=False)
    assert callback.calls == expected


class TestRefusal:
    @pytest.mark.slow
    def test_says_what_is_needed_and_what_would_help(self, learnt: Learner, train: Batches) -> None:
        before = weights(learnt)
        learnt.memory_budget = 10_000
        with pytest.raises(BudgetError, match=r"needs [\d.]+ MB even with .*weights.*What would help.*") as refused:
            learnt.learn_task(train.of(("2", "3")), NAMES, progress=False)
        assert same_weights(before, learnt) and learnt.classes == ("0", "1")
        assert "budget of" in str(refused.value)

    def test_names_what_needs_less_and_nothing_else(self) -> None:
        def stages(peak: int) -> dict[str, Rehearsed]:
            return {"learn": Rehearsed(4, 32, peak, 0, {"weights": peak}, False)}

        others = [("image_size=16", lambda: stages(8_000_000)), ("backbone='resnet8'", lambda: stages(10_000_000))]
        found = re.findall(r"[\w'=]+ needs [\d.]+ MB", str(refusal(1_000_000, stages(10_000_000), others)))
        assert [one.split()[0] for one in found] == ["'learn'", "image_size=16"]
        least, smaller = (float(one.split()[-2]) for one in found)
        assert 8 <= smaller < least

    @pytest.mark.slow
    def test_a_smaller_image_and_backbone_are_tried(self, train: Batches) -> None:
        learner = Learner("resnet20", image_size=64, recipe=QUICK, device="cpu", memory_budget=10_000)
        assert [text for text, _ in learner.model.smaller()][-2:] == ["image_size=32", "backbone='resnet14'"]
        with pytest.raises(BudgetError, match="What would help: a budget of") as refused:
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        least, *smaller = map(float, re.findall(r"needs ([\d.]+) MB", str(refused.value)))
        assert all(one <= least for one in smaller), "which of them need less depends on the CPU's scratch memory"

    @pytest.mark.slow
    def test_features_of_one_scale_need_less_for_a_closed_form_head(self, train: Batches) -> None:
        learner = quick_learner(method="lda", memory_budget=10_000)
        with pytest.raises(BudgetError, match=r"a budget of [\d.]+ MB; multiscale=False needs [\d.]+ MB") as refused:
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        both, one = map(float, re.findall(r"(?:of|False needs) ([\d.]+) MB", str(refused.value))[-2:])
        between = int(1e6 * (both + one) / 2)
        plan = quick_learner(method="lda", multiscale=False, memory_budget=between).plan(train.of(("0", "1")), NAMES)
        assert plan.peak_bytes <= between


RESIDENT = """
from pathlib import Path

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
"""


WITHIN = (
    RESIDENT
    + """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from edge_dfcil import Learner
from edge_dfcil.demo import digits
from tests.conftest import NAMES, quick_learner

train, _ = digits()
found = []
learner = quick_learner(memory_budget=sys.argv[1])
for names in (("0", "1"), ("2", "3"), ("4", "5")):
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    report = learner.learn_task(train.of(names), NAMES, progress=False)
    found.append({"kernel": resident("VmHWM") - before, "report": report.to_dict()})
print(json.dumps(found))
"""
)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's own peak can be read on Linux only")
@pytest.mark.slow
def test_the_budget_holds_by_the_kernels_own_count() -> None:
    """In a separate process; the meter's peak is near the kernel's, and the plan is within the budget."""
    done = subprocess.run([sys.executable, "-c", WITHIN, "80MB"], capture_output=True, text=True, check=True)
    for task in json.loads(done.stdout):
        report = task["report"]
        assert task["kernel"] <= 80e6
        assert report["peak_bytes"] <= 80e6
        assert report["plan"]["peak_bytes"] <= 80e6
        assert abs(task["kernel"] - report["peak_bytes"]) < 6e6


class TestHolding:
    @pytest.mark.slow
    def test_a_budget_that_is_never_met_changes_nothing_that_is_learnt(self, train: Batches) -> None:
        found = []
        for budget in (None, "8GB"):
            learner = quick_learner(memory_budget=budget)
            for names in (("0", "1"), ("2", "3")):
                report = learner.learn_task(train.of(names), NAMES, progress=False)
            found.append(weights(learner))
            assert report.peak_bytes > 0
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    def test_a_real_lack_of_memory_halves_what_goes_through_at_once(self, train: Batches) -> None:
        learner = quick_learner(method=Greedy(8))
        report = learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        (stage,) = report.stages
        assert stage.halvings == 2 and stage.at_once == 8  # 32, 16, 8
        assert learner.classes == ("0", "1")

    def test_no_room_for_two_images_is_told_and_nothing_committed(self, train: Batches) -> None:
        learner = quick_learner(method=Greedy(1))
        with pytest.raises(BudgetError, match="nothing was committed"):
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert learner.classes == ()

    @pytest.mark.slow
    def test_the_pool_is_generated_as_few_at_once_as_the_generator_was_trained(
        self, learnt: Learner, train: Batches, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When memory ran out with more."""
        most: list[int] = []
        dream, noise = Dreamer.dream, Dreamer.noise

        class Wide(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                if images.requires_grad and len(images) > 8:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
                return images

        def counted(self: Dreamer, n: int) -> Dream:
            most.append(n)
            return dream(self, n)

        def wide(self: Dreamer, n: int) -> torch.Tensor:
            if not isinstance(self.generator, nn.Sequential):
                self.generator = nn.Sequential(self.generator, Wide())  # type: ignore[assignment]
            return noise(self, n)

        monkeypatch.setattr(Dreamer, "dream", counted)
        monkeypatch.setattr(Dreamer, "noise", wide)
        report = learnt.learn_task(train.of(("2", "3")), NAMES, progress=False)
        assert report.stages[0].at_once == max(most) == 8


class TestOtherOperations:
    """Generating, distilling, pruning and exporting keep to the budget as learning does."""

    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's own peak can be read on Linux only")
    @pytest.mark.slow
    def test_they_hold_it_by_the_kernels_own_count(self) -> None:
        done = subprocess.run([sys.executable, "-c", OTHERS, "64MB"], capture_output=True, text=True, check=True)
        for name, taken in json.loads(done.stdout).items():
            assert taken <= 64e6, name

    @pytest.mark.slow
    def test_one_that_is_too_small_is_refused_and_says_what_is_needed(self, learnt: Learner, tmp_path: Path) -> None:
        learnt.memory_budget = 10_000
        for operation in (
            lambda: learnt.dream(16),
            lambda: distill(learnt, "resnet8", progress=False),
            lambda: prune(learnt, Pruning(ratio=0.1), timing=False, progress=False),
            lambda: learnt.export(tmp_path / "model.onnx", "int8", force=True, progress=False),
        ):
            with pytest.raises(BudgetError, match=r"stage '\w+' needs [\d.]+ MB even with"):
                operation()
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_one_that_is_never_met_changes_no_image(self, learnt: Learner) -> None:
        expected = learnt.dream(24, progress=False)
        learnt.memory_budget = 8 * 10**9
        assert torch.equal(learnt.dream(24, progress=False), expected)

    @pytest.mark.slow
    def test_reports_have_the_peak_of_each_stage(self, learnt: Learner) -> None:
        learnt.memory_budget = 8 * 10**9
        settings = Distillation(rounds=2, dreams=64, steps=5, generator_steps=5)
        _, report = distill(learnt, "resnet8", settings=settings, progress=False)
        assert [stage.name for stage in report.stages] == ["dream", "distil"] * 2
        assert all(stage.peak_bytes for stage in report.stages)


OTHERS = (
    RESIDENT
    + """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from edge_dfcil import Learner
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.demo import digits
from tests.conftest import NAMES, quick_learner

train, _ = digits()
learner = quick_learner()
learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
learner.memory_budget = sys.argv[1]
short = Distillation(rounds=2, dreams=128, steps=20, generator_steps=20)
work = {
    "dream": lambda: learner.dream(256, progress=False),
    "best dreams": lambda: learner.dream(32, quality="best", progress=False),
    "distill": lambda: distill(learner, "resnet8", settings=short, progress=False),
    "prune": lambda: prune(learner, Pruning(ratio=0.2, repair=short), timing=False, progress=False),
}
import torch_pruning  # imported first, so that its memory is not counted as that of pruning
found = {}
for name, operation in work.items():
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    operation()
    found[name] = resident("VmHWM") - before
print(json.dumps(found))
"""
)


class Greedy(ABD):
    """Runs out of memory with more than `room` images."""

    def __init__(self, room: int) -> None:
        self.room = room

    def first_loss(self, task: Any, batch: Any) -> Any:
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().first_loss(task, batch)


class TestRecompute:
    @pytest.mark.parametrize("name", ["resnet8", "mobilenet_v3_small", "resnet18"])
    def test_learns_the_same_to_the_bit(self, name: str) -> None:
        found = []
        for again in (False, True):
            torch.manual_seed(0)
            network = build(name).train()
            images = torch.randn(4, 3, 32, 32)
            for _ in range(2):
                if again:
                    with recomputing([network]):
                        network(images).square().mean().backward()
                else:
                    network(images).square().mean().backward()
            found.append([*(p.grad for p in network.parameters() if p.grad is not None), *network.buffers()])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_leaves_the_network_as_it_was(self) -> None:
        network = build("resnet8")
        with recomputing([network]):
            assert all("forward" in vars(block) for block in blocks(network))
        assert not any("forward" in vars(block) for block in blocks(network))
        assert len(list(blocks(network))) == 3

    def test_a_chain_of_single_operations_has_no_blocks(self) -> None:
        assert list(blocks(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))) == []


@given(st.integers(1, 40), st.integers(0, 40), st.floats(0.1, 10))
@pytest.mark.slow
def test_a_pool_keeps_dreams_to_a_255th_of_their_range(front: int, back: int, scale: float) -> None:
    """The pool is written from both ends, and the gap between them is closed."""
    torch.manual_seed(front * 41 + back)
    network = quick_learner().network.grown(3)
    pool = Pool(front + back + 7, network, torch.device("cpu"))
    images, logits = scale * torch.randn(front + back, 3, 16, 16), torch.randn(front + back, 3)
    assert pool.write(0, front + back + 7, Dream(images[:front], logits[:front])) == front
    pool.write(front, front + back + 7, Dream(images[front:], logits[front:]), from_the_back=True)
    pool.close_gap(front, back)
    kept = pool[torch.arange(front + back)]
    assert torch.equal(kept.logits, logits) and len(pool) == front + back
    steps = (images.amax((1, 2, 3)) - images.amin((1, 2, 3))) / 255
    assert ((kept.images - images).abs().amax((1, 2, 3)) <= 0.51 * steps).all()


class Allocator:
    """A fake of CUDA's allocator: the bytes that it reserves, their peak, and the share of memory that it may use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reserved = self.most = 0
        self.cached = 0
        self.shares: list[Any] = []
        fakes = {
            "memory_reserved": lambda device: self.reserved + self.cached,
            "max_memory_reserved": lambda device: self.most,
            "reset_peak_memory_stats": lambda device: setattr(self, "most", self.reserved + self.cached),
            "empty_cache": lambda: setattr(self, "cached", 0),
            "get_device_properties": lambda device: SimpleNamespace(total_memory=1000),
            "set_per_process_memory_fraction": lambda share, device: self.shares.append(share),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def take(self, n: int) -> None:
        self.reserved += n
        self.most = max(self.most, self.reserved + self.cached)

    def free(self, n: int) -> None:
        self.reserved, self.cached = self.reserved - n, self.cached + n


def test_on_cuda_it_is_what_the_allocator_reserves_above_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, device = Allocator(monkeypatch), torch.device("cuda")
    allocator.take(100)
    allocator.free(30)
    with Meter(device) as meter:
        assert meter.level == 70, "the free cache is released first"
        meter.reset()
        allocator.take(50)
        allocator.free(50)
        assert (meter.peak, meter.now) == (50, 0)
        meter.reset()
        allocator.take(20)
        assert (meter.peak, meter.highest) == (20, 50), "each stage has its own peak"
        meter.exclude()
        meter.reset()
        assert (meter.level, meter.peak) == (90, 0)


def test_on_cuda_the_allocator_is_capped_at_the_budget_and_freed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator, device = Allocator(monkeypatch), torch.device("cuda")
    allocator.take(100)
    with Meter(device) as meter, suppress(torch.OutOfMemoryError), capped(meter, device, budget=400):
        assert allocator.shares == [0.5], "level plus budget, as a share of the device's memory"
        raise torch.OutOfMemoryError
    assert allocator.shares == [0.5, 1.0]
    with Meter(device) as meter, capped(meter, device, budget=None), capped(meter, torch.device("cpu"), budget=400):
        assert len(allocator.shares) == 2, "no cap without a budget, and none on a device without this allocator"
