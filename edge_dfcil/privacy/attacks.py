"""Membership inference: how well a model's answers reveal whether an image was used in training.

An attack gives each image a score, higher for images that it takes for members. The metrics are those of "Membership inference
attacks from first principles" (Carlini et al., S&P 2022): the area under the ROC curve, and the share of members found at a low
false-positive rate. Pure functions of scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-12


def auc(members: Tensor, others: Tensor) -> float:
    """The probability that a member (N,) has a higher score than another image (M,), ties counting half: 0.5 is chance."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, members, right=False).double()
    up_to = torch.searchsorted(ordered, members, right=True).double()
    return float(((below + up_to) / 2).mean() / len(others))


def auc_error(value: float, members: int, others: int) -> float:
    """Standard error of an area under the curve, by the numbers of scores (Hanley and McNeil, Radiology 1982)."""
    one, two = value / (2 - value), 2 * value**2 / (1 + value)
    spread = value * (1 - value) + (members - 1) * (one - value**2) + (others - 1) * (two - value**2)
    return math.sqrt(max(spread, 0.0) / (members * others))


def found_at(members: Tensor, others: Tensor, share: float) -> float | None:
    """True-positive rate at the false-positive rate `share`; None if `share` is less than one of the other images."""
    allowed = int(share * len(others))
    if allowed < 1:
        return None
    threshold = others.sort(descending=True).values[allowed]
    return float((members > threshold).double().mean())


def confidence(probabilities: Tensor, targets: Tensor) -> Tensor:
    """log(p / (1 - p)) of the true class (N,), which is nearly normal; probabilities (N, C), targets (N,)."""
    p = probabilities.double().gather(1, targets[:, None]).squeeze(1)
    return p.clamp_min(TINY).log() - (1 - p).clamp_min(TINY).log()


def likelihood_ratio(members: Tensor, member_classes: Tensor, others: Tensor, other_classes: Tensor) -> tuple[Tensor, Tensor]:
    """log N(x; member) - log N(x; other) of each image, (N,) and (M,), for signals (N, K) and (M, K).

    The two normal distributions are fitted on every second image of both kinds and applied to the rest, and vice versa: this
    models an attacker who knows half of the images of both kinds. Signals are taken relative to the mean of their class in
    the known half.
    """
    found = (torch.zeros(len(members), dtype=torch.float64), torch.zeros(len(others), dtype=torch.float64))
    for half in range(2):
        centre = _ClassMeans(
            torch.cat([members[half::2], others[half::2]]), torch.cat([member_classes[half::2], other_classes[half::2]])
        )
        inside = _Normal(members[half::2] - centre(member_classes[half::2]))
        outside = _Normal(others[half::2] - centre(other_classes[half::2]))
        for scores, signals, classes in zip(found, (members, others), (member_classes, other_classes), strict=True):
            rest = signals[1 - half :: 2] - centre(classes[1 - half :: 2])
            scores[1 - half :: 2] = inside.log_likelihood(rest) - outside.log_likelihood(rest)
    return found


class _Normal:
    """A multivariate normal distribution with the mean and the covariance of signals (N, K)."""

    def __init__(self, signals: Tensor) -> None:
        self._mean = signals.mean(0)
        centred = signals - self._mean
        covariance = centred.T @ centred / max(len(signals) - 1, 1)
        floor = TINY + 1e-6 * float(covariance.diagonal().mean())
        self._factor = torch.linalg.cholesky(covariance + floor * torch.eye(len(covariance), dtype=covariance.dtype))

    def log_likelihood(self, signals: Tensor) -> Tensor:
        """Log-likelihood up to a constant, (N,)."""
        whitened = torch.linalg.solve_triangular(self._factor, (signals - self._mean).T, upper=False)
        return -whitened.square().sum(0) / 2 - self._factor.diagonal().log().sum()


class _ClassMeans:
    """The mean signal of each class; for a class without signals, the mean of all."""

    def __init__(self, signals: Tensor, classes: Tensor) -> None:
        number = int(classes.max()) + 1
        count = torch.bincount(classes, minlength=number).double()[:, None]
        sums = torch.zeros(number, signals.shape[1], dtype=signals.dtype).index_add_(0, classes, signals)
        self._all = signals.mean(0)
        self._means = torch.where(count > 0, sums / count.clamp_min(1), self._all)

    def __call__(self, classes: Tensor) -> Tensor:
        known = classes < len(self._means)
        return torch.where(known[:, None], self._means[classes.clamp(max=len(self._means) - 1)], self._all)
