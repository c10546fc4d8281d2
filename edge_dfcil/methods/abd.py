"""ABD, "Always Be Dreaming" (Smith et al., ICCV 2021, section 5): learns new classes from images and old ones from dreams.

A step takes B real images and B dreams labelled by the teacher. Its three losses separate features between new classes
only (eq. 6), train the head alone to decide between old and new (eq. 8), and preserve features in the directions that
the old head uses (eq. 7).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_dfcil.dreaming.inversion import Dream
from edge_dfcil.methods._class_statistics import STATE, closes, stays_frozen
from edge_dfcil.methods._dreaming import DreamingMethod
from edge_dfcil.methods._lda_head import lda_stage
from edge_dfcil.methods._lda_rows import keeps_rows, lda_rows_stages
from edge_dfcil.methods._own_head import serve_all_features, train_own_features
from edge_dfcil.methods._refinement import refine_head
from edge_dfcil.methods.task import Task
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, Terms


class ABD(DreamingMethod):
    name = "abd"
    mu = 0.1  # published weight of the distillation
    state = STATE  # kept where the recipe asks for an LDA head

    def loss(self, task: Task, batch: Batch) -> Terms:
        teacher, dreams = task.memory
        recipe, student, n = task.recipe, task.student, len(batch)
        dream = dreams.sample(n)
        with torch.no_grad():
            features_before = teacher.features(batch.images)  # (B, F)
        features = student.features(torch.cat([batch.images, dream.images]))  # (2B, F)
        targets = torch.cat([batch.targets, dream.labels])  # (2B,)

        terms = {}
        if recipe.remember.local_cross_entropy:
            logits = student.head(features[:n])[:, task.current]  # (B, C)
            terms["local"] = (1 - task.rho) * F.cross_entropy(logits, torch.searchsorted(task.current, batch.targets))
        else:
            terms["standard"] = weighted_cross_entropy(student.head(features), targets, n, task.rho)
        if recipe.remember.head_finetuning:
            terms["head"] = weighted_cross_entropy(student.head(features.detach()), targets, n, task.rho)
        terms["distillation"] = self.weight(task) * self.distillation(task, features, features_before, dream)
        return terms

    def distillation(self, task: Task, features: Tensor, features_before: Tensor, dream: Dream) -> Tensor:
        """Mean squared difference of W f and W f_teacher, W the teacher's frozen head (eq. 7).

        Its bias cancels in the difference, so that the dreams' stored logits serve as W f_teacher.
        """
        assert task.teacher is not None
        n, head = len(features_before), task.teacher.head
        part = {"both": slice(None), "real": slice(0, n), "synthetic": slice(n, None)}[task.recipe.remember.distil_on]
        if task.recipe.remember.importance:
            before = torch.cat([head(features_before), dream.logits])  # (2B, K)
            return F.mse_loss(head(features)[part], before[part])
        with torch.no_grad():
            before = torch.cat([features_before, task.teacher.features(dream.images)])
        return F.mse_loss(features[part], before[part])

    def closed_form(self, recipe: Recipe) -> bool:
        rows_stay = recipe.remember.class_statistics or recipe.schedule.adapt != "always"
        return recipe.refine.head == "lda" and rows_stay

    def stages(self, task: Task) -> Iterator[Stage]:
        closed = self.closed_form(task.recipe) and (closes(task) or keeps_rows(task))
        if closed and stays_frozen(task):
            yield from self.refine(task)
            return
        train_own_features(task)
        yield from super().stages(task)

    def instant(self, task: Task) -> Iterator[Stage]:
        trained = task.pretrained or task.teacher is not None
        if trained and self.closed_form(task.recipe) and closes(task) and not stays_frozen(task):
            yield from lda_stage(task, moves=False, name="instant")

    def refine(self, task: Task) -> Iterator[Stage]:
        if self.closed_form(task.recipe) and closes(task):
            yield from lda_stage(task, moves=not stays_frozen(task))
        elif self.closed_form(task.recipe) and keeps_rows(task):
            yield from lda_rows_stages(task)
        else:
            yield from refine_head(task)
            serve_all_features(task)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, real: int, rho: float) -> Tensor:
    """Cross-entropy over all seen classes, weight 1 - rho for the first `real` samples and rho for the dreams (eq. 8)."""
    weights = torch.where(torch.arange(len(targets), device=targets.device) < real, 1 - rho, rho)  # (2B,)
    return (weights * F.cross_entropy(logits, targets, reduction="none")).mean()
