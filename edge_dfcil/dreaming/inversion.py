"""Training a generator to invert a frozen classifier, and the images that it generates for one task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from edge_dfcil import devices
from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.generator import Generator
from edge_dfcil.errors import DivergedError
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training import augment
from edge_dfcil.training.stage import StageSpec, Terms, momentum_of_parts


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
        Outputs (W,) of the classes to generate.
    student
        A network that is learning from the images: they are then optimised to where its answers differ from the teacher's.
    """

    def __init__(self, teacher: Network, wanted: Tensor, recipe: Recipe, student: Network | None = None) -> None:
        self.teacher, self.wanted, self.recipe, self.student = teacher, wanted, recipe, student
        self.generator = Generator(teacher.image_size, latent=recipe.generator.latent, width=recipe.generator.width)
        self.generator.to(wanted.device, memory_format=devices.memory_format(wanted.device))  # type: ignore[call-overload]

    def stage(self) -> StageSpec:
        """Trains the generator for `recipe.generator.steps` steps of Adam."""
        recipe, steps = self.recipe, self.recipe.generator.steps

        def optimizer() -> Optimizer:
            return torch.optim.Adam(self.generator.parameters(), recipe.generator.learning_rate)

        def scheduler(optimizer: Optimizer) -> LRScheduler:
            return OneCycleLR(optimizer, recipe.generator.learning_rate, total_steps=max(2, steps))

        inversion = _Inversion(self)
        return StageSpec(
            "dream",
            _Noise(self),
            steps,
            inversion.loss,
            optimizer,
            scheduler if recipe.generator.schedule == "one_cycle" else None,
            trains=[self.generator],
            before_parts=inversion.read_parts,
            mixed_precision=recipe.schedule.mixed_precision,
        )

    def noise(self, n: int) -> Tensor:
        """z ~ N(0, I), (n, latent)."""
        return torch.randn(n, self.recipe.generator.latent, device=self.wanted.device)

    @torch.no_grad()
    def dream(self, n: int) -> Dream:
        """At most `n` new dreams: those of `n` images that the teacher assigns to a wanted class.

        With a pool, the generator uses batch statistics, as in its training: the dreams then vary more. Without a pool it uses
        running statistics, as published.
        """
        images = self.generator.train(mode=self.recipe.remember.pool > 0)(self.noise(n))
        dream = Dream(images, self.teacher.classify(images).float())
        if len(self.wanted) == self.teacher.n_classes:
            return dream
        return dream[torch.isin(dream.labels, self.wanted)]


@dataclass(frozen=True)
class _Means:
    """All that the objective's terms over a batch depend on, as means over its images: of the inputs of each BatchNorm
    layer and of their squares (C,), and of the softmax (K,)."""

    inputs: list[Tensor]
    squares: list[Tensor]
    softmax: Tensor

    @classmethod
    def of(cls, seen: list[objective.LayerStatistics], o: Tensor) -> _Means:
        return cls([u for _, _, u, _ in seen], [v + u**2 for _, _, u, v in seen], o.softmax(1).mean(0))

    def __add__(self, other: _Means) -> _Means:
        def add(ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [one + another for one, another in zip(ours, theirs, strict=True)]

        return _Means(add(self.inputs, other.inputs), add(self.squares, other.squares), self.softmax + other.softmax)

    def __mul__(self, share: float) -> _Means:
        return _Means([share * mean for mean in self.inputs], [share * mean for mean in self.squares], share * self.softmax)

    def statistics(self, seen: list[objective.LayerStatistics]) -> list[objective.LayerStatistics]:
        """With the running statistics that `seen` has."""
        means = zip(seen, self.inputs, self.squares, strict=True)
        return [(m, r, u, square - u**2) for (m, r, _, _), u, square in means]


class _Inversion:
    """The weighted inversion objective (ABD, eq. 5) of a batch of noise, whole or in parts.

    Diversity and statistics depend on a whole batch. When it is split, a first pass computes the means of every part; a part's
    loss is then that of the whole batch, with gradients through the part only. They add up to the gradients of the whole,
    except for the generator's own BatchNorm, which sees a part at a time, and for `inversion.augment`, which draws again for
    the loss.
    """

    def __init__(self, dreamer: Dreamer) -> None:
        self._dreamer, self._statistics = dreamer, objective.BatchStatistics(dreamer.teacher)
        self._others: Iterator[tuple[float, _Means]] | None = None

    @torch.no_grad()
    def read_parts(self, parts: Sequence[Tensor]) -> None:
        total = sum(map(len, parts))
        shares = [len(part) / total for part in parts]
        means = []
        with momentum_of_parts([self._dreamer.generator], math.inf):
            for part, share in zip(parts, shares, strict=True):
                _, _, o, seen = self._forward(part)
                means.append(_Means.of(seen, o) * share)
        others = [reduce(_Means.__add__, means[:part] + means[part + 1 :]) for part in range(len(parts))]
        self._others = iter(list(zip(shares, others, strict=True)))

    def loss(self, z: Tensor) -> Terms:
        recipe = self._dreamer.recipe
        images, views, o, seen = self._forward(z)
        share, p = 1.0, o.softmax(1).mean(0)
        if self._others is not None:
            share, others = next(self._others)
            means = _Means.of(seen, o) * share + others
            seen, p = means.statistics(seen), means.softmax
        terms = {
            "content": recipe.inversion.content * objective.content(o, o.argmax(1), recipe.inversion.content_temperature),
            "diversity": recipe.inversion.diversity * _of_whole(objective.diversity_of(p), share),
            "statistics": recipe.inversion.statistics * _of_whole(objective.statistics_alignment(seen), share),
            "smoothness": recipe.inversion.smoothness * objective.smoothness(images),
        }
        if (student := self._dreamer.student) is not None:
            terms["competition"] = recipe.inversion.competition * objective.competition(o, student.classify(views).float())
        return terms

    def _forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, list[objective.LayerStatistics]]:
        """Images, what the teacher sees of them, its logits, and the statistics of its layers."""
        teacher, recipe = self._dreamer.teacher, self._dreamer.recipe
        images = self._dreamer.generator(z)
        views = augment.views(images, teacher, recipe) if recipe.inversion.augment else images
        with self._statistics.recording() as seen:
            o = teacher.classify(views).float()
        return images, views, o, seen


def _of_whole(term: Tensor, share: float) -> Tensor:
    """A term of the whole batch for the loss of a part, which is weighted by its share: the same value, and a gradient divided
    by the share."""
    return term.detach() + (term - term.detach()) / share if share < 1 else term


class _Noise:
    """Endless batches of noise."""

    def __init__(self, dreamer: Dreamer) -> None:
        self._dreamer = dreamer

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._dreamer.noise(self._dreamer.recipe.generator.batch)


class Pool:
    """Dreams kept while a task is learnt, one byte for each value: an image is rounded to 256 steps between its smallest and its
    largest value, about 0.01 standard deviations apart, so nothing is clipped.

    Attributes
    ----------
    logits
        The teacher's, for each dream as it was before the rounding (N, K).
    """

    def __init__(self, size: int, teacher: Network, device: torch.device) -> None:
        # Memory for all is allocated once: joining pieces would need twice as much.
        side = teacher.image_size
        self._bytes = torch.empty(
            size, 3, side, side, dtype=torch.uint8, device=device, memory_format=devices.memory_format(device)
        )
        self._low, self._step = (torch.empty(size, 1, 1, 1, device=device) for _ in range(2))
        self.logits = torch.empty(size, teacher.n_classes, device=device)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return sum(tensor.nbytes for tensor in (self._bytes, self._low, self._step, self.logits))

    @property
    def labels(self) -> Tensor:
        """The class that the teacher saw in each (N,)."""
        return self.logits.argmax(1)

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: Tensor) -> Dream:
        return Dream(self._bytes[index] * self._step[index] + self._low[index], self.logits[index])

    def write(self, begin: int, end: int, dream: Dream, from_the_back: bool = False) -> int:
        """Writes as many dreams as fit between `begin` and `end`; returns their number."""
        n = min(len(dream), end - begin)
        room = slice(end - n, end) if from_the_back else slice(begin, begin + n)
        low, high = dream.images[:n].flatten(1).aminmax(dim=1)
        low, step = low.view(-1, 1, 1, 1), ((high - low) / 255).clamp_min(TINY_STEP).view(-1, 1, 1, 1)
        self._bytes[room] = ((dream.images[:n] - low) / step).round().clamp(0, 255).to(torch.uint8)
        self._low[room], self._step[room], self.logits[room] = low, step, dream.logits[:n]
        return n

    def close_gap(self, front: int, back: int) -> None:
        """Keeps the first `front` and the last `back` dreams, moved together a few at a time."""
        for name in ("_bytes", "_low", "_step", "logits"):
            values = getattr(self, name)
            for begin in range(0, back, 64):
                few = values[len(values) - back + begin :][: min(64, back - begin)].clone()
                values[front + begin : front + begin + len(few)] = few
            setattr(self, name, values[: front + back])


TINY_STEP = 1e-8  # for an image of one uniform value


class Dreams:
    """Generated images of the old classes for a method: fresh ones at every step, or a pool made once, with its logits."""

    def __init__(self, source: Dreamer | Pool) -> None:
        self._dreamer = source if isinstance(source, Dreamer) else None
        self._pool = source if isinstance(source, Pool) else None

    @classmethod
    def of(cls, dreamer: Dreamer, at_once: int | None = None) -> Dreams:
        """A pool or fresh dreams, as the recipe says. With a pool, the generator is not needed any more."""
        return cls(make_pool(dreamer, dreamer.recipe.remember.pool, at_once) if dreamer.recipe.remember.pool else dreamer)

    def sample(self, n: int) -> Dream:
        """`n` dreams of wanted classes, drawn at random."""
        if self._pool is not None:
            return self._pool[torch.randint(len(self._pool), (n,), device=self._pool.logits.device)]
        assert self._dreamer is not None
        dreams = [self._dreamer.dream(n)]
        while sum(map(len, dreams)) < n and len(dreams) < TRIES:
            dreams.append(self._dreamer.dream(n))
        dream = Dream(torch.cat([d.images for d in dreams]), torch.cat([d.logits for d in dreams]))
        _check_some(dream, self._dreamer)
        return dream[torch.arange(n, device=dream.images.device) % len(dream)]

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, or of the generator."""
        if self._pool is not None:
            return self._pool.nbytes
        return sum(tensor.nbytes for tensor in self._dreamer.generator.state_dict().values()) if self._dreamer else 0

    def class_shares(self, n_classes: int) -> Tensor:
        """The share of each of the teacher's classes among the dreams (n_classes,), measured on the pool or a sample."""
        labels = (self._pool or self.sample(1024)).labels
        return torch.bincount(labels, minlength=n_classes).float() / len(labels)


TRIES = 8  # a class counts as missed after this many times the needed images have been generated


def make_pool(dreamer: Dreamer, size: int, at_once: int | None = None) -> Pool:
    """At most `size` dreams, with an equal share for every wanted class as far as the generator provides it.

    If a class has too few images, images of other classes fill the pool: the class has a smaller share, but no label is wrong.
    `at_once` images are generated together; None takes the generator's batch size. Raises `DivergedError` when no image of a
    wanted class is generated at all.
    """
    teacher, batch_size = dreamer.teacher, min(at_once or dreamer.recipe.generator.batch, dreamer.recipe.generator.batch)
    quota = -(-size // len(dreamer.wanted))
    have = torch.zeros(teacher.n_classes, dtype=torch.long, device=dreamer.wanted.device)
    pool = Pool(size, teacher, dreamer.wanted.device)
    filled = spare = 0  # dreams within their class's quota fill the front, others the back, until the first need the space
    misses, rounds = 0, -(-size // batch_size)
    for _ in range(TRIES * rounds):
        dream = dreamer.dream(batch_size)
        one_hot = F.one_hot(dream.labels, teacher.n_classes)
        rank = have[dream.labels] + (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for a class's first dream, and so on
        within = rank <= quota
        have += one_hot[within].sum(0)
        misses = 0 if bool(within.any()) else misses + 1
        filled += pool.write(filled, size, dream[within])
        spare = min(spare, size - filled)
        spare += pool.write(filled, size - spare, dream[~within], from_the_back=True)
        if filled == size:
            return pool
        if misses == max(rounds, TRIES):  # none of so many images was of a class below its quota: more would not help
            break
    pool.close_gap(filled, spare)
    _check_some(pool, dreamer)
    return pool


def _check_some(dreams: Dream | Pool, dreamer: Dreamer) -> None:
    if not len(dreams):
        raise DivergedError(
            f"none of the dreams is of the {len(dreamer.wanted)} classes asked for; "
            "train the generator longer (recipe.generator.steps)"
        )
