"""LwF with a coreset: cross-entropy and distillation of the old outputs, on new and stored images."""

from __future__ import annotations

from benchmarks.yardsticks.coreset import CoresetMethod
from edge_dfcil.methods.lwf import LwF
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms


class LwFCoreset(CoresetMethod):
    name = "lwf_coreset"

    def loss(self, task: Task, batch: Batch) -> Terms:
        return LwF().loss(task, batch)
