"""LwF.MC (Rebuffi et al., CVPR 2017): one sigmoid per class; old classes keep their outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms


class LwFMC(Method):
    name = "lwf_mc"

    def first_loss(self, task: Task, batch: Batch) -> Terms:
        logits = task.student.classify(batch.images)
        return {"binary": binary_cross_entropy(logits, one_hot(batch.targets, logits))}

    def loss(self, task: Task, batch: Batch) -> Terms:
        assert task.teacher is not None
        with torch.no_grad():
            before = task.teacher.classify(batch.images).sigmoid()  # (B, K)
        logits = task.student.classify(batch.images)  # (B, C)
        targets = one_hot(batch.targets, logits)
        # The images of a refreshed class keep 1 as its target.
        targets[:, task.old] = torch.maximum(targets[:, task.old], before[:, task.old].to(targets.dtype))
        return {"binary": binary_cross_entropy(logits, targets)}


def one_hot(targets: Tensor, logits: Tensor) -> Tensor:
    return F.one_hot(targets, logits.shape[1]).to(logits.dtype)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over classes, averaged over images."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
