"""LwF, Learning without Forgetting (Li & Hoiem, TPAMI 2017): distil the old outputs on the new images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edge_dfcil.methods._distillation import distil
from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms


class LwF(Method):
    name = "lwf"
    mu = 1.0

    def loss(self, task: Task, batch: Batch) -> Terms:
        assert task.teacher is not None
        with torch.no_grad():
            before = task.teacher.classify(batch.images)  # (B, K)
        logits = task.student.classify(batch.images)  # (B, C)
        return {
            "cross_entropy": F.cross_entropy(logits, batch.targets),
            "distillation": self.weight(task) * distil(logits[:, : before.shape[1]], before),
        }
