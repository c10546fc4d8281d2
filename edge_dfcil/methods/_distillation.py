"""Knowledge distillation, shared by the baselines."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 2.0  # Li & Hoiem, "Learning without Forgetting", TPAMI 2017, and ABD's baselines


def distil(logits: Tensor, teacher_logits: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cross-entropy of softened predictions, times T squared (Hinton et al., 2015).

    `teacher_logits` (N, K) may have fewer columns than `logits` (N, C): the missing classes get probability 0.
    """
    target = F.pad((teacher_logits / temperature).softmax(1), (0, logits.shape[1] - teacher_logits.shape[1]))
    return -(target * (logits / temperature).log_softmax(1)).sum(1).mean() * temperature**2
