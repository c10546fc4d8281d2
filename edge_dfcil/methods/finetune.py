"""Fine-tuning, the paper's Base: cross-entropy on the new images and nothing against forgetting. The lower bound."""

from __future__ import annotations

from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms


class Finetune(Method):
    name = "finetune"

    def loss(self, task: Task, batch: Batch) -> Terms:
        return self.first_loss(task, batch)
