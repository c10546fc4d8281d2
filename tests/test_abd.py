"""ABD's optimised step against a plain transcription of the paper's equations, and its published settings."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edge_dfcil import RECIPES
from edge_dfcil.dreaming.inversion import Dream, Dreams
from edge_dfcil.methods import find_method
from edge_dfcil.methods._refinement import align
from edge_dfcil.methods.task import Task
from edge_dfcil.model.backbones import CifarResNet, batchnorm_layers
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.data import Batch, RealBatches


class Fixed:
    """Dreams that are the same at each draw."""

    def __init__(self, dream: Dream) -> None:
        self._dream = dream

    def sample(self, n: int) -> Dream:
        assert n == len(self._dream)
        return self._dream


def setting(recipe: Recipe, n_old: int = 3, n_new: int = 2, size: int = 6) -> tuple[Task, Batch, Dream]:
    torch.manual_seed(0)
    teacher = Network(CifarResNet(8), 64, 16).grown(n_old)
    for _ in range(3):  # running statistics of its own
        teacher.train()(torch.rand(8, 3, 16, 16))
    student = teacher.grown(n_new)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    teacher = teacher.frozen()
    batch = Batch(torch.randn(size, 3, 16, 16), torch.randint(n_old, n_old + n_new, (size,)))
    images = torch.randn(size, 3, 16, 16)
    dream = Dream(images, teacher.classify(images))
    counts = torch.tensor([0.0] * n_old + [10.0] * n_new)
    task = Task(
        student=student.train(),
        teacher=teacher,
        current=torch.arange(n_old, n_old + n_new),
        old=torch.arange(n_old),
        counts=counts,
        batches=cast(RealBatches, [batch]),
        recipe=recipe,
        device=torch.device("cpu"),
        dreams=cast(Dreams, Fixed(dream)),
    )
    return task, batch, dream


def transcription(task: Task, batch: Batch, dream: Dream) -> torch.Tensor:
    """Sections 5.1 to 5.3 of the paper, as written: every network pass on its own, nothing shared."""
    assert task.teacher is not None
    n_old, n_seen = task.teacher.n_classes, task.student.n_classes
    rho, mu, n = n_old / n_seen, 0.1, len(batch)
    both = torch.cat([batch.images, dream.images])

    def head(network: Any, f: Any) -> Any:
        return f @ network.head.weight.T + network.head.bias

    # Eq. 6: local cross-entropy, softmax over the new classes alone, real images only.
    o = head(task.student, task.student.features(both))[:n]
    local = 0.0
    for i in range(n):
        new = o[i, n_old:].exp()
        local = local - (1 - rho) * (new[batch.targets[i] - n_old] / new.sum()).log() / n
    # Eq. 8: the head alone, over all seen classes, on both.
    o = head(task.student, task.student.features(both).detach())
    targets = [*batch.targets.tolist(), *dream.logits.argmax(1).tolist()]
    tuning = 0.0
    for i, y in enumerate(targets):
        tuning = tuning - (rho if y < n_old else 1 - rho) * o[i].softmax(0)[y].log() / (2 * n)
    # Eq. 7: what the old head sees in the features.
    w = task.teacher.head.weight
    now, before = task.student.features(both) @ w.T, task.teacher.features(both) @ w.T
    distillation = mu * (now - before).square().sum() / now.numel()
    return local + tuning + distillation


def test_optimised_step_is_the_transcription() -> None:
    task, batch, dream = setting(RECIPES["paper"])
    expected = transcription(task, batch, dream)
    gradients = torch.autograd.grad(expected, list(task.student.parameters()))
    loss = torch.stack(list(find_method("abd").loss(task, batch).values())).sum()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    for mine, theirs in zip(torch.autograd.grad(loss, list(task.student.parameters())), gradients, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_head_finetuning_moves_the_head_alone() -> None:
    task, batch, _ = setting(RECIPES["paper"])
    term = find_method("abd").loss(task, batch)["head"]
    grads = torch.autograd.grad(term, list(task.student.parameters()), allow_unused=True)
    named = dict(zip([name for name, _ in task.student.named_parameters()], grads, strict=True))
    assert {name for name, grad in named.items() if grad is not None} == {"head.weight", "head.bias"}


def test_local_cross_entropy_does_not_see_old_outputs() -> None:
    task, batch, _ = setting(RECIPES["paper"])
    term = find_method("abd").loss(task, batch)["local"]
    (grad,) = torch.autograd.grad(term, [task.student.head.weight])
    assert grad[:3].abs().max() == 0
    assert grad[3:].abs().max() > 0


@pytest.mark.parametrize("part", ["real", "synthetic"])
def test_ablation_distils_one_part_only(part: str) -> None:
    task, batch, dream = setting(RECIPES["paper"].changed({"remember.distil_on": part}))
    term = find_method("abd").loss(task, batch)["distillation"]
    assert task.teacher is not None
    w = task.teacher.head.weight
    both = torch.cat([batch.images, dream.images])
    difference = (task.student.features(both) - task.teacher.features(both)) @ w.T
    chosen = difference[: len(batch)] if part == "real" else difference[len(batch) :]
    assert term.item() == pytest.approx(0.1 * chosen.square().mean().item(), rel=1e-4)


def test_ablation_of_the_importance_compares_features() -> None:
    task, batch, dream = setting(RECIPES["paper"].changed({"remember.importance": False}))
    both = torch.cat([batch.images, dream.images])
    assert task.teacher is not None
    expected = 0.1 * F.mse_loss(task.student.features(both), task.teacher.features(both))
    assert find_method("abd").loss(task, batch)["distillation"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_ablations_of_the_cross_entropies() -> None:
    task, batch, _ = setting(RECIPES["paper"].changed({"remember.head_finetuning": False}))
    assert set(find_method("abd").loss(task, batch)) == {"local", "distillation"}
    task, batch, _ = setting(RECIPES["paper"].changed({"remember.local_cross_entropy": False}))
    assert set(find_method("abd").loss(task, batch)) == {"standard", "head", "distillation"}


@pytest.mark.parametrize(("scale", "share", "after"), [(3.0, 1.0, 1.0), (3.0, 0.8, 0.8), (0.5, 1.0, 0.5)])
def test_alignment_scales_long_new_rows_to_a_share_of_the_mean_norm_of_the_old(scale: float, share: float, after: float) -> None:
    head = nn.Linear(4, 5)
    with torch.no_grad():
        head.weight.copy_(F.normalize(torch.randn(5, 4), dim=1))
        head.weight[[1, 3]] *= scale
    before = head.weight.detach().clone()
    align(head, torch.tensor([0, 2, 4]), torch.tensor([1, 3]), share)
    assert torch.equal(head.weight[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.allclose(head.weight[[1, 3]], before[[1, 3]] * after / scale)


def test_the_published_network() -> None:
    backbone = CifarResNet(32)
    network = Network(backbone, 64, 32).grown(100)
    assert sum(p.numel() for p in network.parameters()) == 470_004
    assert len(batchnorm_layers(network)) == 31
    assert not any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in backbone.modules()), (
        "shortcuts have no parameters"
    )


def test_the_published_recipe() -> None:
    """ABD's published schedule, generator and weights."""
    paper = RECIPES["paper"]
    schedule, generator, inversion = paper.schedule, paper.generator, paper.inversion
    assert (schedule.epochs, schedule.learning_rate, schedule.momentum, schedule.weight_decay) == (250, 0.1, 0.9, 2e-4)
    assert [round(share * schedule.epochs) for share in schedule.milestones] == [100, 150, 200]
    assert (generator.steps, generator.batch, generator.learning_rate, generator.latent) == (10_000, 128, 1e-3, 1000)
    assert (inversion.content, inversion.diversity, inversion.statistics, inversion.smoothness) == (1, 1, 50, 1e-3)
    assert (paper.remember.pool, paper.refine.epochs, paper.refine.align_head, schedule.clip_gradient) == (0, 0, 0, None)
    assert schedule.drop_incomplete
