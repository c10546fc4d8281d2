"""iCaRL (Rebuffi et al., CVPR 2017): sigmoid outputs with distillation, and answers by the nearest mean of exemplars."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.yardsticks.coreset import CoresetMethod, Images, herding
from edge_dfcil.methods.lwf_mc import LwFMC
from edge_dfcil.methods.task import Task
from edge_dfcil.model.network import Network
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, Terms


class ICaRL(CoresetMethod):
    """Of unit means m_c, the nearest to a feature f has the largest m_c . f, so the model that answers has the means as its
    head. The trained head is kept separately, and put back to learn the next task."""

    name = "icarl"

    def prepare(self, task: Task) -> Iterator[Stage]:
        if task.teacher is not None:
            task.teacher.head = copy.deepcopy(task.teacher.head)  # its tensors are those of the model that answers
            for network in (task.student, task.teacher):
                self._put_back(network)
        return super().prepare(task)

    def first_loss(self, task: Task, batch: Batch) -> Terms:
        return LwFMC().first_loss(task, batch)

    def loss(self, task: Task, batch: Batch) -> Terms:
        return LwFMC().loss(task, batch)

    def refine(self, task: Task) -> Iterator[Stage]:
        head = task.student.head
        self.kept["head.weight"], self.kept["head.bias"] = head.weight.detach().clone(), head.bias.detach().clone()
        yield from super().refine(task)
        exemplars = self.stored(task, Images.of(task))
        features = F.normalize(exemplars.features())
        with torch.no_grad():
            head.bias.zero_()
            for output in range(task.student.n_classes):
                mean = features[exemplars.outputs == output].mean(0)
                head.weight[output] = F.normalize(mean, dim=0).to(head.weight.device)

    def _put_back(self, network: Network) -> None:
        known = len(self.kept["head.weight"])
        with torch.no_grad():
            network.head.weight[:known] = self.kept["head.weight"].to(network.head.weight.device)
            network.head.bias[:known] = self.kept["head.bias"].to(network.head.bias.device)

    def order(self, features: Tensor) -> Tensor:
        return herding(features)
