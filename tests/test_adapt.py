"""When the backbone is trained: `frozen` trains one from scratch in the first task only, and a pretrained one never."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edge_dfcil import Learner, Model
from edge_dfcil.demo import Batches
from edge_dfcil.model.backbones import build
from tests.conftest import NAMES, QUICK, quick_learner, slow_but

FIRST = QUICK.changed({"schedule.adapt": "first", "refine.head": "lda"})


def stages_of(learner: Learner, train: Batches, *tasks: tuple[str, ...]) -> list[list[str]]:
    return [[stage.name for stage in learner.learn_task(train.of(names), NAMES, progress=False).stages] for names in tasks]


def pretrained(train: Batches) -> nn.Module:
    """A backbone that has learnt some digits, without its head."""
    learner = quick_learner(recipe=QUICK.changed({"schedule.min_steps": 60}))
    learner.learn_task(train.of(("8", "9")), NAMES, progress=False)
    return learner.network.backbone


@pytest.mark.slow
def test_from_scratch_the_first_task_trains_and_later_ones_are_one_pass(train: Batches, test: Batches) -> None:
    learner = quick_learner(recipe=FIRST)
    assert stages_of(learner, train, ("0", "1")) == [["learn", "lda"]]
    before = {name: value.clone() for name, value in learner.network.backbone.state_dict().items()}
    assert stages_of(learner, train, ("2", "3"), ("4", "5")) == [["lda"], ["lda"]]
    assert all(torch.equal(before[name], value) for name, value in learner.network.backbone.state_dict().items())
    assert learner.evaluate(test.of(learner.classes), NAMES).accuracy > 0.85


@pytest.mark.slow
def test_a_pretrained_backbone_is_never_trained(train: Batches) -> None:
    backbone = pretrained(train)
    learner = Learner(backbone, image_size=16, recipe=FIRST, device="cpu", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert learner.model.pretrained
    assert stages_of(learner, train, ("0", "1"), ("2", "3")) == [["lda"], ["lda"]]
    assert all(torch.equal(one, learner.network.backbone.state_dict()[name]) for name, one in backbone.state_dict().items())


@pytest.mark.slow
def test_whether_it_was_pretrained_is_in_the_file(train: Batches, tmp_path: object) -> None:
    for backbone, expected in ((pretrained(train), True), (build("resnet8"), False)):
        learner = Learner(backbone, image_size=16, recipe=FIRST, device="cpu")
        stages_of(learner, train, ("0", "1"))
        learner.save(f"{tmp_path}/model")
        assert Model.load(f"{tmp_path}/model", "cpu", backbone=backbone).pretrained is expected


@pytest.mark.slow
def test_adopted_classes_without_statistics_are_remembered_by_generated_images(train: Batches) -> None:
    torch.manual_seed(0)
    classifier = nn.Sequential(pretrained(train), nn.Linear(64, 2)).eval()
    learner = Learner.from_classifier(classifier, ["8", "9"], image_size=16, recipe=FIRST, device="cpu")
    assert stages_of(learner, train, ("0", "1")) == [["dream", "learn", "refine"]]


@pytest.mark.slow
def test_a_recipe_that_adapts_always_trains_at_every_task(train: Batches) -> None:
    learner = quick_learner(recipe=FIRST.changed({"schedule.adapt": "always"}))
    assert stages_of(learner, train, ("0", "1"), ("2", "3")) == [["learn", "lda"], ["instant", "dream", "learn", "lda"]]


@pytest.mark.slow
def test_an_untrained_backbone_can_be_left_as_it_is(train: Batches, test: Batches) -> None:
    learner = quick_learner(recipe=FIRST.changed({"schedule.adapt": "never"}))
    assert stages_of(learner, train, ("0", "1"), ("2", "3")) == [["lda"], ["lda"]]
    assert learner.evaluate(test.of(learner.classes), NAMES).accuracy > 0.6


@pytest.mark.slow
def test_without_statistics_it_trains_at_every_task(train: Batches) -> None:
    learner = quick_learner(recipe=FIRST.changed({"remember.class_statistics": False, "schedule.adapt": "always"}))
    assert not learner.network.scales.layers
    assert stages_of(learner, train, ("0", "1"), ("2", "3")) == [["learn"], ["dream", "learn", "refine"]]


@pytest.mark.slow
def test_batchnorm_can_stay_as_the_first_task_left_it(train: Batches) -> None:
    learner = quick_learner(recipe=QUICK.changed({"schedule.freeze_batchnorm": True}))
    stages_of(learner, train, ("0", "1"))
    before = {name: value.clone() for name, value in learner.network.named_buffers() if "running" in name}
    stages_of(learner, train, ("2", "3"))
    after = dict(learner.network.named_buffers())
    assert before and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("method", slow_but(set(), ["abd", "lda"]))
def test_turned_images_are_classes_of_a_head_that_is_thrown_away(train: Batches, method: str) -> None:
    learner = quick_learner(method=method, recipe=QUICK.changed({"augmentation.rotations": True}))
    report = learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    assert set(report.stages[0].losses) == {"cross_entropy", "rotations"}
    assert not [name for name in learner.model.tensors() if "rotations" in name]
    report = learner.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert all("rotations" not in stage.losses for stage in report.stages)


@pytest.mark.slow
def test_a_smaller_rate_after_the_first_task(train: Batches) -> None:
    """One step at a hundredth of the rate moves the weights a hundredth as far."""
    moved = []
    for rate in (0.05, 0.0005):
        recipe = QUICK.changed({"schedule.min_steps": 1, "schedule.later_learning_rate": rate, "refine.epochs": 0})
        learner = quick_learner(method="finetune", recipe=recipe)
        stages_of(learner, train, ("0", "1"))
        before = torch.cat([p.flatten() for p in learner.network.backbone.parameters()])
        learner.learn_task(train.of(("2",)), NAMES, progress=False)
        after = torch.cat([p.flatten() for p in learner.network.backbone.parameters()])
        moved.append(float((after - before).norm()))
    assert moved[1] < 0.2 * moved[0]
