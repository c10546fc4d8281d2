"""Linear discriminant analysis with a shrunk covariance, as a linear layer (SLDA, Hayes and Kanan, CVPR workshops 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity


def lda_head(means: Tensor, covariance: Tensor, shrinkage: float = SHRINKAGE) -> tuple[Tensor, Tensor]:
    """Weight (C, F) and bias (C,) of the linear layer that is LDA with equal priors.

    W = mu S^-1 and b = -1/2 diag(mu S^-1 mu'), with S = (1 - s) Sigma + s tr(Sigma)/F I: the logits are the log-posteriors
    of Gaussian classes with a common covariance, up to a constant.

    Parameters
    ----------
    means
        mu, (C, F).
    covariance
        Sigma, the within-class covariance, (F, F).
    shrinkage
        s, from 0 to 1.
    """
    features = covariance.shape[0]
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(covariance.dtype).tiny)
    identity = torch.eye(features, dtype=covariance.dtype, device=covariance.device)
    shrunk = (1 - shrinkage) * covariance + shrinkage * scale * identity
    weight = torch.linalg.solve(shrunk, means.T).T  # (C, F)
    return weight, -0.5 * (weight * means).sum(1)
