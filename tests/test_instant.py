"""Instant and adapted models: one within seconds, which serves while the network is adapted, then the adapted one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from edge_dfcil import Callback, Cancelled, Commit, Learner, learning
from edge_dfcil.demo import Batches
from tests.conftest import NAMES, QUICK, quick_learner, same_weights, weights

ADAPTS = QUICK.changed({"refine.head": "lda", "schedule.later_learning_rate": 0.01})


@pytest.fixture(scope="module")
def _one_task(train: Batches) -> Learner:
    learner = quick_learner(recipe=ADAPTS)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    return learner


@pytest.fixture
def one_task(_one_task: Learner) -> Learner:
    return copy.deepcopy(_one_task)


class Watch(Callback):
    """Records the classes and the backbone at each commit; calls the session's method `then` after the first, if given."""

    def __init__(self, then: str | None = None) -> None:
        self.then, self.commits = then, list[Commit]()
        self.classes, self.backbones = list[tuple[str, ...]](), list[torch.Tensor]()

    def on_task_begin(self, learner: Any) -> None:
        self.learner = learner

    def on_commit(self, commit: Commit) -> None:
        self.commits.append(commit)
        self.classes.append(self.learner.classes)
        self.backbones.append(next(self.learner.network.backbone.parameters()).clone())
        if self.then is not None and len(self.commits) == 1:
            getattr(self.learner.running, self.then)()


def kinds(commits: Any) -> list[str]:
    return [commit.kind for commit in commits]


@pytest.mark.slow
def test_a_first_model_serves_while_the_network_is_adapted(one_task: Learner, train: Batches) -> None:
    before, watch = next(one_task.network.backbone.parameters()).clone(), Watch()
    report = one_task.learn_task(train.of(("2", "3")), NAMES, callbacks=[watch], progress=False)
    assert kinds(watch.commits) == ["instant", "adapted"][: len(watch.commits)] and watch.commits == list(report.commits)
    assert watch.classes[0] == one_task.classes == ("0", "1", "2", "3")
    assert torch.equal(watch.backbones[0], before)
    assert report.stages[0].name == "instant" and report.commits[0].seconds < report.seconds


def test_the_first_model_answers_for_new_classes(one_task: Learner, train: Batches, test: Batches) -> None:
    watch = Watch("finish_now")
    report = one_task.learn_task(train.of(("2", "3")), NAMES, callbacks=[watch], progress=False)
    assert kinds(report.commits) == ["instant"]
    assert one_task.evaluate(test.of(("2", "3")), NAMES).accuracy > 0.5
    assert one_task.model.learning["last_task"], "the task has ended with this commit"


@pytest.mark.slow
def test_what_is_adapted_is_the_same_with_and_without(one_task: Learner, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "WORSE", float("inf"))
    other = copy.deepcopy(one_task)
    report = one_task.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert kinds(report.commits) == ["instant", "adapted"]
    report = other.learn_task(train.of(("2", "3")), NAMES, instant=False, progress=False)
    assert kinds(report.commits) == ["adapted"] and "instant" not in [stage.name for stage in report.stages]
    assert same_weights(weights(other), one_task)


@pytest.mark.slow
def test_the_first_model_stays_where_the_adapted_one_is_expected_to_be_worse(
    one_task: Learner, train: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "WORSE", -float("inf"))
    before = next(one_task.network.backbone.parameters()).clone()
    report = one_task.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert kinds(report.commits) == ["instant"] and "learn" in [stage.name for stage in report.stages]
    assert torch.equal(next(one_task.network.backbone.parameters()), before)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_network_that_training_has_ruined_is_not_served(train: Batches, test: Batches, seed: int) -> None:
    """A high learning rate without distillation: a linear map cannot follow the features, and the rule has to see that."""
    ruins = ADAPTS.changed({"schedule.min_steps": 60, "schedule.later_learning_rate": 0.2, "remember.mu": 0.0})
    learner = quick_learner(recipe=ruins, seed=seed, multiscale=False)
    for names in (("0", "1", "2"), ("3", "4", "5")):
        report = learner.learn_task(few(train, names, 40), NAMES, progress=False)
    assert "learn" in [stage.name for stage in report.stages] and kinds(report.commits) == ["instant"]
    assert learner.evaluate(test.of(learner.classes), NAMES).accuracy > 0.85


def few(images: Batches, names: tuple[str, ...], n: int) -> Batches:
    """The first `n` images of some classes."""
    part = images.of(names)
    chosen = torch.cat([torch.nonzero(part.targets == target).flatten()[:n] for target in part.targets.unique()])
    return replace(part, images=part.images[chosen], targets=part.targets[chosen])


def test_cancelled_after_the_first_commit_it_keeps_that_model(one_task: Learner, train: Batches) -> None:
    with pytest.raises(Cancelled, match="last commit"):
        one_task.learn_task(train.of(("2", "3")), NAMES, callbacks=[Watch("cancel")], progress=False)
    assert one_task.classes == ("0", "1", "2", "3")


def test_a_time_budget_of_nothing_ends_with_the_first_model(one_task: Learner, train: Batches) -> None:
    report = one_task.learn_task(train.of(("2", "3")), NAMES, time_budget=1e-3, progress=False)
    assert kinds(report.commits) == ["instant"] and one_task.classes == ("0", "1", "2", "3")


def test_a_frozen_backbone_has_one_commit(one_task: Learner, train: Batches) -> None:
    one_task.recipe = ADAPTS.changed({"schedule.adapt": "first"})
    report = one_task.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert kinds(report.commits) == ["instant"] and [stage.name for stage in report.stages] == ["lda"]


@pytest.mark.slow
def test_the_plan_has_it(one_task: Learner, train: Batches) -> None:
    plan = one_task.plan(train.of(("2", "3")), NAMES, progress=False)
    assert [stage.name for stage in plan.stages] == ["instant", "dream", "learn", "lda"]
