"""Heads over a backbone's own (last) features, for models whose head reads features of several scales.

The backbone itself is trained under a head over its own features alone: with a head over all scales it learns less (edge-5x4:
83.0 instead of 86.0 % after the first task, and 47.6 instead of 53.2 % in the end when it is frozen; docs/research-log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_dfcil.heads.lda import centred, lda_head, usual_shrinkage
from edge_dfcil.methods._class_statistics import SUMS
from edge_dfcil.methods.task import Task
from edge_dfcil.model.network import Network
from edge_dfcil.model.statistics import Statistics


def train_own_features(task: Task) -> None:
    """Gives student and teacher heads over the backbone's own features. The head so far is closed-form: the teacher's new head,
    from which the student's starts, is computed from the same statistics."""
    student, teacher = task.student, task.teacher
    if not student.reads_scales:
        return
    own, known = student.own_features, teacher.n_classes if teacher is not None else 0
    weight, bias = own_head(student, task.statistics)
    weight[known:].uniform_(-(own**-0.5), own**-0.5)  # as torch initialises a linear layer of this many features
    student.set_head(weight, bias)
    if teacher is not None:
        teacher.set_head(weight[:known], bias[:known])


def own_head(network: Network, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """A head (C, own_features) and (C,) over the backbone's own features: LDA for the classes that have statistics; for the
    others, the part of the head over all scales for these features."""
    own = network.own_features
    weight, bias = network.head.weight.detach()[:, :own].clone(), network.head.bias.detach().clone()
    if statistics.keys() >= SUMS.keys():
        means, covariance = (statistics[name].values.to(weight).double() for name in ("mean", "covariance"))
        shrinkage = usual_shrinkage(own, float(statistics["covariance"].images[0]))
        found, offset = centred(*lda_head(means[:, :own], covariance[:own, :own], shrinkage))
        rows = torch.nonzero(torch.tensor(statistics["count"].images, device=weight.device) > 0).flatten()
        scale = network.head.weight[rows].detach().norm() / found[rows].norm()
        weight[rows], bias[rows] = (scale * found)[rows].to(weight), (scale * offset)[rows].to(bias)
    return weight, bias


def serve_all_features(task: Task) -> None:
    """Extends a head over the backbone's own features to those of all scales, with the same answers."""
    student = task.student
    if student.scales.layers and not student.reads_scales:
        own = student.head.weight.detach()
        weight = own.new_zeros(len(own), student.all_features)
        weight[:, : own.shape[1]] = own
        student.set_head(weight, student.head.bias.detach())
