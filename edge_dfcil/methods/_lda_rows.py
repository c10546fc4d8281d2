"""The last stage of a closed-form head that keeps only its rows and no class statistics (`recipe="strict"`).

LDA rows of different tasks are comparable only under a common covariance, and none may be stored. But a frozen backbone has
BatchNorm statistics: a generator that inverts them makes images whose features vary much like those of real images. Each task
generates the same images again, from the same seed and independent of the head, which grows. It mixes their covariance with
that of its own images, and computes only the rows of its own classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edge_dfcil import devices
from edge_dfcil.dreaming.inversion import Dreamer
from edge_dfcil.heads.lda import Shrinkage, likelihood_ratios, mixed, within
from edge_dfcil.methods._own_head import serve_all_features
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import ClosedFormSpec, Stage

AT_ONCE = 64
REAL_SHARE = 0.2  # of the task's own covariance in the mixture; 0.1 to 0.3 are within a point of the best
SHRINKAGE = Shrinkage(0.02)
ASSUMED = 100  # images behind a row that is refreshed
SEED = 0  # of the generator
FIRST_SPREAD = 3.0  # standard deviation of the first task's logits over generated images
WITHOUT_CLASSES = {"inversion.content": 0.0, "inversion.diversity": 0.0}


def keeps_rows(task: Task) -> bool:
    """Whether a task ends with this stage: its recipe allows no class statistics, and the stage computed the old rows too.

    Rows that were trained, including those of an adopted classifier, read only the last features and no other scale.
    """
    schedule, teacher, own = task.recipe.schedule, task.teacher, task.student.own_features
    if task.recipe.remember.class_statistics or not task.recipe.remember.pool or schedule.adapt == "always":
        return False
    if not task.student.scales.layers:
        return False
    return teacher is None or (teacher.reads_scales and bool((teacher.head.weight[:, own:] != 0).any(1).all()))


def lda_rows_stages(task: Task) -> Iterator[Stage]:
    """Inverts the backbone as it is now, then computes the rows of the task's classes.

    As many images are generated as the recipe's pool has, but one batch at a time: none is kept.
    """
    network = task.teacher if task.teacher is not None else task.student.frozen()
    devices.seed_all(SEED, task.device)  # the session restores the caller's random state
    dreamer = Dreamer(network, torch.arange(network.n_classes, device=task.device), task.recipe.changed(WITHOUT_CLASSES))
    yield dreamer.stage()
    yield ClosedFormSpec("lda", task.batches.plain(), lambda: _Rows(task, dreamer))


class _Moments:
    """Count, sum and second moment of features, of one or of several classes, float64."""

    def __init__(self, classes: int, features: int, like: Tensor) -> None:
        self.count = like.new_zeros(classes)
        self.first = like.new_zeros(classes, features)
        self.second = like.new_zeros(features, features)

    def add(self, features: Tensor, classes: Tensor, weight: float = 1.0) -> None:
        features = features.to(self.first)
        self.count.index_add_(0, classes, torch.full_like(classes, weight, dtype=self.count.dtype))
        self.first.index_add_(0, classes, features, alpha=weight)
        self.second.addmm_(features.T, features, alpha=weight)

    def solved(self) -> tuple[Tensor, Tensor]:
        """Means (C, F) and the covariance within classes (F, F), on the CPU in float64, which MPS lacks."""
        count, first, second = (value.cpu().double() for value in (self.count, self.first, self.second))
        return within(count, first, second)


class _Rows:
    """Moments of a task's features, and the rows that follow."""

    def __init__(self, task: Task, dreamer: Dreamer) -> None:
        self._task, self._dreamer = task, dreamer
        dtype = torch.float32 if task.device.type == "mps" else torch.float64
        self._like = torch.zeros((), dtype=dtype, device=task.device)
        self._real = _Moments(task.student.n_classes, task.student.all_features, self._like)

    def add(self, batch: Batch) -> None:
        for images, weight in self._views(batch.images):
            self._real.add(self._task.student.of_all_scales(images), batch.targets, weight)

    def _views(self, images: Tensor) -> list[tuple[Tensor, float]]:
        """Images, and their mirror images if the recipe treats these as equal, with weights."""
        return [(images, 0.5), (images.flip(3), 0.5)] if self._task.recipe.augmentation.flip else [(images, 1.0)]

    def solve(self) -> None:
        task, student = self._task, self._task.student
        means, own = self._real.solved()
        centre, common = self._generated().solved()
        metric = mixed(own, common, REAL_SHARE)
        rows = task.current.cpu()
        weight, bias = likelihood_ratios(means[rows], centre[0], metric, SHRINKAGE)
        scale = self._scale(weight, common)
        serve_all_features(task)
        head, share = student.head, self._share_of_these()
        for values, found in ((head.weight.data, scale * weight), (head.bias.data, scale * bias)):
            before = values[task.current]
            values[task.current] = before.lerp(found.to(before), share.view(-1, *[1] * (before.dim() - 1)))

    def _share_of_these(self) -> Tensor:
        """The weight of this task's images in each row (C,): 1 for a new class. The number of images behind a refreshed row is
        not stored; it is assumed to be `ASSUMED`."""
        task = self._task
        known = task.teacher.n_classes if task.teacher is not None else 0
        counts = task.counts[task.current]
        return torch.where(task.current < known, counts / (counts + ASSUMED), torch.ones_like(counts))

    def _generated(self) -> _Moments:
        found = _Moments(1, self._task.student.all_features, self._like)
        for _ in range(-(-self._task.recipe.remember.pool // AT_ONCE)):
            images = self._dreamer.dream(AT_ONCE).images
            for view, weight in self._views(images):
                found.add(self._task.student.of_all_scales(view), images.new_zeros(len(images), dtype=torch.long), weight)
        return found

    def _scale(self, weight: Tensor, common: Tensor) -> float:
        """The factor for rows that gives those of all tasks the same variance over generated images."""
        task = self._task
        old = torch.arange(task.student.n_classes, device=task.device)
        old = old[~torch.isin(old, task.current)]
        spread = _spread(weight, common)
        if len(old):
            return _spread(task.student.head.weight.detach()[old].to(common), common) / spread
        return FIRST_SPREAD / spread


def _spread(weight: Tensor, covariance: Tensor) -> float:
    """The standard deviation of logits, from the mean variance over rows."""
    variances = ((weight @ covariance) * weight).sum(1)
    return float(variances.mean().sqrt().clamp_min(torch.finfo(weight.dtype).tiny))
