"""LwF on both real images and dreams, over the old classes (a baseline of Smith et al., ICCV 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edge_dfcil.methods._distillation import distil
from edge_dfcil.methods._dreaming import DreamingMethod
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms


class LwFSynthetic(DreamingMethod):
    name = "lwf_synthetic"
    mu = 0.1

    def loss(self, task: Task, batch: Batch) -> Terms:
        teacher, dreams = task.memory
        n, dream = len(batch), dreams.sample(len(batch))
        with torch.no_grad():
            before = torch.cat([teacher.classify(batch.images), dream.logits])  # (2B, K)
        logits = task.student.classify(torch.cat([batch.images, dream.images]))  # (2B, C)
        return {
            "cross_entropy": F.cross_entropy(logits[:n], batch.targets),
            "distillation": self.weight(task) * distil(logits[:, : before.shape[1]], before),
        }
