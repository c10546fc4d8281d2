"""Smaller models without data: what they keep, how small they are, and that they go on like any other."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from edge_dfcil import BackboneError, DataError, Learner, NotLearnedError, SettingError
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.compression.latency import LatencyTable, Shape, measure_convolution
from edge_dfcil.compression.pruning import Cutter
from edge_dfcil.dreaming.inversion import Dream
from edge_dfcil.model.backbones import batchnorm_layers, build
from exporters import OnnxClassifier
from tests.conftest import NAMES, QUICK, quick_learner, same_weights, weights

KNOWN = ("0", "1", "2")
SHORT = Distillation(rounds=3, dreams=128, generator_steps=20, steps=40, batch=32)
REPAIR = replace(SHORT, learning_rate=0.02)


@pytest.fixture(scope="module")
def able(train):
    learner = quick_learner(
        recipe=QUICK.changed(
            {"schedule.min_steps": 120, "schedule.learning_rate": 0.05, "generator.steps": 60, "schedule.weight_decay": 1e-4}
        )
    )
    learner.learn_task(train.of(KNOWN), NAMES, progress=False)
    return learner


@pytest.fixture
def known(test):
    return [*test.of(KNOWN)]


def flops(shape: Shape) -> float:
    """A table in which time is work, so that tests do not depend on the machine."""
    return shape.flops / 1e6


@pytest.fixture
def table(tmp_path):
    return LatencyTable(tmp_path / "latency.json", flops)


def test_a_student_learns_from_dreams_alone(able, known):
    before = weights(able)
    student, report = distill(able, "resnet14", settings=SHORT, evaluation=known, classes=NAMES, progress=False)
    assert same_weights(before, able)
    assert (student.backbone, student.classes, student.tasks) == ("resnet14", able.classes, able.tasks)
    assert (report.teacher, report.student) == ("resnet8", "resnet14")
    assert report.parameters[0] < report.parameters[1]
    assert report.dreams == 3 * 128
    teacher, learnt = report.accuracy
    assert teacher > 0.95
    assert learnt == student.evaluate(known, NAMES).accuracy > 0.6, "a third would be chance"
    assert report.agreement > 0.6
    assert [stage.name for stage in report.stages] == ["dream", "distil"] * 3
    assert report.stages[0].losses["content"] < 0.05, "the teacher is sure of its dreams; a tenth of ln 3 would be no idea"
    assert "competition" not in report.stages[0].losses, "an untrained student has nothing to compete with"
    assert "competition" in report.stages[2].losses


def test_it_is_the_same_under_one_seed_and_leaves_the_callers_random_state_alone(able):
    short = replace(SHORT, rounds=1, steps=3)
    state = torch.get_rng_state()
    first, again = (distill(able, "resnet8", settings=short, progress=False)[0] for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert same_weights(weights(first), again)


def test_noise_teaches_less(able, known):
    scratch = replace(SHORT, inherit=False)
    _, dreamt = distill(able, "resnet8", settings=scratch, evaluation=known, classes=NAMES, progress=False)
    noise = replace(scratch, source="noise")
    _, random = distill(able, "resnet8", settings=noise, evaluation=known, classes=NAMES, progress=False)
    assert random.dreams == 0
    assert random.accuracy[1] < dreamt.accuracy[1]


def test_a_student_begins_with_what_it_shares_with_its_teacher(able):
    still = replace(SHORT, rounds=1, steps=1, learning_rate=1e-9)
    for inherit, share in ((True, 0.9), (False, 0.7)):
        _, report = distill(able, "resnet8", settings=replace(still, inherit=inherit), progress=False)
        assert (report.agreement > share) == inherit


def test_a_students_running_statistics_keep_up_with_a_short_lesson(able, known):
    """A network answers by them; torchvision's MobileNetV3 lets them follow slowly."""
    slow = build("resnet8")
    for layer in batchnorm_layers(slow):
        layer.momentum = 0.001
    scratch = replace(SHORT, inherit=False)
    _, report = distill(able, slow, settings=scratch, evaluation=known, classes=NAMES, progress=False)
    assert report.accuracy[1] > 0.6, "a third would be chance"
    assert {layer.momentum for layer in batchnorm_layers(slow)} == {0.001}, "the caller's own is copied"


def test_pixel_dreams_teach_too(able):
    short = replace(SHORT, rounds=2, dreams=32, steps=3, quality="best")
    learner = copy.deepcopy(able)
    learner.recipe = able.recipe.changed({"pixels.steps": 4, "pixels.batch": 32})
    _, report = distill(learner, "resnet8", settings=short, progress=False)
    assert [stage.name for stage in report.stages][:4] == ["dream", "distil", "dream", "distil"]


def test_a_student_goes_on(able, train, test, tmp_path):
    student, _ = distill(able, "resnet14", settings=replace(SHORT, rounds=1, steps=5), progress=False)
    goes_on(student, train, test, tmp_path)


def goes_on(learner, train, test, folder):
    """It predicts, is saved and loaded, exports, and learns the next task."""
    images = test.images[:8]
    loaded = Learner.load(learner.save(folder / "m"), "cpu")
    assert loaded.predict(images) == learner.predict(images)
    learner.export(folder / "m.onnx")
    exported = OnnxClassifier(folder / "m.onnx").predict(images.numpy())
    assert [answer.label for answer in exported] == [answer.label for answer in learner.predict(images)]
    loaded.learn_task(train.of(("3",)), NAMES, progress=False)
    assert loaded.classes == (*KNOWN, "3")
    assert Learner.load(loaded.save(folder / "n"), "cpu").predict(images) == loaded.predict(images)


def test_pruned_by_ratio_it_is_smaller_and_repaired(able, known, table, train, test, tmp_path):
    before = weights(able)
    setting = Pruning(ratio=0.4, group=4, repair=REPAIR)
    smaller, report = prune(able, setting, table=table, evaluation=known, classes=NAMES, progress=False)
    assert same_weights(before, able)
    assert report.filters[1] <= 0.6 * report.filters[0]
    assert report.parameters == tuple(sum(p.numel() for p in one.network.parameters()) for one in (able, smaller))
    assert report.parameters[1] < report.parameters[0]
    assert report.flops[1] < report.flops[0]
    modules = dict(smaller.network.backbone.named_modules())
    assert report.channels
    assert all(modules[name].out_channels == n and n % 4 == 0 for name, n in report.channels.items())
    whole, broken, repaired = report.accuracy
    assert broken < whole - 0.1, "so much hurts"
    assert repaired > whole - 0.1
    assert repaired == smaller.evaluate(known, NAMES).accuracy
    goes_on(smaller, train, test, tmp_path)


def test_what_counts_is_what_is_measured_on_the_network(able, table):
    """Work by hand: the convolutions of a resnet8 at 16 px."""
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
    assert all(value > 0 for value in report.milliseconds)


def test_latency_that_counts_takes_channels_where_they_cost_time(able, tmp_path):
    """With a table in which only the first stage costs anything, and great weight on it, that stage is pruned first."""

    def dear(shape: Shape) -> float:
        return shape.flops / 1e6 if shape.height == 16 and shape.stride == 1 else 0.0

    for eta, only_there in ((1000.0, True), (0.0, False)):
        setting = Pruning(latency=0.7, group=4, eta=eta, repair=None)
        _, report = prune(able, setting, table=LatencyTable(tmp_path / f"{eta}", dear), progress=False)
        assert report.table_milliseconds[1] <= 0.7 * report.table_milliseconds[0]
        first = [name for name in report.channels if name.startswith("stages.0")]
        assert first
        assert (len(report.channels) == len(first)) == only_there


def test_the_latency_term_sees_kernels_that_work_in_blocks(able, tmp_path):
    """Where a layer is no faster before several groups have gone, they go together, and no channel goes in vain."""

    def in_blocks(shape: Shape) -> float:
        blocks = [-(-channels // 8) for channels in (shape.channels_in, shape.channels_out)]
        return float(blocks[0] * blocks[1] * shape.height**2)

    found = {}
    for eta in (1000.0, 0.0):
        setting = Pruning(latency=0.6, group=2, eta=eta, repair=None)
        _, found[eta] = prune(able, setting, table=LatencyTable(tmp_path / f"{eta}", in_blocks), progress=False)
    assert all(channels % 8 == 0 for channels in found[1000.0].channels.values())
    assert any(channels % 8 for channels in found[0.0].channels.values())
    assert found[1000.0].filters[1] > found[0.0].filters[1], "as fast with more filters"


def test_channels_that_do_nothing_leave_first(able, table):
    learner = copy.deepcopy(able)
    block = learner.network.backbone.stages[1][0]
    with torch.no_grad():
        for parameter in block.bn1.parameters():
            parameter[3::4] = 0  # 8 of 32
    smaller, report = prune(learner, Pruning(ratio=0.03, group=8, eta=0.0, repair=None), table=table, progress=False)
    assert report.channels == {"stages.1.0.conv1": 24}
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(smaller.network(images), learner.network(images), atol=1e-5)


def test_depthwise_layers_and_residuals_of_a_mobilenet(train, test, table, tmp_path):
    learner = Learner("mobilenet_v3_small", image_size=32, recipe=QUICK, device="cpu")
    learner.learn_task(train.of(KNOWN), NAMES, progress=False)
    smaller, report = prune(learner, Pruning(ratio=0.3, repair=None, rounds=3), table=table, progress=False)
    assert report.filters[1] <= 0.7 * report.filters[0]
    assert smaller.network.head.in_features <= learner.network.head.in_features
    assert Learner.load(smaller.save(tmp_path / "m"), "cpu").predict(test.images[:4]) == smaller.predict(test.images[:4])


def test_what_would_be_saved_is_what_is_saved(train, tmp_path):
    """The latency that a step of pruning promises, against the network that it leaves; depthwise layers among it."""
    shapes = []

    def measure(shape: Shape) -> float:
        assert min(shape.channels_in, shape.channels_out, shape.groups) > 0
        shapes.append(shape)
        return flops(shape)

    learner = Learner("mobilenet_v3_small", image_size=32, recipe=QUICK, device="cpu")
    learner.learn_task(train.of(KNOWN), NAMES, progress=False)
    teacher = learner.network.frozen()
    images = torch.randn(4, 3, 32, 32)
    cutter = Cutter(
        learner.network.grown(0),
        Dream(images, teacher.classify(images)),
        Pruning(ratio=0.1),
        LatencyTable(tmp_path / "t", measure),
    )
    for root in list(cutter.roots):
        before, now = cutter.now.milliseconds, list(range(8))
        promised = cutter.saved(root, now)
        cutter.group(root, now).prune()
        assert before - cutter.now.milliseconds == pytest.approx(promised)


def test_the_table_is_measured_once_and_kept(tmp_path):
    asked = []

    def measure(shape):
        asked.append(shape)
        return 1.5

    shape = Shape(16, 16, 3, 1, 1, 8, 8)
    path = tmp_path / "cache" / "latency.json"
    first = LatencyTable(path, measure)
    assert first(shape) == first(shape) == 1.5
    first.save()
    assert LatencyTable(path, measure)(shape) == 1.5
    assert asked == [shape]
    path.write_text("{damaged")
    assert LatencyTable(path, measure)(replace(shape, stride=2)) == 1.5
    assert measure_convolution(shape) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of ratio"),
        ({"ratio": 0.2, "flops": 0.5}, "give one of ratio"),
        ({"ratio": 1.0}, "above 0 and below 1"),
        ({"latency": 0.5, "group": 0}, "too small"),
    ],
)
def test_targets_that_are_none(settings, message):
    with pytest.raises(SettingError, match=message):
        Pruning(**settings)


def test_what_cannot_be_done_is_told(able, table):
    with pytest.raises(BackboneError, match=r"cannot be met.*Ask for less"):
        prune(able, Pruning(ratio=0.9, repair=None), table=table, progress=False)
    with pytest.raises(BackboneError, match="of which some can be taken away"):
        prune(able, Pruning(ratio=0.1, group=64, repair=None), table=table, progress=False)
    with pytest.raises(NotLearnedError):
        prune(quick_learner(), Pruning(ratio=0.1))
    with pytest.raises(NotLearnedError):
        distill(quick_learner(), "resnet8")
    with pytest.raises(BackboneError, match="resnet9"):
        distill(able, "resnet9")
    with pytest.raises(DataError, match="no image"):
        distill(able, "resnet8", evaluation=[])
    with pytest.raises(SettingError, match="rounds is 0"):
        Distillation(rounds=0)
    with pytest.raises(SettingError, match="source='air'"):
        Distillation(source="air")


def test_reports_are_json(able, table):
    _, report = prune(able, Pruning(ratio=0.1, group=4, repair=None), table=table, progress=False)
    assert json.loads(json.dumps(report.to_dict()))["filters"] == list(report.filters)
