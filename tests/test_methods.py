"""Every method of the package passes the common suite, and its loss is the published one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from edge_dfcil import Learner, SettingError
from edge_dfcil.demo import Batches
from edge_dfcil.methods import find_method, names
from edge_dfcil.methods._distillation import distil
from edge_dfcil.methods.abd import ABD
from edge_dfcil.methods.finetune import Finetune
from edge_dfcil.methods.task import Task
from edge_dfcil.testing import check_method
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms
from tests.conftest import NAMES, slow_but


@pytest.mark.parametrize("name", slow_but({"finetune"}, names()))
def test_method(name: str) -> None:
    check_method(lambda: name, exports=name in ("abd", "lda"))  # trained heads, and closed-form ones


def test_the_published_methods_are_there() -> None:
    assert set(names()) == {"abd", "deep_inversion", "finetune", "lda", "lwf", "lwf_mc", "lwf_synthetic"}


class Hoarder(Finetune):
    """Keeps images, which the sample rule forbids."""

    name = "hoarder"

    def loss(self, task: Any, batch: Any) -> Any:
        self.kept = batch.images
        return super().loss(task, batch)


class SecretHoarder(Finetune):
    """The same, in a place that a walk through the learner's attributes does not reach."""

    name = "secret_hoarder"

    def loss(self, task: Any, batch: Any) -> Any:
        SECRET.append(batch.images)
        return super().loss(task, batch)


SECRET: list[torch.Tensor] = []


@pytest.mark.parametrize("method", [Hoarder, SecretHoarder])
@pytest.mark.slow
def test_the_suite_catches_a_method_that_keeps_samples(method: Any) -> None:
    with pytest.raises(AssertionError, match=r"keeps a tensor|still in memory"):
        check_method(method, exports=False)
    SECRET.clear()
    check_method(method, keeps_no_sample=False, exports=False)
    SECRET.clear()


def test_unknown_method_is_told_with_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"'magic'.*abd"):
        find_method("magic")


def test_distillation_is_the_softened_cross_entropy_times_t_squared() -> None:
    logits, before = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = torch.tensor([1.0, 2.718281828]), torch.tensor([2.718281828, 1.0])
    expected = -((p / p.sum()) * (q / q.sum()).log()).sum() * 4
    assert distil(logits, before).item() == pytest.approx(expected.item(), abs=1e-5)


def test_distillation_gives_new_classes_probability_zero() -> None:
    logits, before = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.0, 2.0]])
    expected = -(torch.tensor([0.5, 1.0]).softmax(0) * (logits[0] / 2).log_softmax(0)[:2]).sum() * 4
    assert distil(logits, before).item() == pytest.approx(expected.item(), abs=1e-5)
    assert distil(logits, before) > distil(logits[:, :2], before)
    assert torch.isfinite(F.softmax(logits, 1)).all()


@pytest.mark.slow
def test_a_class_that_is_refreshed_is_remembered_too(learnt: Learner, train: Batches) -> None:
    """New images of a class add to what is remembered of it, and do not replace that."""
    seen: dict[str, list[int]] = {}

    class Watch(ABD):
        def loss(self, task: Task, batch: Batch) -> Terms:
            seen["old"], seen["current"] = task.old.tolist(), task.current.tolist()
            return super().loss(task, batch)

    learnt.method = Watch()
    learnt.learn_task(train.of(("1", "2")), NAMES, relearn=True, progress=False)
    assert seen == {"old": [0, 1], "current": [1, 2]}
