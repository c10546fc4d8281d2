"""Smaller models without data: what they keep, how small they are, and that they learn further tasks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil import BackboneError, DataError, Learner, NotLearnedError, SettingError
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.compression.latency import LatencyTable, Shape, measure_convolution
from edge_dfcil.compression.pruning import Cutter
from edge_dfcil.demo import Batches
from edge_dfcil.dreaming.inversion import Dream
from edge_dfcil.model.backbones import batchnorm_layers, build
from exporters import OnnxClassifier
from tests.conftest import NAMES, QUICK, quick_learner, same_weights, weights

KNOWN = ("0", "1", "2")
SHORT = Distillation(rounds=3, dreams=128, generator_steps=20, steps=40, batch=32)
REPAIR = replace(SHORT, learning_rate=0.02)


@pytest.fixture(scope="module")
def able(train: Batches) -> Learner:
    learner = quick_learner(
        recipe=QUICK.changed(
            {"schedule.min_steps": 120, "schedule.learning_rate": 0.05, "generator.steps": 60, "schedule.weight_decay": 1e-4}
        )
    )
    learner.learn_task(train.of(KNOWN), NAMES, progress=False)
    return learner


@pytest.fixture
def known(test: Batches) -> list[Any]:
    return [*test.of(KNOWN)]


def flops(shape: Shape) -> float:
    """A latency that is proportional to the FLOPs, so that tests do not depend on the machine."""
    return shape.flops / 1e6


@pytest.fixture
def table(tmp_path: Path) -> LatencyTable:
    return LatencyTable(tmp_path / "latency.json", flops)


class Grouped(nn.Module):
    """Grouped, depthwise and plain convolutions around a residual, and two grouped ones with other groups on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = self.block(3, 16), self.block(16, 48, groups=4)
        self.two, self.three = self.block(48, 48, groups=8), self.block(48, 48, groups=4)
        self.deep, self.last = self.block(48, 48, groups=48), self.block(48, 16)

    @staticmethod
    def block(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1, groups=groups), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.stem(F.max_pool2d(x, 4)))
        return self.last(self.deep(self.two(x) + self.three(x))).mean((2, 3))


class Halved(nn.Module):
    """Cuts the channels of its first convolution into halves, each for another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Grouped.block(3, 32), Grouped.block(32, 16)
        self.left, self.right = Grouped.block(16, 16), Grouped.block(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.first(F.max_pool2d(x, 4)).chunk(2, 1)
        return self.last(torch.cat([self.left(left), self.right(right)], 1)).mean((2, 3))


def taught(backbone: nn.Module, train: Batches) -> Learner:
    learner = Learner(backbone, image_size=16, recipe=QUICK, device="cpu")
    learner.learn_task(train.of(KNOWN), NAMES, progress=False)
    return learner


@pytest.mark.slow
def test_a_student_learns_from_dreams_alone(able: Learner, known: list[Any]) -> None:
    before = weights(able)
    student, report = distill(able, "resnet14", settings=SHORT, evaluation=known, classes=NAMES, progress=False)
    assert same_weights(before, able)
    assert (student.backbone, student.classes, student.tasks) == ("resnet14", able.classes, able.tasks)
    assert (report.teacher, report.student) == ("resnet8", "resnet14")
    assert report.parameters[0] < report.parameters[1]
    assert report.dreams == 3 * 128
    assert report.accuracy is not None
    teacher, learnt = report.accuracy
    assert teacher > 0.95
    assert learnt == student.evaluate(known, NAMES).accuracy > 0.6, "a third would be chance"
    assert report.agreement > 0.6
    assert [stage.name for stage in report.stages] == ["dream", "distil"] * 3
    assert report.stages[0].losses["content"] < 0.05, "the teacher is sure of its dreams; a tenth of ln 3 would be chance"
    assert "competition" not in report.stages[0].losses, "an untrained student has nothing to compete with"
    assert "competition" in report.stages[2].losses


@pytest.mark.slow
def test_it_is_the_same_under_one_seed_and_leaves_the_callers_random_state_alone(able: Learner) -> None:
    short = replace(SHORT, rounds=1, steps=3)
    state = torch.get_rng_state()
    first, again = (distill(able, "resnet8", settings=short, progress=False)[0] for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert same_weights(weights(first), again)


@pytest.mark.slow
def test_noise_teaches_less(able: Learner, known: list[Any]) -> None:
    scratch = replace(SHORT, inherit=False)
    _, inverted = distill(able, "resnet8", settings=scratch, evaluation=known, classes=NAMES, progress=False)
    noise = replace(scratch, source="noise")
    _, random = distill(able, "resnet8", settings=noise, evaluation=known, classes=NAMES, progress=False)
    assert random.dreams == 0
    assert random.accuracy is not None and inverted.accuracy is not None
    assert random.accuracy[1] < inverted.accuracy[1]


@pytest.mark.slow
def test_a_student_begins_with_what_it_shares_with_its_teacher(able: Learner) -> None:
    still = replace(SHORT, rounds=1, steps=1, learning_rate=1e-9)
    for inherit, share in ((True, 0.9), (False, 0.7)):
        _, report = distill(able, "resnet8", settings=replace(still, inherit=inherit), progress=False)
        assert (report.agreement > share) == inherit


@pytest.mark.slow
def test_a_students_running_statistics_keep_up_with_a_short_lesson(able: Learner, known: list[Any]) -> None:
    """A network predicts with them; torchvision's MobileNetV3 updates them slowly."""
    slow = build("resnet8")
    for layer in batchnorm_layers(slow):
        layer.momentum = 0.001
    scratch = replace(SHORT, inherit=False)
    _, report = distill(able, slow, settings=scratch, evaluation=known, classes=NAMES, progress=False)
    assert report.accuracy is not None and report.accuracy[1] > 0.6, "a third would be chance"
    assert {layer.momentum for layer in batchnorm_layers(slow)} == {0.001}, "the caller's module is copied"


@pytest.mark.slow
def test_pixel_dreams_teach_too(able: Learner) -> None:
    short = replace(SHORT, rounds=2, dreams=32, steps=3, quality="best")
    learner = copy.deepcopy(able)
    learner.recipe = able.recipe.changed({"pixels.steps": 4, "pixels.batch": 32})
    _, report = distill(learner, "resnet8", settings=short, progress=False)
    assert [stage.name for stage in report.stages][:4] == ["dream", "distil", "dream", "distil"]


@pytest.mark.slow
def test_a_student_goes_on(able: Learner, train: Batches, test: Batches, tmp_path: Path) -> None:
    student, _ = distill(able, "resnet14", settings=replace(SHORT, rounds=1, steps=5), progress=False)
    goes_on(student, train, test, tmp_path)


def goes_on(learner: Learner, train: Batches, test: Batches, folder: Path, export: Any = False) -> None:
    """It predicts, is saved and loaded, exports, and learns the next task."""
    images = test.images[:8]
    loaded = Learner.load(learner.save(folder / "m"), "cpu")
    assert loaded.predict(images) == learner.predict(images)
    if export:
        learner.export(folder / "m.onnx")
        exported = OnnxClassifier(folder / "m.onnx").predict(images.numpy())
        assert [answer.label for answer in exported] == [answer.label for answer in learner.predict(images)]
    loaded.learn_task(train.of(("3",)), NAMES, progress=False)
    assert loaded.classes == (*KNOWN, "3")
    assert Learner.load(loaded.save(folder / "n"), "cpu").predict(images) == loaded.predict(images)


@pytest.mark.slow
def test_pruned_by_ratio_it_is_smaller_and_repaired(
    able: Learner, known: list[Any], table: LatencyTable, train: Batches, test: Batches, tmp_path: Path
) -> None:
    before = weights(able)
    setting = Pruning(ratio=0.4, group=4, repair=REPAIR)
    smaller, report = prune(able, setting, table=table, evaluation=known, classes=NAMES, timing=False, progress=False)
    assert same_weights(before, able)
    assert report.filters[1] <= 0.6 * report.filters[0]
    assert report.parameters == tuple(sum(p.numel() for p in one.network.parameters()) for one in (able, smaller))
    assert report.parameters[1] < report.parameters[0]
    assert report.flops[1] < report.flops[0]
    modules = dict(smaller.network.backbone.named_modules())
    assert report.channels
    assert all(modules[name].out_channels == n and n % 4 == 0 for name, n in report.channels.items())
    assert report.accuracy is not None
    whole, broken, repaired = report.accuracy
    assert broken < whole - 0.1, "so much pruning costs accuracy"
    assert repaired > whole - 0.1
    assert repaired == smaller.evaluate(known, NAMES).accuracy
    goes_on(smaller, train, test, tmp_path, export=True)


@pytest.mark.slow
def test_what_counts_is_what_is_measured_on_the_network(able: Learner, table: LatencyTable) -> None:
    """FLOPs by hand: the convolutions of a resnet8 at 16 px."""
    _, report = prune(able, Pruning(flops=0.8, group=4, repair=None), table=table, progress=False)
    expected = 0
    for layer, side in zip(
        [m for m in able.network.backbone.modules() if isinstance(m, nn.Conv2d)], (16, 16, 16, 8, 8, 4, 4), strict=True
    ):
        expected += 2 * 9 * layer.in_channels * layer.out_channels * side**2
    assert report.flops[0] == expected + 2 * 64 * 3
    assert report.flops[1] <= 0.8 * report.flops[0]
    assert report.agreement is None and len(report.stages) == 1
    assert report.table_milliseconds[0] == pytest.approx(expected / 1e6)
    assert report.milliseconds is not None and all(value > 0 for value in report.milliseconds)


@pytest.mark.slow
def test_latency_that_counts_takes_channels_where_they_cost_time(able: Learner, tmp_path: Path) -> None:
    """With a table in which only the first stage costs time, and a large weight on time, that stage is pruned first."""

    def dear(shape: Shape) -> float:
        return shape.flops / 1e6 if shape.height == 16 and shape.stride == 1 else 0.0

    for eta, only_there in ((1000.0, True), (0.0, False)):
        setting = Pruning(latency=0.7, group=4, eta=eta, repair=None)
        _, report = prune(able, setting, table=LatencyTable(tmp_path / f"{eta}", dear), timing=False, progress=False)
        assert report.table_milliseconds[1] <= 0.7 * report.table_milliseconds[0]
        first = [name for name in report.channels if name.startswith("stages.0")]
        assert first
        assert (len(report.channels) == len(first)) == only_there


@pytest.mark.slow
def test_the_latency_term_sees_kernels_that_work_in_blocks(able: Learner, tmp_path: Path) -> None:
    """Where a layer becomes faster only after several groups are removed, they go together, and none goes without a gain."""

    def in_blocks(shape: Shape) -> float:
        blocks = [-(-channels // 8) for channels in (shape.channels_in, shape.channels_out)]
        return float(blocks[0] * blocks[1] * shape.height**2)

    found = {}
    for eta in (1000.0, 0.0):
        setting = Pruning(latency=0.6, group=2, eta=eta, repair=None)
        _, found[eta] = prune(able, setting, table=LatencyTable(tmp_path / f"{eta}", in_blocks), timing=False, progress=False)
    assert all(channels % 8 == 0 for channels in found[1000.0].channels.values())
    assert any(channels % 8 for channels in found[0.0].channels.values())
    assert found[1000.0].filters[1] > found[0.0].filters[1], "equally fast with more filters"


@pytest.mark.slow
def test_channels_that_do_nothing_leave_first(able: Learner, table: LatencyTable) -> None:
    learner = copy.deepcopy(able)
    backbone: Any = learner.network.backbone
    block = backbone.stages[1][0]
    with torch.no_grad():
        for parameter in block.bn1.parameters():
            parameter[3::4] = 0  # 8 of 32
    smaller, report = prune(
        learner, Pruning(ratio=0.03, group=8, eta=0.0, repair=None), table=table, timing=False, progress=False
    )
    assert report.channels == {"stages.1.0.conv1": 24}
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(smaller.network(images), learner.network(images), atol=1e-5)


@pytest.mark.slow
def test_depthwise_layers_and_residuals_of_a_mobilenet(
    train: Batches, test: Batches, table: LatencyTable, tmp_path: Path
) -> None:
    learner = Learner("mobilenet_v3_small", image_size=32, recipe=QUICK, device="cpu")
    learner.learn_task(train.of(KNOWN), NAMES, progress=False)
    smaller, report = prune(learner, Pruning(ratio=0.3, repair=None, rounds=3), table=table, timing=False, progress=False)
    assert report.filters[1] <= 0.7 * report.filters[0]
    assert smaller.network.head.in_features <= learner.network.head.in_features
    assert Learner.load(smaller.save(tmp_path / "m"), "cpu").predict(test.images[:4]) == smaller.predict(test.images[:4])


def test_what_would_be_saved_is_what_is_saved(train: Batches, tmp_path: Path) -> None:
    """The latency that a step of pruning promises is that of the network after it, also with depthwise and grouped layers."""
    shapes = []

    def measure(shape: Shape) -> float:
        assert min(shape.channels_in, shape.channels_out, shape.groups) > 0
        shapes.append(shape)
        return flops(shape)

    learner = taught(Grouped(), train)
    teacher = learner.network.frozen()
    images = torch.randn(4, 3, 16, 16)
    cutter = Cutter(
        learner.network.grown(0),
        Dream(images, teacher.classify(images)),
        Pruning(ratio=0.1),
        LatencyTable(tmp_path / "t", measure),
    )
    assert len(cutter.roots) == 4
    for root in cutter.roots:
        before, now = cutter.now.milliseconds, cutter._units(root)[0]
        promised = cutter.saved(root, now)
        cutter.group(root, now).prune()
        assert before - cutter.now.milliseconds == pytest.approx(promised)


def answers_as_masked(learner: Learner, settings: Pruning, table: LatencyTable) -> Cutter:
    """Prunes a copy; after each cut the answer must be that with zeroed channels, which the cutter checks."""
    network, images = learner.network.grown(0), torch.randn(8, 3, 16, 16)
    cutter = Cutter(network, Dream(images, network.classify(images).detach()), settings, table)
    cutter.cut()
    with torch.no_grad():
        assert network(torch.rand(2, 3, 16, 16)).isfinite().all()
    return cutter


def test_the_groups_of_grouped_convolutions_stay_alike(
    train: Batches, test: Batches, table: LatencyTable, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    learner = taught(Grouped(), train)
    settings = Pruning(ratio=0.3, group=4, repair=None, dreams=32, rounds=3)
    smaller, report = prune(learner, settings, table=table, timing=False, progress=False)
    assert report.filters[1] <= 0.7 * report.filters[0]
    assert report.milliseconds is None and "ms for one image" not in str(report)
    layers = [layer for layer in smaller.network.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.groups for layer in layers][:4] == [1, 4, 8, 4]
    assert layers[2].out_channels < 48, "grouped ones are among those that lost channels"
    assert all(layer.out_channels % layer.groups == layer.in_channels % layer.groups == 0 for layer in layers)
    loaded = Learner.load(smaller.save(tmp_path / "m"), "cpu", backbone=Grouped())
    assert loaded.predict(test.images[:4]) == smaller.predict(test.images[:4])


def test_a_layer_that_is_cut_into_halves_is_left_alone_or_followed(train: Batches, table: LatencyTable) -> None:
    cutter = answers_as_masked(taught(Halved(), train), Pruning(ratio=0.2, group=4, repair=None), table)
    assert cutter.now.filters <= 0.8 * cutter.before.filters


def test_channels_that_are_shuffled_are_refused_with_a_reason(table: LatencyTable) -> None:
    network = Learner("shufflenet_v2_x0_5", image_size=32, recipe=QUICK, device="cpu").network.grown(3).eval()
    images = torch.randn(4, 3, 32, 32)
    with pytest.raises(BackboneError, match=r"shuffles channels.*distil"):
        Cutter(network, Dream(images, network.classify(images).detach()), Pruning(ratio=0.1), table)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_can_be_pruned_does_not_depend_on_the_size_of_the_logits(able: Learner, table: LatencyTable, scale: float) -> None:
    network, images = able.network.grown(0).eval(), torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        network.head.weight.mul_(scale)
        network.head.bias.mul_(scale)
    cutter = Cutter(network, Dream(images, network.classify(images).detach()), Pruning(ratio=0.1, group=4), table)
    assert sorted(cutter._names[root] for root in cutter.roots) == ["stages.0.0.conv1", "stages.1.0.conv1", "stages.2.0.conv1"]


def test_the_table_needs_no_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container whose user has no home folder; a cache folder that cannot be written to is no error either."""

    def no_home() -> None:
        raise RuntimeError("Could not determine home directory.")

    shape = Shape(16, 16, 3, 1, 1, 8, 8)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    table = LatencyTable(measure=flops)
    assert table(shape) == flops(shape)
    table.save()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = LatencyTable(measure=flops)
    table(shape)
    table.save()
    (kept,) = (tmp_path / "cache" / "edge-dfcil").iterdir()
    assert list(json.loads(kept.read_text()).values()) == [flops(shape)]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    LatencyTable(measure=flops).save()


@pytest.mark.parametrize("damage", ["{damaged", "[]", "null", '{"16-16-3-1-1-8-8": "slow"}', '{"16-16-3-1-1-8-8": NaN}', "\xff"])
def test_a_damaged_table_is_measured_again(tmp_path: Path, damage: str) -> None:
    path, shape = tmp_path / "latency.json", Shape(16, 16, 3, 1, 1, 8, 8)
    path.write_bytes(damage.encode("latin-1"))
    assert LatencyTable(path, flops)(shape) == flops(shape)


def test_the_table_is_measured_once_and_kept(tmp_path: Path) -> None:
    asked = []

    def measure(shape: Any) -> float:
        asked.append(shape)
        return 1.5

    shape = Shape(16, 16, 3, 1, 1, 8, 8)
    path = tmp_path / "cache" / "latency.json"
    first = LatencyTable(path, measure)
    assert first(shape) == first(shape) == 1.5
    first.save()
    assert LatencyTable(path, measure)(shape) == 1.5
    assert asked == [shape]
    assert measure_convolution(shape) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of ratio"),
        ({"ratio": 0.2, "flops": 0.5}, "give one of ratio"),
        ({"ratio": 1.0}, "Pruning.ratio is 1.0; it must be below 1 or None"),
        ({"flops": float("nan")}, "Pruning.flops is nan; it must be a finite number"),
        ({"latency": 0.5, "group": 0}, "Pruning.group is 0; it must be at least 1"),
        ({"latency": 0.5, "repair": True}, "Pruning.repair is True"),
        ({"ratios": 0.5}, "has no setting 'ratios'; did you mean 'ratio'"),
    ],
)
def test_targets_that_are_none(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Pruning(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "Distillation.rounds is 0; it must be at least 1"),
        ({"steps": True}, "Distillation.steps is True; it must be a whole number"),
        ({"learning_rate": float("inf")}, "Distillation.learning_rate is inf; it must be a finite number"),
        ({"source": "air"}, "Distillation.source is 'air'; it must be 'adaptive', 'dreams' or 'noise'"),
    ],
)
def test_a_distillation_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Distillation(**settings)


def test_settings_of_another_kind() -> None:
    with pytest.raises(SettingError, match="pass a Distillation"):
        distill(quick_learner(), "resnet8", settings={"rounds": 1})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="pass a Pruning"):
        prune(quick_learner(), 0.5)  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_cannot_be_done_is_refused(able: Learner, table: LatencyTable) -> None:
    with pytest.raises(BackboneError, match=r"cannot be met.*Ask for less"):
        prune(able, Pruning(ratio=0.9, repair=None), table=table, timing=False, progress=False)
    with pytest.raises(BackboneError, match="of which some can be removed"):
        prune(able, Pruning(ratio=0.1, group=64, repair=None), table=table, timing=False, progress=False)
    with pytest.raises(NotLearnedError):
        prune(quick_learner(), Pruning(ratio=0.1))
    with pytest.raises(NotLearnedError):
        distill(quick_learner(), "resnet8")
    with pytest.raises(BackboneError, match="resnet9"):
        distill(able, "resnet9")
    with pytest.raises(DataError, match="no image"):
        distill(able, "resnet8", evaluation=[])


@pytest.mark.slow
def test_reports_are_json(able: Learner, table: LatencyTable) -> None:
    _, report = prune(able, Pruning(ratio=0.1, group=4, repair=None), table=table, timing=False, progress=False)
    assert json.loads(json.dumps(report.to_dict()))["filters"] == list(report.filters)
