"""Training a generator to invert a frozen classifier, and the dreams it leaves for one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.generator import Generator
from edge_dfcil.errors import DivergedError
from edge_dfcil.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training import Stage, Terms


@dataclass(frozen=True)
class Dream:
    """A batch of dreams: normalised images (N, 3, S, S) and the teacher's logits for them (N, K)."""

    images: Tensor
    logits: Tensor

    @property
    def labels(self) -> Tensor:
        """The class that the teacher sees in each (N,)."""
        return self.logits.argmax(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Dream:
        return Dream(self.images[index], self.logits[index])


class Dreamer:
    """A generator and the frozen classifier that it inverts.

    Parameters
    ----------
    teacher
        In eval mode, without gradients.
    wanted
        Outputs (W,) of the classes to dream of.
    """

    def __init__(self, teacher: Network, wanted: Tensor, recipe: Recipe) -> None:
        self.teacher, self.wanted, self.recipe = teacher, wanted, recipe
        self.generator = Generator(teacher.image_size, latent=recipe.latent, width=recipe.width)
        self.generator.to(wanted.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def stage(self) -> Stage:
        """Trains the generator for `recipe.generator_steps` steps of Adam."""
        recipe = self.recipe
        optimizer = torch.optim.Adam(self.generator.parameters(), recipe.generator_learning_rate)
        scheduler: LRScheduler | None = None
        if recipe.generator_schedule == "one_cycle":
            scheduler = OneCycleLR(optimizer, recipe.generator_learning_rate, total_steps=max(2, recipe.generator_steps))
        statistics = objective.BatchStatistics(self.teacher)

        def loss(z: Tensor) -> Terms:
            images = self.generator(z)
            with statistics.recording() as seen:
                o = self.teacher.classify(images)
            return self.objective(images, o.float(), seen)

        return Stage("dream", _Noise(self), recipe.generator_steps, loss, optimizer, scheduler, [self.generator])

    def objective(self, images: Tensor, o: Tensor, seen: list[objective.LayerStatistics]) -> Terms:
        """The weighted terms of the inversion objective (ABD, eq. 5)."""
        recipe = self.recipe
        return {
            "content": recipe.content * objective.content(o, o.argmax(1), recipe.content_temperature),
            "diversity": recipe.diversity * objective.label_diversity(o),
            "statistics": recipe.statistics * objective.statistics_alignment(seen),
            "smoothness": recipe.smoothness * objective.smoothness(images),
        }

    def noise(self, n: int) -> Tensor:
        """z ~ N(0, I), (n, latent)."""
        return torch.randn(n, self.recipe.latent, device=self.wanted.device)

    @torch.no_grad()
    def dream(self, n: int) -> Dream:
        """About `n` fresh dreams: those in which the teacher sees a wanted class, so fewer if some are not wanted.

        Dreams for a pool are drawn with batch statistics, as the generator was trained: they vary more. Single ones use
        running statistics, as published.
        """
        images = self.generator.train(mode=self.recipe.pool > 0)(self.noise(n))
        dream = Dream(images, self.teacher.classify(images).float())
        if len(self.wanted) == self.teacher.n_classes:
            return dream
        return dream[torch.isin(dream.labels, self.wanted)]


class _Noise:
    """Endless batches of noise."""

    def __init__(self, dreamer: Dreamer) -> None:
        self._dreamer = dreamer

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._dreamer.noise(self._dreamer.recipe.generator_batch)


class Dreams:
    """Where a method takes the old classes from: fresh dreams at every step, or a pool made once with its logits."""

    def __init__(self, dreamer: Dreamer) -> None:
        self._dreamer: Dreamer | None = dreamer
        self._pool: Dream | None = None
        if dreamer.recipe.pool:
            self._pool = make_pool(dreamer, dreamer.recipe.pool)
            self._dreamer = None  # the generator's memory is free from here on

    def sample(self, n: int) -> Dream:
        """`n` dreams of wanted classes, drawn at random."""
        if self._pool is not None:
            drawn = self._pool[torch.randint(len(self._pool), (n,), device=self._pool.images.device)]
            return Dream(drawn.images.float(), drawn.logits)
        assert self._dreamer is not None
        dreams = [self._dreamer.dream(n)]
        while sum(map(len, dreams)) < n and len(dreams) < TRIES:
            dreams.append(self._dreamer.dream(n))
        dream = _joined(dreams, self._dreamer)
        return dream[torch.arange(n, device=dream.images.device) % len(dream)]

    def class_shares(self, n_classes: int) -> Tensor:
        """The share of each of the teacher's classes among the dreams (n_classes,), measured on the pool or a sample."""
        labels = (self._pool or self.sample(1024)).labels
        return torch.bincount(labels, minlength=n_classes).float() / len(labels)


TRIES = 8  # times the images needed that are dreamt before a class counts as missed


def make_pool(dreamer: Dreamer, size: int) -> Dream:
    """At most `size` dreams in half precision, with an even share for every wanted class as far as the generator gives it.

    What a class lacks is made up with dreams of the others: its share is then smaller, its labels never wrong.
    Raises `DivergedError` when no wanted class is dreamt of at all.
    """
    n_classes, batch_size = dreamer.teacher.n_classes, dreamer.recipe.generator_batch
    quota = -(-size // len(dreamer.wanted))
    have = torch.zeros(n_classes, dtype=torch.long, device=dreamer.wanted.device)
    kept: list[Dream] = []
    spare: list[Dream] = []
    for _ in range(TRIES * -(-size // batch_size)):
        dream = dreamer.dream(batch_size)
        dream = Dream(dream.images.half(), dream.logits)
        one_hot = F.one_hot(dream.labels, n_classes)
        rank = have[dream.labels] + (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for a class's first dream, and so on
        within = rank <= quota
        have += one_hot[within].sum(0)
        kept.append(dream[within])
        if sum(map(len, kept)) >= size:
            break
        if sum(map(len, spare)) < size:
            spare.append(dream[~within])
    pool = _joined(kept + spare, dreamer)
    return pool[torch.arange(min(size, len(pool)), device=pool.images.device)]


def _joined(dreams: list[Dream], dreamer: Dreamer) -> Dream:
    dream = Dream(torch.cat([d.images for d in dreams]), torch.cat([d.logits for d in dreams]))
    if not len(dream):
        raise DivergedError(
            f"none of the dreams is of the {len(dreamer.wanted)} classes asked for; "
            "train the generator longer (recipe.generator_steps)"
        )
    return dream
