"""Head refinement: a closing stage that settles the decision between old and new classes.

Our addition to ABD, after R-DFCIL (Gao et al., ECCV 2022, section 3.4): the backbone is frozen in eval mode and the
head is trained with cross-entropy over all seen classes, on real images and dreams, each class weighing the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from edge_dfcil.data import Batch
from edge_dfcil.training import Stage, Task, Terms


def refine_head(task: Task) -> Iterator[Stage]:
    """One stage, if the recipe asks for it and there is something to remember."""
    recipe = task.recipe
    if not (task.remembers and recipe.refine_epochs):
        return
    student = task.student
    teacher, dreams = task.memory
    # Expected share of each class in a step of B real images and B dreams; its inverse weighs all classes alike.
    share = task.counts / task.counts.sum()
    share[: teacher.n_classes] += dreams.class_shares(teacher.n_classes)
    weights = 1 / share.clamp_min(1e-3)

    def loss(batch: Batch) -> Terms:
        dream = dreams.sample(len(batch))
        with torch.no_grad():
            features = student.backbone(torch.cat([batch.images, dream.images]))
        targets = torch.cat([batch.targets, dream.labels])
        return {"refine": F.cross_entropy(student.head(features), targets, weights)}

    steps = max(recipe.refine_epochs * len(task.batches), recipe.refine_min_steps)
    optimizer = torch.optim.SGD(
        student.head.parameters(), recipe.refine_learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )
    yield Stage("refine", task.batches, steps, loss, optimizer, CosineAnnealingLR(optimizer, steps), [student.head])
