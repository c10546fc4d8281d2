"""Leave-one-out logits of an LDA head for the images that it was made from: exact, without a second head."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_dfcil.heads.lda import Shrinkage, shrunk, solved


def leave_one_out(
    means: Tensor,
    count: Tensor,
    covariance: Tensor,
    images: float,
    shrinkage: Shrinkage,
    rows: Tensor,
    views: Tensor,
    asked: Tensor,
) -> Tensor:
    """Logits (N, C) of images under the heads that `lda_head` would have made without each of them.

    Without an image, the within-class scatter is smaller by v v' + e e', where v is the mean deviation of the image's views
    from its class mean, times sqrt(n / (n - 1)), and e is half of their difference; the mean shifts along v. The inverse
    follows from the Woodbury formula, so one factorisation is enough for all images. The shrinkage target is not updated.

    Parameters
    ----------
    means, covariance, shrinkage
        As for `lda_head`, (C, F) and (F, F).
    count
        The images behind each mean, (C,).
    images
        The images behind the covariance.
    rows
        The class of each image, (N,); its count is above 1.
    views
        The features that were added for an image, (N, V, F): V is 1, or 2 for an image and its mirror image, a half each.
    asked
        The features to answer, (N, F).
    """
    n = count[rows]  # (N,)
    share = (n / (n - 1) * (1 - shrinkage.amount) / images).sqrt()
    mean = views.mean(1) - means[rows]
    rest = (views[:, 0] - views[:, -1]) / 2 * ((1 - shrinkage.amount) / images) ** 0.5
    less = torch.stack([mean * share[:, None], rest], 1)  # (N, 2, F): the covariance is smaller by the sum of its squares

    inverse = solved(shrunk(covariance, shrinkage), torch.cat([less.flatten(0, 1), means]).T)  # (F, 2 N + C)
    of_less, of_means = inverse[:, : 2 * len(n)].T.view_as(less), inverse[:, 2 * len(n) :]
    within = less @ of_less.mT  # (N, 2, 2)
    grown = torch.linalg.inv(torch.eye(2, dtype=within.dtype, device=within.device) - within)
    to_means, to_asked = less @ of_means, (of_less @ asked[:, :, None]).squeeze(2)  # (N, 2, C), (N, 2)

    cross = asked @ of_means + torch.einsum("na,nab,nbc->nc", to_asked, grown, to_means)
    square = (means * of_means.T).sum(1) + torch.einsum("nac,nab,nbc->nc", to_means, grown, to_means)
    # The mean of the image's own class moves by `step` times the first of `less`.
    step, first, at = 1 / ((n - 1) * share), grown[:, :, 0], torch.arange(len(n), device=n.device)
    own = (to_means[at, :, rows] * first).sum(1)
    cross[at, rows] -= step * (to_asked * first).sum(1)
    square[at, rows] += step**2 * (within[:, 0] * first).sum(1) - 2 * step * own
    return cross - square / 2
