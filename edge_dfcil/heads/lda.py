"""Linear discriminant analysis with a shrunk covariance, as a linear layer (SLDA, Hayes and Kanan, CVPR workshops 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TINY = 1e-30  # of a variance
SPARE, ITERATIONS = 16, 6  # of subspace iteration: extra directions besides those requested, and passes
FEW = 0.4  # the largest shrinkage of a covariance of few images


@dataclass(frozen=True)
class Shrinkage:
    """How a covariance Sigma of few images is shrunk: S = (1 - s) Sigma + s T.

    Attributes
    ----------
    amount
        s, from 0 to 1.
    own
        0: T is the mean variance of all features times the identity. Else T has the mean variance of the first `own` features for
        these, and that of the other features for the others: groups of features of different scale have the same weight.
    """

    amount: float
    own: int = 0

    def target(self, covariance: Tensor) -> Tensor:
        """The diagonal of T, (F,)."""
        variances = covariance.diagonal()
        groups = [group for group in (variances[: self.own], variances[self.own :]) if len(group)]
        tiny = torch.finfo(covariance.dtype).tiny
        return torch.cat([group.mean().clamp_min(tiny).expand(len(group)) for group in groups])

    def of_more(self, share: float) -> Shrinkage:
        """The shrinkage for a covariance of more images, if this one is right for a `share` of them: Sigma has more weight."""
        if self.amount >= 1:
            return self
        odds = share * self.amount / (1 - self.amount)
        return replace(self, amount=odds / (1 + odds))


def leading(covariance: Tensor, directions: int) -> Tensor:
    """A covariance (F, F) with the same variances, whose correlations come from its leading principal directions only.

    The directions are found by subspace iteration (Halko et al., SIAM Review 2011) from a fixed start, so that the result is the
    same in every run on one machine.
    """
    features = len(covariance)
    if directions >= features:
        return covariance
    scale = covariance.diagonal().clamp_min(TINY).sqrt()
    correlation = covariance / scale / scale[:, None]
    start = torch.randn(features, min(directions + SPARE, features), generator=torch.Generator().manual_seed(0))
    basis = start.to(correlation)
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(correlation @ basis).Q
    values, inside = torch.linalg.eigh(basis.T @ correlation @ basis)
    found = (basis @ inside[:, -directions:]) * values[-directions:].clamp_min(0).sqrt()  # (F, K)
    rest = (1 - found.square().sum(1)).clamp_min(0)
    return (found @ found.T + rest.diag()) * scale * scale[:, None]


def lda_head(means: Tensor, covariance: Tensor, shrinkage: Shrinkage) -> tuple[Tensor, Tensor]:
    """Weight (C, F) and bias (C,) of the linear layer that is LDA with equal priors.

    W = mu S^-1 and b = -1/2 diag(mu S^-1 mu'), with S the shrunk covariance: the logits are the log-posteriors of Gaussian
    classes with a common covariance, up to a constant.

    Parameters
    ----------
    means
        mu, (C, F).
    covariance
        Sigma, the within-class covariance, (F, F).
    shrinkage
        Of the covariance.
    """
    weight = solved(shrunk(covariance, shrinkage), means.T).T  # (C, F)
    return weight, -0.5 * (weight * means).sum(1)


def centred(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A head minus the mean of its rows, which does not change the softmax, but changes a distillation weighted by the head."""
    return weight - weight.mean(0), bias - bias.mean()


def usual_shrinkage(features: int, images: float) -> Shrinkage:
    """The shrinkage if none can be chosen on held-out images: fewer images per feature give the covariance less weight."""
    return Shrinkage(FEW * features / (features + images))


def shrunk(covariance: Tensor, shrinkage: Shrinkage) -> Tensor:
    """S, as defined in `Shrinkage`."""
    found = (1 - shrinkage.amount) * covariance
    found.diagonal().add_(shrinkage.amount * shrinkage.target(covariance))  # in place: these matrices are the largest in memory
    return found


def within(count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Means (C, F) and the covariance within classes (F, F), from the number of images (C,), the
    sums of f (C, F), and the sum of f f' (F, F).

    The mean of a class without images is 0. `second` is overwritten, because these matrices are large.
    """
    means = first / count.clamp_min(1)[:, None]
    second.addmm_((means * count[:, None]).T, means, alpha=-1)
    return means, second.div_((count.sum() - (count > 0).sum()).clamp_min(1))


def mixed(own: Tensor, common: Tensor, share: float) -> Tensor:
    """A share of one covariance and the rest of another, (F, F), each divided by its mean variance first."""
    parts = (covariance / covariance.diagonal().mean().clamp_min(TINY) for covariance in (own, common))
    return share * next(parts) + (1 - share) * next(parts)


def likelihood_ratios(means: Tensor, centre: Tensor, covariance: Tensor, shrinkage: Shrinkage) -> tuple[Tensor, Tensor]:
    """Weight (C, F) and bias (C,) of log-likelihood ratios: each Gaussian class against one at `centre` (F,).

    W = (mu - c) S^-1 and b = -1/2 diag(W (mu + c)'). A row depends on no other class, unlike that of a centred head.
    """
    weight = solved(shrunk(covariance, shrinkage), (means - centre).T).T
    return weight, -0.5 * (weight * (means + centre)).sum(1)


@dataclass(frozen=True)
class Frame:
    """What the rows of a deployed LDA head have in common. With it and the covariance, a row gives the mean of its class.

    Attributes
    ----------
    centre
        The mean of the classes' means, (F,). Rows are centred. The mean row that was subtracted would serve as well, but it is so
        much larger than the centred rows that a rounded covariance shifts it by whole standard deviations.
    scale
        The factor by which the centred rows were multiplied.
    shrinkage
        Of the covariance.
    """

    centre: Tensor
    scale: float
    shrinkage: Shrinkage

    def means(self, weight: Tensor, covariance: Tensor) -> Tensor:
        """The class means (C, F) for these rows (C, F)."""
        return self.centre + (weight / self.scale) @ shrunk(covariance, self.shrinkage)

    def packed(self) -> Tensor:
        """As one tensor, (F + 3,)."""
        numbers = (self.scale, self.shrinkage.amount, float(self.shrinkage.own))
        return torch.cat([self.centre, self.centre.new_tensor(numbers)])

    @classmethod
    def unpacked(cls, values: Tensor, features: int) -> Frame:
        """The inverse of `packed`, for F features; older files do not have `own`."""
        scale, amount, *own = values[features:].tolist()
        return cls(values[:features], scale, Shrinkage(amount, int(own[0]) if own else 0))


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right, by Cholesky, which takes half the time; a rounded or mapped covariance may not be positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.solve(matrix, right) if bool(failed) else torch.cholesky_solve(right, factor)


@dataclass(frozen=True)
class HeldOut:
    """Held-out images as Gaussian classes: the expected error of a head on them can be computed without the images.

    Attributes
    ----------
    rows
        The head's row for each of the classes, (H,).
    means
        Their means, (H, F).
    covariance
        Their within-class covariance, (F, F).
    """

    rows: Tensor
    means: Tensor
    covariance: Tensor

    def leads(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the true class's lead over each other class, (H, C - 1), under a head (C, F) and (C,)."""
        scores = self.means @ weight.T + bias  # (H, C)
        within = weight @ self.covariance @ weight.T  # (C, C)
        mean = scores.gather(1, self.rows[:, None]) - scores
        variance = within.diagonal()[self.rows][:, None] + within.diagonal() - 2 * within[self.rows]
        others = torch.arange(len(weight), device=weight.device) != self.rows[:, None]
        return mean[others].view(len(mean), -1), variance[others].view(len(mean), -1).clamp_min(TINY)

    def errors(self, weight: Tensor, bias: Tensor) -> float:
        """How often another class scores above the true one, summed over the other classes: an upper bound of the error."""
        mean, variance = self.leads(weight, bias)
        return float(torch.erfc(mean / (2 * variance).sqrt()).sum(1).mean()) / 2

    def sureness(self, weight: Tensor, bias: Tensor) -> float:
        """The factor for the logits that calibrates the probabilities.

        If a lead is normal, with mean m and variance v, the odds of the true class are exp(2 m x / v) at a lead of x. This
        is the mean of 2 m / v over the classes, each against the nearest other class. It is 1 for an LDA head made from enough
        images.
        """
        mean, variance = self.leads(weight, bias)
        nearest = (mean / variance.sqrt()).argmin(1, keepdim=True)
        return float((2 * mean / variance).gather(1, nearest).mean())
