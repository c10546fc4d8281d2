"""LDA on a frozen backbone (SLDA, Hayes and Kanan, CVPR workshops 2020): the rival that every trained method must beat.

The backbone is trained in the first task (or adopted) and frozen after it. The head is linear discriminant analysis from
class means and one shared within-class covariance; learning a later task is one pass over its images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from edge_dfcil.errors import SettingError
from edge_dfcil.heads.lda import lda_head
from edge_dfcil.methods.base import Method, learning_stage
from edge_dfcil.methods.task import Task
from edge_dfcil.model.statistics import Statistic
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import ClosedFormSpec, Stage, Terms


class LDA(Method):
    name = "lda"
    state: ClassVar[Mapping[str, str]] = {"mean": "class_mean", "count": "class_count", "covariance": "shared_covariance"}

    def stages(self, task: Task) -> Iterator[Stage]:
        if not task.recipe.remember.class_statistics:
            raise SettingError("the method 'lda' keeps class means and a covariance, which this recipe does not allow")
        if task.teacher is None:
            yield learning_stage(task, self)
        yield ClosedFormSpec("lda", task.batches.plain(), lambda: _Sums(task))

    def loss(self, task: Task, batch: Batch) -> Terms:
        raise AssertionError("later tasks are learnt in closed form")


class _Sums:
    """Sums of features over a task's images, on top of those that are kept, and the head that follows from them."""

    def __init__(self, task: Task) -> None:
        network = task.student
        classes, features = network.n_classes, network.head.in_features
        dtype = torch.float32 if task.device.type == "mps" else torch.float64  # MPS has no float64
        self._task = task
        self._first = torch.zeros(classes, features, dtype=dtype, device=task.device)  # sum of f, by class
        self._second = torch.zeros(features, features, dtype=dtype, device=task.device)  # sum of f f'
        self._count = torch.zeros(classes, dtype=dtype, device=task.device)

    def add(self, batch: Batch) -> None:
        features = self._task.student.backbone(batch.images).to(self._first.dtype)  # (B, F)
        self._first.index_add_(0, batch.targets, features)
        self._second += features.T @ features
        self._count.index_add_(0, batch.targets, torch.ones_like(batch.targets, dtype=self._count.dtype))

    def solve(self) -> None:
        """Writes the rows of all classes that have statistics now, and of the new ones; others stay as they were."""
        task, count = self._task, self._count
        means = self._first / count.clamp_min(1)[:, None]
        scatter = self._second - (means * count[:, None]).T @ means  # within the classes of this task
        images = count.sum()
        means, count, covariance, total = self._with_kept(means, count, scatter, images)
        weight, bias = lda_head(means, covariance)
        rows = torch.nonzero(count > 0).flatten()
        task.student.head.weight.data[rows] = weight[rows].to(task.student.head.weight.dtype)
        task.student.head.bias.data[rows] = bias[rows].to(task.student.head.bias.dtype)
        self._keep(means, count, covariance, total)

    def _with_kept(self, means: Tensor, count: Tensor, scatter: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Joined with the statistics of earlier tasks; a known class that is refreshed has the mean of all its images."""
        kept = self._task.statistics
        if not kept:  # the first task, or classes that another method has learnt
            return means, count, scatter / (images - (count > 0).sum()).clamp_min(1), images
        old = {name: kept[name].values.to(means) for name in LDA.state}
        n = len(old["count"])
        before = torch.zeros_like(count)
        before[:n] = old["count"]
        means = means * count[:, None]
        means[:n] += old["mean"] * old["count"][:, None]
        both = before + count
        known = torch.tensor(float(kept["covariance"].images[0])).to(images)
        scatter = scatter + old["covariance"] * known
        return means / both.clamp_min(1)[:, None], both, scatter / (known + images).clamp_min(1), known + images

    def _keep(self, means: Tensor, count: Tensor, covariance: Tensor, images: Tensor) -> None:
        task, fewest = self._task, self._task.recipe.remember.min_images
        if images < fewest:
            return
        enough = count >= fewest
        counts = tuple(int(number) for number in (count * enough).tolist())

        def plain(values: Tensor) -> Tensor:
            return values.to(device="cpu", dtype=torch.float32)

        task.kept = {
            "mean": Statistic("class_mean", plain(means * enough[:, None]), counts),
            "count": Statistic("class_count", plain(count * enough), counts),
            "covariance": Statistic("shared_covariance", plain(covariance), (int(images),)),
        }
