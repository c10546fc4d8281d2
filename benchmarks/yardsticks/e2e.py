"""E2E, End-to-End Incremental Learning (Castro et al., ECCV 2018): distillation task by task, then balanced fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.yardsticks.coreset import CoresetMethod, Images, nearest_to_mean
from edge_dfcil.methods._distillation import distil
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, StageSpec, Terms


class E2E(CoresetMethod):
    name = "e2e"

    def loss(self, task: Task, batch: Batch) -> Terms:
        assert task.teacher is not None
        with torch.no_grad():
            before = task.teacher.classify(batch.images)  # (B, K)
        logits = task.student.classify(batch.images)  # (B, C)
        sizes = self.kept["sizes"].tolist()
        old = zip(logits[:, : sum(sizes)].split(sizes, 1), before.split(sizes, 1), strict=True)
        distillation = torch.stack([distil(after, teacher) for after, teacher in old]).sum()
        return {"cross_entropy": F.cross_entropy(logits, batch.targets), "distillation": self.weight(task) * distillation}

    def refine(self, task: Task) -> Iterator[Stage]:
        """Selects first, so that the head is fine-tuned on as many images of each new class as of each old one."""
        self.keep(Images.of(task))
        if task.remembers:
            yield self._balanced(task)
        known = self.kept.get("sizes", torch.zeros(0, dtype=torch.long))
        new = torch.tensor([task.student.n_classes - int(known.sum())])
        self.kept["sizes"] = torch.cat([known, new])

    def _balanced(self, task: Task) -> Stage:
        student, recipe = task.student, task.recipe
        batches = self.stored(task, Images.of(task))

        def loss(batch: Batch) -> Terms:
            with torch.no_grad():
                features = student.features(batch.images)
            return {"balanced": F.cross_entropy(student.head(features), batch.targets)}

        def optimizer() -> torch.optim.Optimizer:
            return torch.optim.SGD(
                student.head.parameters(),
                recipe.schedule.learning_rate / 100,
                recipe.schedule.momentum,
                weight_decay=recipe.schedule.weight_decay,
            )

        return StageSpec("balance", batches, recipe.schedule.epochs * len(batches), loss, optimizer, trains=[student.head])

    def order(self, features: Tensor) -> Tensor:
        return nearest_to_mean(features)
