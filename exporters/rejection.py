"""Whether an image belongs to a known class: the same rule for the model and for exported files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FLOOR = 1e-37  # of a probability: near the smallest normal number of float32


def scores(probabilities: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """How far the largest logit of each image is above the mean of its logits over classes, (N,), from probabilities (N, C).

    A constant that is added to all logits changes neither their softmax nor this difference. It separates unseen classes better
    than the probability itself, which is near 1 for most images (docs/research-log.md).
    """
    logits = np.log(np.maximum(probabilities.astype(np.float64), FLOOR))
    found: npt.NDArray[np.float64] = logits.max(1, initial=-np.inf) - logits.mean(1) if len(logits) else np.zeros(0)
    return found


def margins(probabilities: npt.NDArray[np.floating], thresholds: Sequence[float]) -> npt.NDArray[np.float64]:
    """By how much the score of each image is above the threshold of its predicted class, (N,). Below 0, the image belongs to no
    known class."""
    if not len(probabilities):
        return np.zeros(0)
    found: npt.NDArray[np.float64] = scores(probabilities) - np.asarray(thresholds)[probabilities.argmax(1)]
    return found
