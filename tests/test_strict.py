"""Learning when no class statistics may be kept: only the rows of the head remain of a class."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_dfcil import Learner
from edge_dfcil.demo import Batches
from edge_dfcil.recipe import RECIPES
from tests.conftest import NAMES, QUICK, quick_learner

ROWS = QUICK.changed(
    {
        "remember.class_statistics": False,
        "schedule.adapt": "first",
        "schedule.first_epochs": 3,
        "refine.head": "lda",
        "generator.steps": 40,
        "remember.pool": 1024,
    }
)


@pytest.fixture(scope="module")
def _two_tasks(train: Batches) -> list[Learner]:
    """The learner after the first task, and after the second."""
    learner = quick_learner(recipe=ROWS)
    learner.learn_task(train.of(("0", "1", "2")), NAMES, progress=False)
    first = copy.deepcopy(learner)
    learner.learn_task(train.of(("3", "4", "5")), NAMES, progress=False)
    return [first, learner]


@pytest.fixture
def two_tasks(_two_tasks: list[Learner]) -> list[Learner]:
    return copy.deepcopy(_two_tasks)


@pytest.mark.slow
def test_classes_of_all_tasks_are_told_apart(two_tasks: list[Learner], test: Batches) -> None:
    found = two_tasks[1].evaluate(test.of(tuple(NAMES[:6])), NAMES)
    assert found.accuracy > 0.6 and min(task or 0.0 for task in found.per_task) > 0.4


@pytest.mark.slow
def test_nothing_but_weights_is_kept(two_tasks: list[Learner]) -> None:
    assert all(learner.model.statistics == {} for learner in two_tasks)


@pytest.mark.slow
def test_a_later_task_changes_no_weight_of_before(two_tasks: list[Learner]) -> None:
    before, after = (learner.network.state_dict() for learner in two_tasks)
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)] if name.startswith("head.") else after[name], value), name


@pytest.mark.slow
def test_it_goes_on_from_a_file(two_tasks: list[Learner], train: Batches, tmp_path: Path) -> None:
    two_tasks[0].save(tmp_path / "m.safetensors")
    again = Learner.load(tmp_path / "m.safetensors", "cpu")
    again.learn_task(train.of(("3", "4", "5")), NAMES, progress=False)
    assert torch.equal(again.network.head.weight, two_tasks[1].network.head.weight)


@pytest.mark.slow
def test_a_few_more_images_of_a_class_refine_its_row(two_tasks: list[Learner], train: Batches, test: Batches) -> None:
    learner, before = two_tasks[1], two_tasks[1].network.head.weight.detach().clone()
    known = learner.evaluate(test.of(tuple(NAMES[:6])), NAMES)
    again = train.of(("0",))
    learner.learn_task([(again.images[:5], again.targets[:5])], NAMES, relearn=True, progress=False)
    after = learner.network.head.weight
    assert torch.equal(after[1:], before[1:]) and 0 < (after[0] - before[0]).norm() < 0.5 * before[0].norm()
    assert learner.evaluate(test.of(tuple(NAMES[:6])), NAMES).accuracy > known.accuracy - 0.05


@pytest.mark.slow
def test_rows_that_were_trained_are_remembered_by_generated_images(train: Batches) -> None:
    """Rows of an adopted classifier cannot be compared with those computed in closed form."""
    learner = quick_learner(recipe=ROWS.changed({"refine.head": "trained"}), multiscale=True)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    learner.recipe = ROWS
    report = learner.learn_task(train.of(("2",)), NAMES, progress=False)
    assert "learn" in [stage.name for stage in report.stages]


@pytest.mark.slow
def test_the_memory_budget_is_planned_for_it(two_tasks: list[Learner], train: Batches) -> None:
    plan = two_tasks[0].plan(train.of(("3", "4")), NAMES, progress=False)
    assert [stage.name for stage in plan.stages] == ["dream", "lda"]


@pytest.mark.slow
def test_a_time_budget_shortens_the_generator_of_a_first_task_too(train: Batches) -> None:
    learner = quick_learner(recipe=ROWS.changed({"schedule.min_steps": 10**4, "generator.steps": 10**4}))
    report = learner.learn_task(train.of(("0", "1")), NAMES, time_budget=4, progress=False)
    assert report.fitted is not None and report.fitted["changes"]["generator.steps"] < 10**3


def test_the_recipe_asks_for_it() -> None:
    strict: Any = RECIPES["strict"]
    assert not strict.remember.class_statistics and strict.schedule.adapt == "first" and strict.refine.head == "lda"
