"""Training a generator to invert a frozen classifier, and the dreams it leaves for one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.generator import Generator
from edge_dfcil.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training import Stage, Terms


@dataclass(frozen=True)
class Dream:
    """A batch of dreams: normalised images (N, 3, S, S), the teacher's logits (N, K) and its argmax labels (N,)."""

    images: Tensor
    logits: Tensor

    @property
    def labels(self) -> Tensor:
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
        Outputs (K,) of the classes to dream of.
    """

    def __init__(self, teacher: Network, wanted: Tensor, recipe: Recipe) -> None:
        self.teacher, self.wanted, self.recipe = teacher, wanted, recipe
        classes = teacher.n_classes if recipe.conditional else 0
        self.generator = Generator(teacher.image_size, latent=recipe.latent, width=recipe.width, classes=classes)
        self.generator.to(wanted.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def stage(self) -> Stage:
        """Trains the generator for `recipe.generator_steps` steps of Adam."""
        recipe = self.recipe
        optimizer = torch.optim.Adam(self.generator.parameters(), recipe.generator_learning_rate)
        scheduler = None
        if recipe.generator_schedule == "one_cycle":
            scheduler = OneCycleLR(optimizer, recipe.generator_learning_rate, total_steps=max(2, recipe.generator_steps))
        statistics = objective.BatchStatistics(self.teacher)

        def loss(labels: Tensor) -> Terms:
            images = self.generator(self.noise(len(labels)), labels)
            with statistics.recording() as seen:
                o = self.teacher.classify(images)
            return self.objective(images, o.float(), labels, seen)

        return Stage("dream", _Labels(self), recipe.generator_steps, loss, optimizer, scheduler, [self.generator])

    def objective(self, images: Tensor, o: Tensor, labels: Tensor, seen: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Terms:
        """The weighted terms of the inversion objective (ABD, eq. 5)."""
        recipe = self.recipe
        target = labels if recipe.conditional else o.argmax(1)
        return {
            "content": recipe.content * objective.content(o, target, recipe.content_temperature, recipe.label_smoothing),
            "diversity": recipe.diversity * objective.label_diversity(o),
            "statistics": recipe.statistics * objective.statistics_alignment(seen),
            "smoothness": recipe.smoothness * objective.smoothness(images),
        }

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, self.recipe.latent, device=self.wanted.device)

    def labels(self, n: int) -> Tensor:
        """`n` of the wanted classes, as even as can be, in random order."""
        repeats = -(-n // len(self.wanted))
        even = torch.cat([self.wanted[torch.randperm(len(self.wanted), device=self.wanted.device)] for _ in range(repeats)])
        return even[:n]

    @torch.no_grad()
    def dream(self, n: int) -> Dream:
        """`n` fresh dreams of whatever class the teacher sees in them."""
        images = self.generator.eval()(self.noise(n), self.labels(n))
        return Dream(images, self.teacher.classify(images))


class _Labels:
    """Endless batches of the labels to dream of."""

    def __init__(self, dreamer: Dreamer) -> None:
        self._dreamer = dreamer

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._dreamer.labels(self._dreamer.recipe.generator_batch)


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
            index = torch.randint(len(self._pool), (n,), device=self._pool.images.device)
            drawn = self._pool[index]
            return Dream(drawn.images.float(), drawn.logits)
        assert self._dreamer is not None
        return collect(self._dreamer, n)

    def class_shares(self, n_classes: int) -> Tensor:
        """The share of each of the teacher's classes among the dreams (n_classes,), measured on the pool or a sample."""
        labels = (self._pool or self.sample(1024)).labels
        return torch.bincount(labels, minlength=n_classes).float() / len(labels)


def make_pool(dreamer: Dreamer, size: int) -> Dream:
    """`size` dreams in half precision, with an even share for every wanted class as far as the generator can give it.

    A class that the generator misses is filled up with what there is: its share is then smaller, never its labels wrong.
    """
    quota = -(-size // len(dreamer.wanted))
    kept: list[Dream] = []
    spare: list[Dream] = []
    have = torch.zeros(dreamer.teacher.n_classes, dtype=torch.long, device=dreamer.wanted.device)
    wanted = torch.zeros_like(have, dtype=torch.bool).index_fill_(0, dreamer.wanted, True)
    total = 0
    for _ in range(4 * -(-size // dreamer.recipe.generator_batch)):
        batch = dreamer.dream(dreamer.recipe.generator_batch)
        batch = Dream(batch.images.half(), batch.logits.float())[wanted[batch.labels]]
        one_hot = torch.nn.functional.one_hot(batch.labels, len(have))
        rank = have[batch.labels] + (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for the class's first dream, and so on
        within = rank <= quota
        kept.append(batch[within])
        have += one_hot[within].sum(0)
        total += int(within.sum())
        if total >= size:
            break
        if sum(map(len, spare)) < size:
            spare.append(batch[~within])
    return concatenate(kept + spare)[torch.arange(min(size, total + sum(map(len, spare))), device=wanted.device)]


def collect(dreamer: Dreamer, n: int) -> Dream:
    """`n` fresh dreams of wanted classes; those of other classes are dreamt again."""
    batch = dreamer.dream(n)
    if len(dreamer.wanted) == dreamer.teacher.n_classes:
        return batch
    wanted = torch.isin(batch.labels, dreamer.wanted)
    index = torch.nonzero(wanted).squeeze(1)
    if len(index) == 0:  # not one of this batch: the classes it did dream of stand in
        return batch
    return batch[index[torch.arange(n, device=index.device) % len(index)]]


def concatenate(dreams: list[Dream]) -> Dream:
    return Dream(torch.cat([d.images for d in dreams]), torch.cat([d.logits for d in dreams]))
