"""Guided latent inversion: the upper blocks of a network train on generated feature maps of old classes.

The lower blocks stay as they are, and so do BatchNorm's statistics: those of a pretrained network, or of one that the first
task trained. New images pass the lower blocks once. At each task a generator is trained to make maps at the cut that the upper
blocks of before the task map to the stored mean and variances of each old class. The upper blocks then train on new maps and
generated ones, with distillation of their features. Class statistics are moved by a drift map, and the head is LDA. The frozen
network with the same head is the rival.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import accuracy, datasets, files, machine, tables
from edge_dfcil.dreaming import objective
from edge_dfcil.heads.drift import DriftMap, DriftSums
from edge_dfcil.heads.lda import Shrinkage, lda_head
from edge_dfcil.model import scales
from edge_dfcil.recipe import dotted, find_recipe

SHRINKAGE = Shrinkage(0.3)
BATCH, GENERATOR_BATCH, CLASSES_PER_BATCH, POOL = 32, 64, 4, 512
LEARNING_RATE, GENERATOR_LEARNING_RATE = 0.05, 2e-3
CLIP = 1.0  # the norm of the gradient: without it, the activations of networks that know few classes can die
NOISE, WIDTH = 64, 128  # of the generator


@dataclass(frozen=True)
class Budget:
    """Steps of a task, of its generator, and of joint training on all classes."""

    steps: int
    generator: int
    joint: int


BUDGETS = {
    "pretrained-signs": Budget(120, 100, 300),
    "pretrained-cifar": Budget(120, 100, 300),
    "edge-5x4": Budget(600, 100, 3000),  # training steps take a tenth of the time
}

FROZEN, GUIDED, ALIGNED, NONE, JOINT = "frozen", "guided", "BatchNorm's statistics", "no generated maps", "joint training"
VARIANTS = {
    FROZEN: "the backbone as it is",
    NONE: "upper blocks trained on new images alone",
    ALIGNED: "the same and generated maps that match BatchNorm's statistics (ABD's objective)",
    GUIDED: "the same and generated maps that match the stored mean and variances of each class",
    JOINT: "upper blocks trained on real images of all classes (an upper bound)",
}


@dataclass(frozen=True)
class Chain:
    """A backbone as a sequence: its features are the means of what `last` makes of the last block's maps.

    Attributes
    ----------
    blocks
        By their names in the backbone.
    cut
        How many blocks are frozen.
    """

    stem: nn.Module
    blocks: dict[str, nn.Module]
    last: nn.Module
    cut: int


def chain(backbone: Any) -> Chain:
    """Of EfficientNet-Lite or a residual network for small images. Seven of 16 blocks, or a third of them, can be trained."""
    if hasattr(backbone, "stages"):
        blocks = {f"stages.{i}.{j}": block for i, stage in enumerate(backbone.stages) for j, block in enumerate(stage)}
        stem = nn.Sequential(backbone.conv1, backbone.bn1, nn.ReLU())
        return Chain(stem, blocks, nn.Identity(), cut=2 * len(blocks) // 3)
    blocks = {f"_blocks.{i}": block for i, block in enumerate(backbone._blocks)}
    stem = nn.Sequential(backbone._conv_stem, backbone._bn0, backbone._swish)
    return Chain(stem, blocks, nn.Sequential(backbone._conv_head, backbone._bn1, backbone._swish), cut=9 * len(blocks) // 16)


class Lower(nn.Module):
    """Normalised images (N, 3, S, S) -> maps at the cut (N, C, H, W) and the frozen features of several scales (N, G)."""

    def __init__(self, whole: Chain, read: Sequence[str]) -> None:
        super().__init__()
        self.stem = whole.stem
        self.blocks, self.read = _part(whole, read, slice(whole.cut))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps, found = _through(self.blocks, self.read, self.stem(images))
        return maps, torch.cat(found, 1)


class Upper(nn.Module):
    """Maps at the cut -> the last features, followed by those of several scales, (N, U)."""

    def __init__(self, whole: Chain, read: Sequence[str]) -> None:
        super().__init__()
        self.blocks, self.read = _part(whole, read, slice(whole.cut, None))
        self.last = whole.last

    def forward(self, maps: Tensor) -> Tensor:
        maps, found = _through(self.blocks, self.read, maps)
        return torch.cat([self.last(maps).mean((2, 3)), *found], 1)


def _part(whole: Chain, read: Sequence[str], where: slice) -> tuple[nn.ModuleList, list[bool]]:
    """Some blocks, and whether the features of each are read."""
    names = list(whole.blocks)[where]
    return nn.ModuleList(whole.blocks[name] for name in names), [name in read for name in names]


def _through(blocks: nn.ModuleList, read: Sequence[bool], maps: Tensor) -> tuple[Tensor, list[Tensor]]:
    found = []
    for block, is_read in zip(blocks, read, strict=True):
        maps = block(maps)
        if is_read:
            found.append(scales.pooled(maps, spread=True))
    return maps, found


class Generator(nn.Module):
    """Noise (N, NOISE) and labels (N,) -> maps (N, C, H, W); before it is trained, with the channel statistics of `like`."""

    def __init__(self, classes: int, like: Tensor) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(classes, NOISE), nn.Linear(2 * NOISE, WIDTH * 9)
        channels = like.shape[1]
        self.convolutions = nn.Sequential(
            nn.BatchNorm2d(WIDTH),
            nn.Upsample(size=like.shape[2:]),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.BatchNorm2d(WIDTH),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, channels, 3, padding=1),
        )
        self.out = nn.BatchNorm2d(channels)
        with torch.no_grad():
            self.out.weight.copy_(like.std((0, 2, 3)))
            self.out.bias.copy_(like.mean((0, 2, 3)))

    def forward(self, labels: Tensor) -> Tensor:
        noise = torch.randn(len(labels), NOISE)
        x = self.first(torch.cat([noise, self.embedding(labels)], 1)).view(-1, WIDTH, 3, 3)
        found: Tensor = self.out(self.convolutions(x))
        return found


@dataclass(frozen=True)
class Maps:
    """What the lower part gives for the images of one task: maps (N, C, H, W), frozen features (N, G) and rows (N,)."""

    maps: Tensor
    fixed: Tensor
    rows: Tensor

    def features(self, upper: Upper) -> Tensor:
        """All features (N, U + G)."""
        return torch.cat([_features(upper, self.maps), self.fixed], 1).double()


@dataclass
class Statistics:
    """Class means (C, F), the covariance within classes (F, F), and of how many images they are."""

    means: Tensor
    covariance: Tensor
    images: int

    @classmethod
    def of(cls, features: Tensor, rows: Tensor) -> Statistics:
        classes = rows.unique()
        means = torch.stack([features[rows == row].mean(0) for row in classes])
        rest = features - means[rows - classes[0]]
        return cls(means, rest.T @ rest / (len(rest) - len(classes)), len(rest))

    def with_new(self, new: Statistics) -> Statistics:
        """Also of the classes of a new task."""
        images = self.images + new.images
        covariance = (self.images * self.covariance + new.images * new.covariance) / images
        return Statistics(torch.cat([self.means, new.means]), covariance, images)

    def moved(self, drift: DriftMap) -> Statistics:
        """In the features of new upper blocks; the frozen features stay."""
        u = len(drift.offset)
        whole = torch.eye(len(self.covariance), dtype=self.covariance.dtype)
        whole[:u, :u] = drift.matrix
        means, covariance = self.means @ whole, whole.T @ self.covariance @ whole
        means[:, :u] += drift.offset
        covariance[:u, :u] += drift.residual
        return Statistics(means, covariance, self.images)

    def head(self, features: int) -> tuple[Tensor, Tensor]:
        """LDA's weight and bias for the first `features`."""
        return lda_head(self.means[:, :features], self.covariance[:features, :features].contiguous(), SHRINKAGE)

    def accuracy(self, tests: Sequence[Maps], upper: Upper, features: int | None = None) -> float:
        """Of LDA on test images of the classes."""
        found, rows = torch.cat([test.features(upper) for test in tests]), torch.cat([test.rows for test in tests])
        weight, bias = self.head(features or found.shape[1])
        return float(((found[:, : len(weight[0])] @ weight.T + bias).argmax(1) == rows).double().mean())


@torch.no_grad()
def _features(upper: Upper, maps: Tensor) -> Tensor:
    return torch.cat([upper(part) for part in maps.split(100)])


@dataclass(frozen=True)
class Case:
    """A preset with a seed: the upper part of its network, of which `last` features are the backbone's own, each task's images
    behind the lower part, and the steps."""

    upper: Upper
    last: int
    training: list[Maps]
    tests: list[Maps]
    budget: Budget


def case(protocol: accuracy.Protocol, data: datasets.Data, seed: int, budget: Budget) -> Case:
    """Trains the network on the first task unless it is pretrained, and passes all images through the lower part once."""
    recipe = find_recipe(protocol.recipe).changed(dotted(protocol.changes) | accuracy.FROZEN)
    learner, tasks = accuracy.new_learner(protocol, "abd", seed, recipe, "cpu"), accuracy.tasks_of(protocol, data, seed)
    if protocol.weights is None:
        accuracy.learn(learner, protocol, data, tasks[:1], seed)
    network = copy.deepcopy(learner.network).eval().requires_grad_(False)
    whole, read = chain(network.backbone), network.scales.layers
    lower, upper = Lower(whole, read), Upper(whole, read)
    rows = {target: row for row, target in enumerate(target for task in tasks for target in task)}

    @torch.no_grad()
    def behind(part: datasets.Part) -> Maps:
        images = network.normalize(network.pixels(part.images))
        maps, fixed = zip(*(lower(some) for some in images.split(50)), strict=True)
        return Maps(torch.cat(maps), torch.cat(fixed), torch.tensor([rows[int(target)] for target in part.targets]))

    training = [behind(accuracy.training(protocol, data, task, seed)) for task in tasks]
    tests = [behind(data.part("test", task, 500)) for task in tasks]
    return Case(upper, network.own_features, training, tests, budget)


def learn(found: Case, variant: str, seed: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Learns all tasks with one variant; returns accuracy after each (with all features and with the last ones) and seconds."""
    torch.manual_seed(seed)
    upper = copy.deepcopy(found.upper).eval()
    begin = time.perf_counter()
    result: dict[str, list[float]] = {"accuracy": [], "last_features": [], "seconds": []}
    statistics: Statistics | None = None
    for n, new in enumerate(_joined(found.training) if variant == JOINT else found.training, 1):
        if variant == JOINT:
            _train(upper, found.last, _batches([new], [new.fixed]), found.budget.joint, int(new.rows.max()) + 1)
        elif statistics is not None and variant != FROZEN:
            statistics = _adapt(upper, new, statistics, variant, found)
        own = Statistics.of(new.features(upper), new.rows)
        statistics = own if statistics is None else statistics.with_new(own)
        result["seconds"].append(time.perf_counter() - begin)
        tests = found.tests if variant == JOINT else found.tests[:n]
        result["accuracy"].append(statistics.accuracy(tests, upper))
        result["last_features"].append(statistics.accuracy(tests, upper, found.last))
        say(f"{variant}, task {n}: {result['accuracy'][-1]:.1%}, {result['seconds'][-1]:.0f} s")
        begin = time.perf_counter()
    return result


def _joined(tasks: Sequence[Maps]) -> list[Maps]:
    """All tasks as one."""
    return [Maps(*(torch.cat([getattr(task, name) for task in tasks]) for name in ("maps", "fixed", "rows")))]


def _adapt(upper: Upper, new: Maps, statistics: Statistics, variant: str, found: Case) -> Statistics:
    """Trains the upper blocks on a task; returns the old classes' statistics in their new features."""
    before, known = copy.deepcopy(upper), len(statistics.means)
    moments = Moments.of(statistics, _features(before, new.maps[:1]).shape[1], found.last)
    parts = [new]
    if variant != NONE:
        generator = Generator(known, new.maps)
        _train_generator(generator, before, statistics, moments, variant, found.budget.generator)
        parts.append(_pool(generator, known))
    targets = [_features(before, part.maps) for part in parts]
    _train(upper, found.last, _batches(parts, targets), found.budget.steps, int(new.rows.max()) + 1, known, moments.scale)
    drift = DriftSums(len(moments.scale), torch.float64, torch.device("cpu"))
    for part, target in zip(parts, targets, strict=True):
        drift.add(target, _features(upper, part.maps))
    return statistics.moved(drift.solve())


@dataclass(frozen=True)
class Moments:
    """Of the U features that move.

    Many of the last features are hardly ever active, and those of learnt classes hardly vary within a class. Relative to that
    variance alone, they would outweigh all others.

    Attributes
    ----------
    means
        Of each class, (C, U).
    floor
        What is added to variances before they are compared or divided by, (U,).
    scale
        The variance within classes with the floor added, (U,).
    """

    means: Tensor
    floor: Tensor
    scale: Tensor

    @classmethod
    def of(cls, statistics: Statistics, features: int, last: int) -> Moments:
        means, within = statistics.means[:, :features], statistics.covariance.diagonal()[:features]
        floor = SHRINKAGE.amount * replace(SHRINKAGE, own=last).target((within + means.var(0)).diag())
        return cls(means.float(), floor.float(), within.float() + floor.float())


def _train_generator(
    generator: Generator, before: Upper, statistics: Statistics, moments: Moments, variant: str, steps: int
) -> None:
    """Trains it to make maps that the old classifier takes for the class, and that match what is known of it."""
    classes = len(moments.means)
    weight, bias = (each.float() for each in statistics.head(len(moments.floor)))
    layers = objective.BatchStatistics(before)
    optimizer = torch.optim.Adam(generator.parameters(), GENERATOR_LEARNING_RATE)
    for _ in range(steps):
        chosen = torch.randperm(classes)[:CLASSES_PER_BATCH]
        labels = chosen.repeat_interleave(GENERATOR_BATCH // len(chosen))
        with layers.recording() as recorded:
            features = before(generator(labels))
        loss = F.cross_entropy(features @ weight.T + bias, labels)
        if variant == GUIDED:
            each = features.view(len(chosen), -1, features.shape[1])  # (classes, images, U)
            loss = loss + 5 * ((each.mean(1) - moments.means[chosen]).square() / moments.scale).mean()
            loss = loss + ((each.var(1).mean(0) + moments.floor) / moments.scale).log().square().mean()
        else:
            loss = loss + 10 * objective.statistics_alignment(recorded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _pool(generator: Generator, classes: int) -> Maps:
    """Generated maps of random old classes, of which the steps of a task draw."""
    rows = torch.randint(classes, (POOL,))
    return Maps(torch.cat([generator(some) for some in rows.split(GENERATOR_BATCH)]), torch.zeros(POOL, 0), rows)


def _batches(parts: Sequence[Maps], targets: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Maps, rows and target features without end: `BATCH` random ones of each part."""
    while True:
        drawn = [torch.randint(len(part.rows), (BATCH,)) for part in parts]
        chosen = [(part.maps[i], part.rows[i], target[i]) for part, target, i in zip(parts, targets, drawn, strict=True)]
        maps, rows, found = zip(*chosen, strict=True)
        yield torch.cat(maps), torch.cat(rows), torch.cat(found)


def _train(
    upper: Upper,
    last: int,
    batches: Iterator[tuple[Tensor, Tensor, Tensor]],
    steps: int,
    classes: int,
    old: int = 0,
    variance: Tensor | None = None,
) -> None:
    """Trains the upper blocks with a linear head over the `last` features, which is dropped.

    As in ABD, the `classes - old` new ones compete among themselves, and the head learns all classes from features without a
    gradient. With a `variance` (U,), all features are distilled, relative to it.
    """
    head = nn.Linear(last, classes)
    nn.init.zeros_(head.weight)
    upper.requires_grad_(True)
    optimizer = torch.optim.SGD([*upper.parameters(), *head.parameters()], LEARNING_RATE, momentum=0.9, weight_decay=2e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        maps, rows, target = next(batches)
        features = upper(maps)
        own, new = features[:, :last], rows >= old
        loss = F.cross_entropy(head(own[new])[:, old:], rows[new] - old) + F.cross_entropy(head(own.detach()), rows)
        if variance is not None:
            loss = loss + ((features - target).square() / variance).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(upper.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    upper.requires_grad_(False)


def run(
    protocol: accuracy.Protocol,
    data: datasets.Data,
    seed: int,
    out: Path,
    say: Callable[[str], None],
    variants: Sequence[str] = tuple(VARIANTS),
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Learns with some variants; those that `out` has already are kept."""
    path = out / f"latent-{protocol.name}-{seed}.json"
    result, missing = machine.continued(path, "variants", variants, protocol=asdict(protocol), seed=seed)
    if missing:
        found = case(protocol, data, seed, budget or BUDGETS[protocol.name])
        for variant in missing:
            result["variants"][variant] = learn(found, variant, seed, lambda line: say(f"{protocol.name} seed {seed}, {line}"))
            files.write(path, result)
    return result


def describe(folder: Path) -> str:
    """Markdown, a row for each variant on each preset; empty if there is no result."""
    runs = list(files.read_all(folder, "latent-*.json").values())
    rows = []
    for preset in dict.fromkeys(run["protocol"]["name"] for run in runs):
        for variant, says in VARIANTS.items():
            found = [run["variants"][variant] for run in runs if run["protocol"]["name"] == preset and variant in run["variants"]]
            if found:
                each = " / ".join(f"{100 * mean(values):.1f}" for values in zip(*(one["accuracy"] for one in found), strict=True))
                final, last = ([one[name][-1] for one in found] for name in ("accuracy", "last_features"))
                minutes = f"{mean(sum(one['seconds']) for one in found) / 60:.1f}"
                figures = [each, tables.over_seeds(final, 100), tables.over_seeds(last, 100), minutes]
                rows.append([preset, f"{variant}: {says}", *figures, str(len(found))])
    steps = "; ".join(f"{name}: {budget.steps} and {budget.generator}" for name, budget in BUDGETS.items())
    note = (
        "The lower blocks and BatchNorm's statistics are frozen: the first 9 of 16 blocks of EfficientNet-Lite0, or the first 6 "
        "of 9 of a resnet20 that the first task trained. Steps a task for the others, and for a generator of feature maps: "
        f"{steps}. LDA with a shrinkage of {SHRINKAGE.amount} from class statistics, which a drift map moves. Minutes are of "
        "training after the first task, and of runs that may have shared their machine. `python -m benchmarks latent` runs it."
    )
    columns = "preset|variant|accuracy after each task, %|after the last, %|the same with the last features alone|minutes|seeds"
    return f"{note}\n\n{tables.table(columns.split('|'), rows)}" if rows else ""
