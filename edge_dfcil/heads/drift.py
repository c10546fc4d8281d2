"""Drift compensation: class statistics of an old backbone, mapped to the feature space of a new one.

A linear map from old to new features is fitted on images that both backbones see, and statistics are mapped by it (LDC,
Gomez-Villa et al., ECCV 2024; DPCR, He et al., 2025). Here it is a ridge regression that shrinks to the identity.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.1  # weight of the identity, as a share of the features' mean variance


@dataclass(frozen=True)
class DriftMap:
    """f -> f M + b, for rows of features.

    Attributes
    ----------
    matrix
        M, (F, F).
    offset
        b, (F,).
    residual
        R, the covariance of the map's residuals, (F, F).
    """

    matrix: Tensor
    offset: Tensor
    residual: Tensor

    def means(self, means: Tensor) -> Tensor:
        """Class means (C, F), mapped."""
        return means @ self.matrix + self.offset

    def covariance(self, covariance: Tensor) -> Tensor:
        """A covariance (F, F), mapped: M' S M + R. A new backbone separates images that the old one did not; without R the
        mapped classes would look narrower than they are."""
        return (self.matrix.T @ covariance @ self.matrix).add_(self.residual)


class DriftSums:
    """The sums from which a drift map is computed: pairs of old and new features are added batch by batch, and none is kept."""

    def __init__(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        self._within = torch.zeros(features, features, dtype=dtype, device=device)  # sum of x x'
        self._across = torch.zeros(features, features, dtype=dtype, device=device)  # sum of x y'
        self._beyond = torch.zeros(features, features, dtype=dtype, device=device)  # sum of y y'
        self._before = torch.zeros(features, dtype=dtype, device=device)
        self._after = torch.zeros(features, dtype=dtype, device=device)
        self._count = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Features (B, F) of the same images, by the old backbone and by the new one."""
        before, after = before.to(self._within.dtype), after.to(self._within.dtype)
        self._within += before.T @ before
        self._across += before.T @ after
        self._beyond += after.T @ after
        self._before += before.sum(0)
        self._after += after.sum(0)
        self._count += len(before)

    def __add__(self, other: DriftSums) -> DriftSums:
        """The sums over the pairs of both."""
        joined = copy.copy(self)
        for name, value in vars(other).items():
            setattr(joined, name, getattr(self, name) + value)
        return joined

    def solve(self, ridge: float = RIDGE) -> DriftMap:
        """argmin over M and b of sum |x M + b - y|^2 + r |M - I|^2, where r is `ridge` times the mean of sum (x - mean)^2.

        The identity if no pair was added. On the CPU, in float64.
        """
        sums = (self._within, self._across, self._beyond, self._before, self._after)
        within, across, beyond, before, after = (each.cpu().double() for each in sums)
        identity = torch.eye(len(before), dtype=within.dtype)
        if not self._count:
            return DriftMap(identity, torch.zeros_like(before), torch.zeros_like(within))
        x, y = before / self._count, after / self._count
        within = within / self._count - torch.outer(x, x)  # covariances from here
        across = across / self._count - torch.outer(x, y)
        beyond = beyond / self._count - torch.outer(y, y)
        r = (ridge * within.diagonal().mean()).clamp_min(torch.finfo(within.dtype).tiny)
        matrix = identity + torch.linalg.solve(within + r * identity, across - within)
        common = matrix.T @ across
        residual = beyond - common - common.T + matrix.T @ within @ matrix
        return DriftMap(matrix, y - x @ matrix, residual)
