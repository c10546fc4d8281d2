"""The temperature of a classifier's logits (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

# Deviation of log T around 0. A head's own scale is an estimate already; where all images are answered right, the likelihood
# alone would make probabilities of 1.
PRIOR = 1.0
LEAST, MOST, STEPS = 0.05, 20.0, 40  # the interval is 0.618^40 of its width at the end
GOLDEN = (math.sqrt(5) - 1) / 2


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """T that makes softmax(logits / T) the most likely for targets (N,), by golden section over log T; logits (N, C)."""

    def loss(log_t: float) -> float:
        return float(F.cross_entropy(logits / math.exp(log_t), targets, reduction="sum")) + log_t**2 / (2 * PRIOR**2)

    low, high = math.log(LEAST), math.log(MOST)
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2)
