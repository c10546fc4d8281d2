"""DeepInversion as a baseline of continual learning (Yin et al., CVPR 2020, as set up by Smith et al., ICCV 2021):
distil on real images over the old classes, and on dreams over all classes, new ones having probability 0."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edge_dfcil.methods._distillation import distil
from edge_dfcil.methods._dreaming import DreamingMethod
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms


class DeepInversion(DreamingMethod):
    name = "deep_inversion"
    mu = 1.0

    def loss(self, task: Task, batch: Batch) -> Terms:
        teacher, dreams = task.memory
        n, dream = len(batch), dreams.sample(len(batch))
        with torch.no_grad():
            before = teacher.classify(batch.images)  # (B, K)
        logits = task.student.classify(torch.cat([batch.images, dream.images]))  # (2B, C)
        mu = self.weight(task)
        return {
            "cross_entropy": F.cross_entropy(logits[:n], batch.targets),
            "real": mu * distil(logits[:n, : before.shape[1]], before),
            "synthetic": mu * distil(logits[n:], dream.logits),
        }
