"""Head refinement: a last stage that trains the decision between old and new classes.

Our addition to ABD, after R-DFCIL (Gao et al., ECCV 2022, section 3.4): the backbone is frozen in eval mode and the
head is trained with cross-entropy over all seen classes, on real images and dreams, with equal weight for each class.

Dreams are easier to classify than real images, so what is learnt from them and from real images still favours the classes
that had real ones: their rows of the head grow longer. They are scaled back (weight aligning, Zhao et al., CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, StageSpec, Terms


def refine_head(task: Task) -> Iterator[Stage]:
    """Trains and aligns the head, as far as the recipe asks for it, if there is something to remember."""
    if not task.remembers:
        return
    if task.recipe.refine.epochs:
        yield _refinement(task)
    if task.recipe.refine.align_head:
        align(task.student.head, task.old, task.current, task.recipe.refine.align_head)


@torch.no_grad()
def align(head: nn.Linear, old: Tensor, current: Tensor, share: float) -> None:
    """Scales the current classes' rows down, so that their mean norm is at most a share of the mean norm of the old rows."""
    norm = head.weight.norm(dim=1)
    head.weight[current] *= (share * norm[old].mean() / norm[current].mean()).clamp(max=1)


def _refinement(task: Task) -> StageSpec:
    recipe, student = task.recipe, task.student
    teacher, dreams = task.memory
    # Expected share of each class in a step of B real images and B dreams; its inverse gives all classes the same weight.
    share = task.counts / task.counts.sum()
    share[: teacher.n_classes] += dreams.class_shares(teacher.n_classes)
    weights = 1 / share.clamp_min(1e-3)

    def loss(batch: Batch) -> Terms:
        dream = dreams.sample(len(batch))
        with torch.no_grad():
            features = student.features(torch.cat([batch.images, dream.images]))
        targets = torch.cat([batch.targets, dream.labels])
        return {"refine": F.cross_entropy(student.head(features), targets, weights)}

    steps = task.share_of(max(recipe.refine.epochs * len(task.batches), recipe.refine.min_steps))

    def optimizer() -> Optimizer:
        return torch.optim.SGD(
            student.head.parameters(),
            recipe.refine.learning_rate,
            recipe.schedule.momentum,
            weight_decay=recipe.schedule.weight_decay,
        )

    return StageSpec(
        "refine",
        task.batches,
        steps,
        loss,
        optimizer,
        lambda optimizer: CosineAnnealingLR(optimizer, steps),
        trains=[student.head],
        mixed_precision=recipe.schedule.mixed_precision,
        resumable=True,
    )
