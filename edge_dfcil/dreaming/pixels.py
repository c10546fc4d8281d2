"""DeepInversion: dreams whose pixels are optimised directly, each batch from noise (Yin et al., CVPR 2020, section 3).

It is slower than a generator, which is trained once and then generates images quickly. The images are finer, and each is
optimised for a class that was asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil import devices
from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.inversion import Dream, Pool
from edge_dfcil.errors import BackboneError
from edge_dfcil.model.backbones import check_backbone
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.stage import StageSpec, Terms

LARGE = 128  # side in pixels from which images are first optimised at half their size
SKETCHED = 2 / 3  # share of the steps at half size: 2,000 of 3,000 for ImageNet


class Canvas:
    """A batch of images that is optimised pixel by pixel.

    Parameters
    ----------
    teacher
        In eval mode, without gradients.
    labels
        The target class of each image (N,).
    student
        A network that is learning from the images: they are then optimised to where its answers differ from the teacher's.
    """

    def __init__(self, teacher: Network, labels: Tensor, recipe: Recipe, student: Network | None = None) -> None:
        self.teacher, self.labels, self.recipe, self.student = teacher, labels, recipe, student
        self._statistics = objective.BatchStatistics(teacher)
        # Black and white in normalised space, by channel.
        self._low, self._high = (
            teacher.normalize(torch.zeros_like(teacher.mean)),
            teacher.normalize(torch.ones_like(teacher.mean)),
        )
        self._images = self._blank(torch.randn(len(labels), 3, *self._first_size(), device=labels.device))

    def stages(self) -> Iterator[StageSpec]:
        """From noise to images: one stage, or a sketch at half size and then a stage at full size."""
        steps = self.recipe.pixels.steps
        if self._images.shape[-1] < self.teacher.image_size:
            sketched = round(SKETCHED * steps)
            yield self._stage("sketch", sketched)
            size = self.teacher.image_size
            self._images = self._blank(F.interpolate(self._images.detach(), (size, size), mode="bilinear"))
            steps -= sketched
        yield self._stage("dream", steps)

    @torch.no_grad()
    def dream(self) -> Dream:
        """The images as they are now, with the teacher's logits."""
        images = self._images.detach().clamp(self._low, self._high)
        return Dream(images, self.teacher.classify(images).float())

    def _first_size(self) -> tuple[int, int]:
        size = self.teacher.image_size
        if size >= LARGE:
            with contextlib.suppress(BackboneError):  # a backbone that runs at one size only
                if check_backbone(self.teacher.backbone, size // 2) == self.teacher.own_features:
                    size //= 2
        return size, size

    @staticmethod
    def _blank(images: Tensor) -> nn.Parameter:
        return nn.Parameter(images.contiguous(memory_format=devices.memory_format(images.device)))

    def _stage(self, name: str, steps: int) -> StageSpec:
        return StageSpec(
            name,
            [torch.arange(len(self.labels), device=self.labels.device)],
            steps,
            self.loss,
            lambda: torch.optim.Adam([self._images], self.recipe.pixels.learning_rate, betas=(0.5, 0.9)),
            lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps)),
            mixed_precision=self.recipe.schedule.mixed_precision,
        )

    def loss(self, index: Tensor) -> Terms:
        """The weighted objective (DeepInversion, eqs. 2 to 4) of some of the images, with the statistics of these alone."""
        recipe, teacher = self.recipe, self.teacher
        with torch.no_grad():
            self._images.clamp_(self._low, self._high)  # values that the last step moved out of the range of pixels
        images = self._seen(self._images[index])
        with self._statistics.recording() as seen:
            o = teacher.classify(images).float()
        terms = {
            "class": F.cross_entropy(o, self.labels[index]),
            "statistics": recipe.pixels.statistics * objective.feature_statistics(seen, recipe.pixels.first_layer),
            "variation": recipe.pixels.variation * objective.total_variation(images),
        }
        if recipe.pixels.l2:
            terms["l2"] = recipe.pixels.l2 * objective.l2(images)
        if self.student is not None:
            terms["competition"] = recipe.pixels.competition * objective.competition(o, self.student.classify(images).float())
        return terms

    def _seen(self, images: Tensor) -> Tensor:
        """Shifted with wrap-around, and mirrored in half of the steps if the recipe treats mirrored images as equal."""
        jitter = self.recipe.pixels.jitter
        rows, columns = torch.randint(-jitter, jitter + 1, (2,)).tolist()
        images = images.roll((rows, columns), (2, 3))
        return images.flip(3) if self.recipe.augmentation.flip and torch.rand(()) < 0.5 else images


def paint(pool: Pool, teacher: Network, wanted: Tensor, recipe: Recipe, student: Network | None = None) -> Iterator[StageSpec]:
    """Fills a pool with pixel dreams of the wanted classes, in equal shares, batch by batch; then cuts it to those obtained.

    Statistics are matched over a batch, so each batch is filled up to `pixels.batch` images with all the classes that the
    teacher knows, wanted or not. Dreams that the teacher finally assigns to no wanted class are left out.
    """
    size, filled, device = len(pool), 0, wanted.device
    everything = torch.arange(teacher.n_classes, device=device)
    order = wanted.repeat(-(-size // len(wanted)))[:size]
    for labels in order.split(recipe.pixels.batch):
        more = everything.repeat(-(-recipe.pixels.batch // len(everything)))[: recipe.pixels.batch - len(labels)]
        canvas = Canvas(teacher, torch.cat([labels, more]), recipe, student)
        yield from canvas.stages()
        dream = canvas.dream()[torch.arange(len(labels), device=device)]
        filled += pool.write(filled, size, dream[torch.isin(dream.labels, wanted)])
    pool.close_gap(filled, 0)
