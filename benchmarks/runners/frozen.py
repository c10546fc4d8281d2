"""Simple heads on a frozen backbone: the baselines that a method has to beat.

The backbone is trained in the first task, or is pretrained, and is not trained afterwards. Each head keeps statistics of the
backbone's last features and learns a task in one pass. Hyperparameters are chosen as in the papers.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import accuracy, files, machine
from benchmarks.datasets import Data, class_order
from edge_dfcil import Learner
from edge_dfcil.heads.lda import Shrinkage, lda_head
from edge_dfcil.recipe import dotted, find_recipe


class Head(ABC):
    """A classifier of features (N, F), non-negative, of classes that are added task by task."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Features (N, F) and outputs (N,) of the classes of a task, float64."""

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """(N, C); the largest is the answer."""

    @property
    def nbytes(self) -> int:
        """What it keeps, as 4-byte numbers."""
        return 4 * sum(value.numel() for value in vars(self).values() if isinstance(value, Tensor))


class LDA(Head):
    """Class means and one covariance, shrunk by 0.1 (SLDA, Hayes and Kanan, CVPR workshops 2020)."""

    SHRINKAGE = Shrinkage(0.1)
    count = 0
    means: Tensor
    scatter: Tensor

    def learn(self, features: Tensor, targets: Tensor) -> None:
        classes, places = targets.unique(return_inverse=True)
        means = torch.stack([features[targets == c].mean(0) for c in classes])
        scatter = (features - means[places]).T @ (features - means[places])
        self.means = torch.cat([self.means, means]) if self.count else means
        self.scatter = self.scatter + scatter if self.count else scatter
        self.count += len(features)

    def scores(self, features: Tensor) -> Tensor:
        weight, bias = lda_head(self.means, self.scatter / self.count, self.SHRINKAGE)
        return features @ weight.T + bias


class Ridge(Head):
    """Ridge regression on random features max(0, f P), P ~ N(0, 1); the penalty is the best for a fifth of the last task's images
    (RanPAC, McDonnell et al., NeurIPS 2023)."""

    WIDTH = 2048
    PENALTIES = tuple(10.0**power for power in range(-4, 9))
    gram: Tensor | None = None

    def learn(self, features: Tensor, targets: Tensor) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        self.projection = torch.randn(features.shape[1], self.WIDTH, generator=draw, dtype=features.dtype)
        hidden, truth = self._hidden(features), F.one_hot(targets).to(features.dtype)
        if self.gram is None:
            self.gram, self.sums = torch.zeros(self.WIDTH, self.WIDTH, dtype=hidden.dtype), hidden.new_zeros(self.WIDTH, 0)
        self.sums = F.pad(self.sums, (0, truth.shape[1] - self.sums.shape[1]))
        held = torch.rand(len(hidden), generator=draw) < 0.2
        held[0] |= not bool(held.any())  # with ten images, none is drawn in one of nine tasks
        gram = self.gram + hidden[~held].T @ hidden[~held]
        sums = self.sums + hidden[~held].T @ truth[~held]
        errors = {
            penalty: float((hidden[held] @ self._solved(gram, sums, penalty) - truth[held]).square().mean())
            for penalty in self.PENALTIES
        }
        self.gram, self.sums = self.gram + hidden.T @ hidden, self.sums + hidden.T @ truth
        self.weight = self._solved(self.gram, self.sums, min(errors, key=lambda penalty: errors[penalty]))

    def scores(self, features: Tensor) -> Tensor:
        return self._hidden(features) @ self.weight

    def _hidden(self, features: Tensor) -> Tensor:
        return torch.relu(features @ self.projection)

    @staticmethod
    def _solved(gram: Tensor, sums: Tensor, penalty: float) -> Tensor:
        return torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), sums)


class FeCAM(Head):
    """Mahalanobis distances with a covariance for each class, which is that of the square roots of features, shrunk twice and
    normalised to correlations; distances are between unit vectors (Goswami et al., NeurIPS 2023)."""

    means: Tensor | None = None
    inverses: Tensor | None = None

    def learn(self, features: Tensor, targets: Tensor) -> None:
        for output in targets.unique():
            own = features[targets == output].clamp_min(0).sqrt()
            covariance = own.T.cov()
            for _ in range(2):
                covariance = _shrunk(covariance)
            deviations = covariance.diagonal().sqrt()
            inverse = torch.linalg.inv(covariance / torch.outer(deviations, deviations)).float()
            mean = F.normalize(own.mean(0), dim=0)
            self.means = mean[None] if self.means is None else torch.cat([self.means, mean[None]])
            self.inverses = inverse[None] if self.inverses is None else torch.cat([self.inverses, inverse[None]])

    def scores(self, features: Tensor) -> Tensor:
        assert self.means is not None and self.inverses is not None
        unit = F.normalize(features.clamp_min(0).sqrt())
        distances = []
        for mean, inverse in zip(self.means, self.inverses, strict=True):
            away = unit - mean
            distances.append(((away @ inverse.to(away)) * away).sum(1))
        return -torch.stack(distances, 1)


def _shrunk(covariance: Tensor) -> Tensor:
    """The covariance with its mean variance added to the variances, and its mean covariance to the other entries."""
    n, diagonal = len(covariance), covariance.diagonal()
    others = (covariance.sum() - diagonal.sum()) / max(1, n * (n - 1))
    identity = torch.eye(n, dtype=covariance.dtype)
    return covariance + diagonal.mean() * identity + others * (1 - identity)


HEADS: dict[str, type[Head]] = {"frozen_lda": LDA, "ridge": Ridge, "fecam": FeCAM}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "rotations": {"augmentation.rotations": True}}  # of the first task


def names() -> list[str]:
    """The methods that `run` runs: each head, on a backbone that is trained in each variant."""
    return [f"{head}:{variant}" if variant else head for head in HEADS for variant in VARIANTS]


def run(
    protocol: accuracy.Protocol,
    method: str,
    seed: int,
    data: Data,
    out: Path,
    device: str = "auto",
    changes: dict[str, Any] | None = None,
    in_time: Callable[[float], bool] = lambda seconds: True,
) -> dict[str, Any]:
    """As `accuracy.run`, for one of `names()`. All heads are run on the same backbone, and each writes its file.

    A run cannot be stopped between tasks: `in_time` is called only before the first one.
    """
    variant = method.partition(":")[2]
    recipe = find_recipe(protocol.recipe).changed(
        dotted(protocol.changes) | accuracy.FROZEN | VARIANTS[variant] | dotted(changes or {})
    )
    path = accuracy.file_of(protocol, method, seed, out, changes)
    if (found := files.read(path)) is not None:
        return found
    if not in_time(0):
        raise accuracy.Stopped
    learner = accuracy.new_learner(replace(protocol, multiscale=False), "lda", seed, recipe, device)
    heads = {f"{name}:{variant}" if variant else name: kind(seed) for name, kind in HEADS.items()}
    results = {name: accuracy.begun(protocol, name, seed, recipe, learner, data) for name in heads}
    order = class_order(len(data.names), seed)[: protocol.classes]
    size = protocol.classes // protocol.tasks
    for task in range(protocol.tasks):
        new, seen = order[task * size : (task + 1) * size], order[: (task + 1) * size]
        train = accuracy.training(protocol, data, new, seed)
        machine.reset_peak(learner.device)
        begin = time.perf_counter()
        if task == 0:
            learner.learn_task(train, data.names)
        images, targets = _features(learner, train, seen)
        shared = time.perf_counter() - begin
        tested, truth = _features(learner, data.part("test", seen, 500), seen)
        for name, head in heads.items():
            begin = time.perf_counter()
            head.learn(images, targets)
            seconds = shared + time.perf_counter() - begin
            right = (head.scores(tested).argmax(1) == truth).double()
            per_task = [float(right[truth // size == number].mean()) for number in range(task + 1)]
            accuracy.record(results[name], float(right.mean()), per_task, seconds, learner, out)
            results[name]["bytes_kept"] = head.nbytes + _weights(learner)
    for name, result in results.items():
        files.write(accuracy.file_of(protocol, name, seed, out, changes), result)
    return results[method]


@torch.no_grad()
def _features(learner: Learner, loader: Any, order: list[int]) -> tuple[Tensor, Tensor]:
    """Features (N, F) of all images of a loader, float64, and their places in the order of classes (N,)."""
    place = {number: index for index, number in enumerate(order)}
    found = [(learner.embed(images), torch.as_tensor(targets)) for images, targets in loader]
    targets = torch.cat([targets for _, targets in found])
    return torch.cat([features for features, _ in found]).cpu().double(), torch.tensor([place[int(t)] for t in targets])


def _weights(learner: Learner) -> int:
    return sum(tensor.nbytes for tensor in learner.network.backbone.state_dict().values())
