"""BiC, Large Scale Incremental Learning (Wu et al., CVPR 2019): distillation, then correction of the bias to new classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.yardsticks.coreset import CoresetMethod, Images, herding
from edge_dfcil.methods._distillation import distil
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, StageSpec, Terms

HELD_OUT = 0.1  # of the coreset, for the correction
STEPS, LEARNING_RATE = 200, 0.05  # of Adam on two numbers, over all held-out images together


class BiC(CoresetMethod):
    name = "bic"

    def prepare(self, task: Task) -> Iterator[Stage]:
        """Holds out a tenth of each old class's stored images, and as many images of each new class."""
        yield from super().prepare(task)
        self._held: Images | None = None
        self._all = images = Images.of(task)
        if not task.remembers:
            return
        stored = self.kept["outputs"]
        n = max(1, round(HELD_OUT * len(stored) / len(stored.unique())))
        held = torch.zeros(len(images.images), dtype=torch.bool)
        for output in images.outputs.unique().tolist():
            index = torch.nonzero(images.outputs == output).flatten()
            held[index[torch.randperm(len(index))[:n]]] = len(index) > n  # a class of too few images is learnt from whole
        self._held = images.take(torch.nonzero(held).flatten())
        task.batches = images.take(torch.nonzero(~held).flatten())

    def loss(self, task: Task, batch: Batch) -> Terms:
        assert task.teacher is not None
        with torch.no_grad():
            before = task.teacher.classify(batch.images)  # (B, K)
        logits = task.student.classify(batch.images)  # (B, C)
        old = before.shape[1] / logits.shape[1]
        return {
            "cross_entropy": (1 - old) * F.cross_entropy(logits, batch.targets),
            "distillation": old * distil(logits[:, : before.shape[1]], before),
        }

    def refine(self, task: Task) -> Iterator[Stage]:
        if self._held is not None and len(self._held.images):
            yield from self._correct(task, self._held)
        self.keep(self._all)
        del self._held, self._all

    def _correct(self, task: Task, held: Images) -> Iterator[Stage]:
        """Fits alpha and beta of alpha o + beta for the new outputs o, and writes them into the head's rows, where they
        correct every later answer."""
        assert task.teacher is not None
        head, n_old = task.student.head, task.teacher.n_classes
        with torch.no_grad():
            logits = head(held.features().to(head.weight.device))
        targets = held.outputs.to(logits.device)
        correction = nn.ParameterDict(
            {"alpha": torch.ones((), device=logits.device), "beta": torch.zeros((), device=logits.device)}
        )

        def loss(_: Tensor) -> Terms:
            new = correction["alpha"] * logits[:, n_old:] + correction["beta"]
            return {"correction": F.cross_entropy(torch.cat([logits[:, :n_old], new], 1), targets)}

        yield StageSpec("correct", [targets], STEPS, loss, lambda: torch.optim.Adam(correction.parameters(), LEARNING_RATE))
        with torch.no_grad():
            head.weight[n_old:] *= correction["alpha"]
            head.bias[n_old:] = correction["alpha"] * head.bias[n_old:] + correction["beta"]

    def order(self, features: Tensor) -> Tensor:
        return herding(features)
