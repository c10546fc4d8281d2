"""DeepInversion as a baseline of continual learning (Yin et al., CVPR 2020, as set up by Smith et al., ICCV 2021):
distil on real images over the old classes, and on dreams over all classes, new ones having probability 0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from edge_dfcil.data import Batch
from edge_dfcil.methods import dreamt
from edge_dfcil.methods.base import Method
from edge_dfcil.methods.distillation import distil
from edge_dfcil.training import Stage, Task, Terms


class DeepInversion(Method):
    name = "deep_inversion"
    mu = 1.0

    def prepare(self, task: Task) -> Iterator[Stage]:
        yield from dreamt.prepare(task)

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
