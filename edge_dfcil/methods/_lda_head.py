"""The last stage of a closed-form head: LDA from class statistics that are updated as the backbone changes.

One pass over a task's images adds up their features, of all scales. The statistics of earlier tasks are moved by a drift map. It
is fitted to features of these images and of the task's generated images, from the backbone before the task and after it.

What is chosen or expected of a head is found on images that it was not made from: the sums of two halves are separate. A drift
map has errors of its own, so each half also has its own map, and old classes are held out as the other half's map moves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edge_dfcil.heads.drift import DriftSums
from edge_dfcil.heads.lda import Frame, HeldOut, Shrinkage, centred, lda_head, leading, usual_shrinkage
from edge_dfcil.methods._calibration import HeldFeatures
from edge_dfcil.methods._class_statistics import SUMS
from edge_dfcil.methods._own_head import serve_all_features
from edge_dfcil.methods.task import Task
from edge_dfcil.model.statistics import Statistic
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import ClosedFormSpec, Stage

GENERATED_AT_ONCE = 64
ASSUMED = 5.0  # images assumed behind a row without statistics: fewer than a stored statistic needs
SHRINKAGES = (0.005, 0.02, 0.08, 0.3, 0.7)  # the one that does best on held-out images is taken
GROUPED = (0.3, 0.7)  # also tried with features of other scales as a separate group, which helps if there are few images
HALVES, BOTH = (slice(0, 1), slice(1, 2)), slice(0, 2)
LEAST_SURE = 0.01  # the smallest factor for an LDA head's own logits


def lda_stage(task: Task, moves: bool, name: str = "lda") -> Iterator[Stage]:
    """`moves`: the backbone has been trained in this task."""
    yield ClosedFormSpec(name, task.batches.plain(), lambda: _Sums(task, moves))


@dataclass(frozen=True)
class _Known:
    """The statistics of classes, on the CPU; float64, except the covariance of earlier tasks.

    Attributes
    ----------
    means
        (C, F).
    count
        The number of images counted for each mean, (C,).
    placed
        Which means are known, (C,) bool. One that is known only from a row of the head has a count of 0.
    covariance
        Within classes, (F, F).
    images
        The number of images behind it.
    """

    means: Tensor
    count: Tensor
    placed: Tensor
    covariance: Tensor
    images: float


class _Sums:
    """Sums of features over each half of a task's images, joined with the stored statistics, and the head that follows."""

    def __init__(self, task: Task, moves: bool) -> None:
        network = task.student
        classes, features = network.n_classes, network.all_features
        dtype = torch.float32 if task.device.type == "mps" else torch.float64  # MPS has no float64
        self._task, self._moves = task, moves
        self._first = torch.zeros(2, classes, features, dtype=dtype, device=task.device)  # sum of f, by class
        self._second = torch.zeros(2, features, features, dtype=dtype, device=task.device)  # sum of f f'
        self._count = torch.zeros(2, classes, dtype=dtype, device=task.device)
        halves = 2 if moves and task.teacher is not None else 0
        self._drift = [DriftSums(features, dtype, task.device) for _ in range(halves)]
        self._held = HeldFeatures.of(task, 2 if task.recipe.augmentation.flip else 1)

    def add(self, batch: Batch) -> None:
        mirrors = self._task.recipe.augmentation.flip
        held = self._held.choose(batch) if self._held is not None else []
        for view, images in enumerate((batch.images, batch.images.flip(3)) if mirrors else (batch.images,)):
            features = self._add(images, batch.targets, 0.5 if mirrors else 1.0)
            if self._held is not None:
                self._held.put(view, features[held])

    def _add(self, images: Tensor, targets: Tensor, weight: float) -> Tensor:
        features = self._task.student.of_all_scales(images).to(self._first.dtype)  # (B, F)
        for half in range(2):
            rows, places = features[half::2], targets[half::2]
            self._first[half].index_add_(0, places, rows, alpha=weight)
            self._second[half].addmm_(rows.T, rows, alpha=weight)
            self._count[half].index_add_(0, places, torch.full_like(places, weight, dtype=self._count.dtype))
        self._add_drift(images, features)
        return features

    def _add_drift(self, images: Tensor, features: Tensor) -> None:
        if self._drift:
            assert self._task.teacher is not None
            before = self._task.teacher.of_all_scales(images)
            for half, sums in enumerate(self._drift):
                sums.add(before[half::2], features[half::2])

    def solve(self) -> None:
        """Sets the head over all scales. Rows of classes without statistics are not changed."""
        # On the CPU, because MPS has no float64: the same result on every device.
        self._first, self._second, self._count = (sums.cpu().double() for sums in (self._first, self._second, self._count))
        task, before = self._task, self._before()
        if before is not None and self._drift:
            for images, _ in self._generated():
                self._add_drift(images, task.student.of_all_scales(images))
        shrinkage, sureness = self._tried(before)
        found = self._joined(self._moved(before, BOTH), BOTH)
        self._second, self._drift = self._second[:0], []  # no longer needed
        means, rows = self._with_generated(found)
        raw, offset = lda_head(means[rows], found.covariance, shrinkage)
        weight, bias = centred(raw, offset)
        scale = self._as_sure_as_trained(weight, rows) if self._moves else sureness
        if self._held is not None:
            made = (rows, means, found.count, found.covariance, found.images, shrinkage, scale)
            task.calibration = self._held.calibration(task, *made, (weight, bias))
        self._keep(found, Frame(means[rows].mean(0), scale, shrinkage))
        serve_all_features(task)
        head = task.student.head
        rows = rows.to(head.weight.device)
        head.weight.data[rows] = (scale * weight).to(head.weight)
        head.bias.data[rows] = (scale * bias).to(head.bias)

    def _as_sure_as_trained(self, weight: Tensor, rows: Tensor) -> float:
        """The factor that gives the head the scale of the one that was trained with the backbone."""
        trained = self._task.student.head.weight.detach().to(weight)[rows]
        return float((trained - trained.mean(0)).norm() / weight.norm().clamp_min(torch.finfo(weight.dtype).tiny))

    def _tried(self, before: _Known | None) -> tuple[Shrinkage, float]:
        """Shrinkage, and the factor for logits: both from the answers of a head from one half of the images on the other."""
        images = float(self._count.sum()) + (before.images if before is not None else 0)
        here = (self._count > 0).all(0)
        known = here.clone()
        if before is not None:
            known[: len(before.placed)] |= before.placed
        if int(known.sum()) < 2 or not bool(here.any()):
            return usual_shrinkage(self._first.shape[2], images), 1.0
        heads, held = self._trial(before, HALVES, self._candidates())
        errors = {shrinkage: held.errors(*head) for shrinkage, head in heads.items()}
        groups = sorted({shrinkage.own for shrinkage in errors})
        best_of = [min((one for one in errors if one.own == own), key=errors.__getitem__) for own in groups]
        sureness = {shrinkage: held.sureness(*heads[shrinkage]) for shrinkage in best_of}
        del held  # before the second trial: these matrices are the largest in memory during learning
        if len(best_of) > 1:  # two kinds: with few images, deciding between them needs each half held out in turn
            others, held = self._trial(before, HALVES[::-1], best_of)
            errors = {shrinkage: errors[shrinkage] + held.errors(*others[shrinkage]) for shrinkage in best_of}
            del held
        best = min(best_of, key=errors.__getitem__)
        self._task.expected_error = self._expected_error(before, heads[best])
        share = (images - float(self._count[1].sum())) / images  # of all images, used by the first trial's heads
        return best.of_more(share), min(max(sureness[best], LEAST_SURE), 1.0)

    def _candidates(self) -> list[Shrinkage]:
        network = self._task.student
        grouped = GROUPED if network.all_features > network.own_features else ()
        return [Shrinkage(amount) for amount in SHRINKAGES] + [Shrinkage(one, network.own_features) for one in grouped]

    def _trial(
        self, before: _Known | None, halves: Sequence[slice], candidates: Sequence[Shrinkage]
    ) -> tuple[dict[Shrinkage, tuple[Tensor, Tensor]], HeldOut]:
        """Heads from the first half, by shrinkage; and the other half, of this task's classes and, if they were moved, old ones.

        The statistics of old classes that were not moved are the same in both halves, and say nothing about a head."""
        one = self._joined(self._moved(before, halves[0]), halves[0])
        rows = torch.nonzero(one.placed).flatten()
        heads = {shrinkage: centred(*lda_head(one.means[rows], one.covariance, shrinkage)) for shrinkage in candidates}
        del one  # before the other half's matrix is made
        other = self._joined(self._moved(before, halves[1]) if self._drift else None, halves[1])
        here = rows[other.placed[rows]]
        return heads, HeldOut(torch.searchsorted(rows, here), other.means[here], other.covariance)

    def _expected_error(self, before: _Known | None, head: tuple[Tensor, Tensor]) -> float | None:
        """The error of a head from one half of the images on the other half and, by their statistics, on old classes."""
        if not self._task.compared:
            return None
        other = self._joined(self._moved(before, HALVES[1]), HALVES[1])
        rows = torch.nonzero(other.placed).flatten()
        held = HeldOut(torch.arange(len(rows)), other.means[rows], other.covariance)
        return held.errors(*head) if len(rows) == len(head[1]) else None

    def _joined(self, old: _Known | None, halves: slice) -> _Known:
        """The statistics of this task's halves and of earlier tasks together; the mean of a refreshed class is over all its
        images."""
        count = self._count[halves].sum(0)
        means = self._first[halves].sum(0) / count.clamp_min(1)[:, None]
        scatter, images = self._second[halves].sum(0), float(count.sum())
        scatter.addmm_((means * count[:, None]).T, means, alpha=-1)
        if old is None:  # the first task, or classes that another method has learnt
            covariance = scatter.div_(max(images - float((count > 0).sum()), 1))
            return _Known(means, count, count > 0, covariance, images)
        n, means, weight = len(old.count), means * count[:, None], count.clone()
        # For classes that are known only by their rows, the number of images is not stored.
        before = torch.where(old.placed & (old.count == 0), ASSUMED, old.count)
        means[:n] += old.means * before[:, None]
        weight[:n] += before
        count[:n] += old.count
        means, placed = means / weight.clamp_min(1)[:, None], weight > 0
        covariance = scatter.add_(old.covariance, alpha=old.images).div_(max(old.images + images, 1))
        return _Known(means, count, placed, covariance, old.images + images)

    def _before(self) -> _Known | None:
        """The statistics of earlier tasks' classes, as they are kept."""
        kept = self._task.statistics
        if not kept.keys() >= SUMS.keys():
            return None
        means, count = (kept[name].values.double() for name in ("mean", "count"))
        covariance = kept["covariance"].values  # float32, as it is kept: a copy would be large
        placed, teacher = count > 0, self._task.teacher
        assert teacher is not None
        rows = teacher.head.weight.detach()[: len(count)].cpu().double()
        if "frame" in kept and not bool(placed.all()) and rows.shape == means.shape:
            found = Frame.unpacked(kept["frame"].values.double(), means.shape[1]).means(rows, covariance.double())
            means, placed = torch.where(placed[:, None], means, found), torch.ones_like(placed)
        return _Known(means, count, placed, covariance, float(kept["covariance"].images[0]))

    def _moved(self, before: _Known | None, halves: slice) -> _Known | None:
        """The same in the features of the current backbone, by a drift map from one half of the images or both."""
        if before is None or not self._drift:
            return before
        first, *rest = self._drift[halves]
        drift = sum(rest, first).solve()
        return replace(before, means=drift.means(before.means), covariance=drift.covariance(before.covariance.double()))

    def _with_generated(self, found: _Known) -> tuple[Tensor, Tensor]:
        """Means (C, F), and the classes that have one: an old class without statistics gets the mean of its generated images,
        if there are any."""
        means, placed = found.means, found.placed
        if not bool(placed.all()):
            first, number = torch.zeros_like(means), torch.zeros_like(found.count)
            for images, labels in self._generated():
                first.index_add_(0, labels.cpu(), self._task.student.of_all_scales(images).to(first))
                number.index_add_(0, labels.cpu(), torch.ones(len(labels), dtype=number.dtype))
            means = torch.where(placed[:, None], means, first / number.clamp_min(1)[:, None])
            placed = placed | (number > 0)
        return means, torch.nonzero(placed).flatten()

    def _generated(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Generated images and their classes, as many as there are real ones, batch by batch; none if the task has none."""
        if self._task.dreams is not None:
            for _ in range(-(-int(self._count.sum()) // GENERATED_AT_ONCE)):
                dream = self._task.dreams.sample(GENERATED_AT_ONCE)
                yield dream.images, dream.labels

    def _keep(self, found: _Known, frame: Frame) -> None:
        task, fewest = self._task, self._task.recipe.remember.min_images
        if found.images < fewest or not task.recipe.remember.class_statistics:
            return
        enough, images = found.count >= fewest, (int(found.images),)
        covariance, remember = found.covariance, task.recipe.remember
        if remember.images_per_direction:
            covariance = leading(covariance, max(remember.min_directions, int(found.images) // remember.images_per_direction))
        counts = tuple(int(number) for number in (found.count * enough).tolist())
        task.kept = {
            "mean": Statistic("class_mean", (found.means * enough[:, None]).float(), counts),
            "count": Statistic("class_count", (found.count * enough).float(), counts),
            "covariance": Statistic("shared_covariance", covariance.float(), images),
            "frame": Statistic("head_frame", frame.packed().float(), images),
        }
