"""Temperature and thresholds of a head, from its answers to images of the task that it was not made from.

For a closed-form head, each image is left out in turn. For a network that is trained in the task, the images are held out of
training.

Only the classes of this task have images. For an old class, the mean and the covariance that its head row was made from predict
the mean and the deviation of its score. Images that a head was not made from spread further. The threshold is therefore a number
of predicted deviations below the mean; this number is measured on the new classes, for the share of images to reject.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from edge_dfcil.heads.lda import Shrinkage
from edge_dfcil.heads.leave_one_out import leave_one_out
from edge_dfcil.methods._class_statistics import stays_frozen
from edge_dfcil.methods.task import Task
from edge_dfcil.model.calibration import MIN_IMAGES, Calibration, best_temperature, found_on
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import ClosedFormSpec, Stage
from exporters.rejection import scores

MOST = 256  # images whose features are in memory


class HeldFeatures:
    """Features of some of a task's images, evenly over its classes, until the end of the stage. They are never stored.

    If the backbone is trained in this task, the images are those held out. The memory is allocated when the stage begins, so
    that a plan counts it.
    """

    def __init__(self, task: Task, views: int) -> None:
        images = int(task.counts.sum())
        self._batches = None if stays_frozen(task) else task.batches
        share = 1.0 if self._batches is None else task.recipe.refine.held_out
        self._every = max(1, math.ceil(images * share / MOST))
        self._seen = [0] * task.student.n_classes
        self._targets: list[int] = []
        self._views = torch.ones(min(images, MOST), views, task.student.all_features, device=task.device)

    @classmethod
    def of(cls, task: Task, views: int) -> HeldFeatures | None:
        """None if there is nothing to calibrate on: on images that it was trained on, a backbone is overconfident."""
        refine = task.recipe.refine
        return cls(task, views) if refine.calibrate and (refine.held_out or stays_frozen(task)) else None

    def choose(self, batch: Batch) -> list[int]:
        """The indices of the images of a batch to use; `put` then takes the features of each of their views."""
        chosen = []
        usable = [True] * len(batch) if self._batches is None else self._batches.held_out(batch).tolist()
        for index, target in enumerate(batch.targets.tolist()):
            if not usable[index]:
                continue
            self._seen[target] += 1
            if self._seen[target] % self._every == 0 and len(self._targets) < len(self._views):
                chosen.append(index)
                self._targets.append(target)
        return chosen

    def put(self, view: int, features: Tensor) -> None:
        """The features (n, F) of a view of the images chosen last."""
        end = len(self._targets)
        self._views[end - len(features) : end, view] = features.to(self._views.dtype)

    def calibration(
        self,
        task: Task,
        rows: Tensor,
        means: Tensor,
        count: Tensor,
        covariance: Tensor,
        images: float,
        shrinkage: Shrinkage,
        scale: float,
        head: tuple[Tensor, Tensor],
    ) -> Calibration | None:
        """The calibration, from the statistics that the head was made from, the indices of its `rows` (R,), and the centred
        `head`, which is multiplied by `scale`."""
        targets = torch.tensor(self._targets, dtype=torch.long)
        usable = torch.nonzero(count[targets] > 1).flatten() if len(targets) else targets
        if len(usable) < task.recipe.remember.min_images or len(rows) < 2:
            return None
        places = torch.searchsorted(rows, targets[usable])
        views = self._views.cpu().double()[usable]
        asked = views.mean(1) if task.student.mirrored else views[:, 0]
        logits = scale * leave_one_out(means[rows], count[rows], covariance, images, shrinkage, places, views, asked)
        temperature = best_temperature(logits, places)
        share = task.recipe.refine.false_rejections
        thresholds = torch.zeros(task.student.n_classes, dtype=torch.float64)  # 0 rejects nothing
        thresholds[rows] = _thresholds(logits / temperature, *_spread(head, means[rows], covariance, scale / temperature), share)
        return Calibration(temperature, tuple(thresholds.tolist()), len(usable), share)


def calibration_stage(task: Task) -> Iterator[Stage]:
    """The last stage of a trained head: its answers to the images that were held out. Too few give no calibration."""
    refine = task.recipe.refine
    if refine.calibrate and refine.held_out:
        yield ClosedFormSpec("calibrate", task.batches.plain(), lambda: _Answers(task))


class _Answers:
    """Probabilities and true classes of the images that were held out."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._probabilities, self._targets = [torch.zeros(0, task.student.n_classes)], list[int]()

    def add(self, batch: Batch) -> None:
        chosen = torch.nonzero(self._task.batches.held_out(batch)).flatten().to(batch.targets.device)
        if len(chosen):
            logits = self._task.student.classify(batch.images[chosen])
            self._probabilities.append(logits.float().softmax(1).cpu())
            self._targets += batch.targets[chosen].tolist()

    def solve(self) -> None:
        task = self._task
        if len(self._targets) >= MIN_IMAGES:
            found = torch.cat(self._probabilities)
            share = task.recipe.refine.false_rejections
            task.calibration = found_on(found, self._targets, task.student.n_classes, share)


def _spread(head: tuple[Tensor, Tensor], means: Tensor, covariance: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation (R,) of the score of each class for its own images, as the statistics predict them.

    Logits of a class are assumed to be normal. Scores are limited by float32: on an easy task they spread less than logits.
    """
    weight, bias = scale * head[0], scale * head[1]
    logits = means @ weight.T + bias  # (R, R)
    mean = _scores(logits)
    tiny = torch.finfo(mean.dtype).tiny
    shorter = mean / logits.diagonal().clamp_min(tiny)
    return mean, ((weight @ covariance) * weight).sum(1).clamp_min(tiny).sqrt() * shorter.clamp(max=1)


def _thresholds(logits: Tensor, mean: Tensor, deviation: Tensor, share: float) -> Tensor:
    """The threshold of each class (R,): its mean plus a number of deviations, the same for all classes, that rejects `share` of
    the images with these logits (N, R)."""
    answers = logits.argmax(1)
    away = torch.quantile((_scores(logits) - mean[answers]) / deviation[answers], share)
    return (mean + away * deviation).clamp_min(0)


def _scores(logits: Tensor) -> Tensor:
    return torch.from_numpy(scores(logits.softmax(1).numpy()))
