"""Linear discriminant analysis with a shrunk covariance, as a linear layer (SLDA, Hayes and Kanan, CVPR workshops 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TINY = 1e-30  # of a variance
SPARE, ITERATIONS = 16, 6  # of subspace iteration: directions beside those that are wanted, and passes
FEW = 0.4  # the most shrinkage that a covariance of few images gets


@dataclass(frozen=True)
class Shrinkage:
    """How a covariance Sigma of few images is shrunk: S = (1 - s) Sigma + s T.

    Attributes
    ----------
    amount
        s, from 0 to 1.
    own
        T is the mean variance of all features times the identity where this is 0. Else the first `own` features have their mean
        variance in T, and the features behind them have theirs: groups of features of different size have the same weight.
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
        """That of a covariance of so many images that `share` of them needed this one: Sigma counts for more."""
        if self.amount >= 1:
            return self
        odds = share * self.amount / (1 - self.amount)
        return replace(self, amount=odds / (1 + odds))


def leading(covariance: Tensor, directions: int) -> Tensor:
    """A covariance (F, F) with the same variances, whose correlations are those of its leading principal directions alone.

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
    """A head without what its rows have in common: softmax does not see it, a distillation weighted by the head does."""
    return weight - weight.mean(0), bias - bias.mean()


def usual_shrinkage(features: int, images: float) -> Shrinkage:
    """Where none can be chosen on held-out images: the fewer images for each feature, the less of a covariance counts."""
    return Shrinkage(FEW * features / (features + images))


def shrunk(covariance: Tensor, shrinkage: Shrinkage) -> Tensor:
    """S, as `Shrinkage` has it."""
    found = (1 - shrinkage.amount) * covariance
    found.diagonal().add_(shrinkage.amount * shrinkage.target(covariance))  # in place: these matrices are the most that is held
    return found


def within(count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Means (C, F) and the covariance within classes (F, F), from sums: images (C,), of f (C, F), and of f f' (F, F).

    The mean of a class without images is 0. `second` is overwritten, for these matrices are large.
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
    """What the rows of a served LDA head have in common; with the covariance, a row says where its class lies.

    Attributes
    ----------
    centre
        The mean of the classes' means, (F,). Rows are centred; what was taken off them says the same, but is so much larger
        than they are that a rounded covariance moves it by whole deviations.
    scale
        What rows were multiplied by after that.
    shrinkage
        Of the covariance.
    """

    centre: Tensor
    scale: float
    shrinkage: Shrinkage

    def means(self, weight: Tensor, covariance: Tensor) -> Tensor:
        """The means (C, F) of the classes with these rows (C, F)."""
        return self.centre + (weight / self.scale) @ shrunk(covariance, self.shrinkage)

    def packed(self) -> Tensor:
        """As one tensor, (F + 3,)."""
        numbers = (self.scale, self.shrinkage.amount, float(self.shrinkage.own))
        return torch.cat([self.centre, self.centre.new_tensor(numbers)])

    @classmethod
    def unpacked(cls, values: Tensor, features: int) -> Frame:
        """The inverse, with F; older files have no number of own features."""
        scale, amount, *own = values[features:].tolist()
        return cls(values[:features], scale, Shrinkage(amount, int(own[0]) if own else 0))


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """By Cholesky, which takes half the time; a covariance that has been rounded or moved may be too flat for it."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.solve(matrix, right) if bool(failed) else torch.cholesky_solve(right, factor)


@dataclass(frozen=True)
class HeldOut:
    """Images that a head was not made from, as Gaussian classes: how it does on them follows without the images.

    Attributes
    ----------
    rows
        The head's row for each of the classes, (H,).
    means
        Their means, (H, F).
    covariance
        Within them, (F, F).
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
        """How often another class is ahead of the true one, all other classes added up: an upper bound of the error."""
        mean, variance = self.leads(weight, bias)
        return float(torch.erfc(mean / (2 * variance).sqrt()).sum(1).mean()) / 2

    def sureness(self, weight: Tensor, bias: Tensor) -> float:
        """What logits are to be multiplied by so that probabilities are as they should be.

        Where a lead is normal, with mean m and variance v, the odds of the true class are exp(2 m x / v) at a lead of x. This
        is the mean of 2 m / v over the classes, each against its nearest rival. An LDA head of as many images as it needs
        has 1.
        """
        mean, variance = self.leads(weight, bias)
        nearest = (mean / variance.sqrt()).argmin(1, keepdim=True)
        return float((2 * mean / variance).gather(1, nearest).mean())
