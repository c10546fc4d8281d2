"""Calibration: how sure a model's probabilities are, and which images belong to no class that it knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_dfcil.errors import DataError, SettingError
from edge_dfcil.model.network import Network
from edge_dfcil.model.statistics import Statistic
from exporters.rejection import FLOOR, scores

COLDEST = 1e-6  # the lowest temperature: logits that are divided by less may leave the range of float32
LARGEST = 1e30  # no number here is near it
MIN_IMAGES = 10  # that a calibration is found on
# Weight of (log T)^2. A head's own scale is an estimate already; where all images are answered right, the score alone would make
# probabilities of 1.
PRIOR = 0.01
TEMPERATURES = [0.05 * 1.03**step for step in range(204)]  # to 20: the score may have more than one minimum


@dataclass(frozen=True)
class Calibration:
    """What is found on a task's images, answered by a head that was made without them.

    Attributes
    ----------
    temperature
        T: probabilities are softmax(logits / T) (Guo et al., ICML 2017).
    thresholds
        For each output, the score (`exporters.rejection.scores`) below which an image is rejected; empty: none is known.
    images
        The images behind these numbers.
    false_rejections
        The share of those images that the thresholds reject, in [0, 1).

    Raises `SettingError` for numbers that cannot be.
    """

    temperature: float
    thresholds: tuple[float, ...] = ()
    images: int = 0
    false_rejections: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.temperature, *self.thresholds, self.images, self.false_rejections)
        plain = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
        if not plain or not all(abs(number) <= LARGEST for number in numbers) or self.temperature <= 0 or self.images < 0:
            raise SettingError(
                f"{self}: a calibration has finite numbers, a temperature above 0, and no negative count of images"
            )
        if not COLDEST <= self.temperature <= 1 / COLDEST:
            raise SettingError(
                f"temperature={self.temperature}; logits are divided by it, and it is {COLDEST} to {1 / COLDEST:g}"
            )
        if not 0 <= self.false_rejections < 1:
            raise SettingError(f"false_rejections={self.false_rejections}; it is a share of images, from 0 to below 1")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "thresholds": list(self.thresholds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, outputs: int) -> Calibration | None:
        """The inverse of `to_dict`, for a model with so many outputs; None for None, as in older files.

        Raises `SettingError` for numbers that cannot be, and `TypeError` for other names.
        """
        if values is None:
            return None
        found = cls(**{**values, "thresholds": tuple(values["thresholds"])})
        if found.thresholds and len(found.thresholds) != outputs:
            raise SettingError(f"there are {len(found.thresholds)} thresholds for {outputs} outputs; each output has one")
        return found

    def of_classes(self, groups: Tensor | None) -> tuple[float, ...]:
        """The threshold of each class: the lowest of its outputs. `groups` as `Model.groups` has it."""
        if groups is None or not self.thresholds:
            return self.thresholds
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        return tuple(float(thresholds[groups[:, column] > 0].min()) for column in range(groups.shape[1]))

    def moved(self, before: Tensor | None, after: Tensor | None, keep: Sequence[int] | None = None) -> Calibration:
        """The same for outputs `keep` (None: all) of which other classes are competitors.

        `before` and `after` are the `expected_scores` (O,), on which the thresholds move along. Without them there are no
        thresholds any more; the temperature stays.
        """
        if before is None or after is None or not self.thresholds:
            return replace(self, thresholds=())
        kept = range(len(self.thresholds)) if keep is None else keep
        shift = after - before[list(kept)]
        shift = torch.where(shift.isnan(), shift.nanmean(), shift)  # of classes of which no mean is kept
        if bool(shift.isnan().any()):
            return replace(self, thresholds=())
        found = (self.thresholds[output] + step for output, step in zip(kept, shift.tolist(), strict=True))
        return replace(self, thresholds=tuple(max(value, 0.0) for value in found))


@torch.no_grad()
def expected_scores(
    network: Network, statistics: Mapping[str, Statistic], temperature: float, groups: Tensor | None
) -> Tensor | None:
    """The score of an image at the mean of each output's class, (O,), not a number where that mean is not kept; None where
    there are no means."""
    kept, head = statistics.get("mean"), network.head
    if kept is None or kept.role != "class_mean" or kept.values.shape[1] != head.in_features:
        return None
    weight, bias = head.weight.cpu().double(), head.bias.cpu().double()
    probabilities = ((kept.values.double() @ weight.T + bias) / temperature).softmax(1)  # (O, O)
    own = torch.arange(len(probabilities))
    if groups is not None:
        probabilities, own = probabilities @ groups.double(), groups.argmax(1)
    logits = probabilities.clamp_min(FLOOR).log()
    found = logits.gather(1, own[:, None]).squeeze(1) - logits.mean(1)
    found[torch.tensor(kept.images) == 0] = torch.nan
    return found


def best_temperature(logits: Tensor, targets: Tensor) -> float:
    """T for which softmax(logits / T) has the best Brier score for targets (N,); logits (N, C).

    The likelihood (Guo et al., ICML 2017) has no bound: one image that is surely wrong, of 150 on sign digits, makes it 2.7
    where 1 is better (docs/research-log.md).
    """
    wanted = F.one_hot(targets, logits.shape[1]).to(logits)

    def loss(temperature: float) -> float:
        return float(((logits / temperature).softmax(1) - wanted).square().sum()) + PRIOR * math.log(temperature) ** 2

    return min(TEMPERATURES, key=loss)


def found_on(probabilities: Tensor, targets: Sequence[int], outputs: int, false_rejections: float) -> Calibration:
    """From answers (N, C) at a temperature of 1 and the right classes, for a model with so many outputs: one threshold for all.

    Raises `DataError` for fewer than `MIN_IMAGES` images, `SettingError` for a share out of range.
    """
    if len(targets) < MIN_IMAGES:
        raise DataError(f"{len(targets)} images are too few to calibrate on; give at least {MIN_IMAGES}")
    if not 0 <= false_rejections < 1:
        raise SettingError(f"false_rejections={false_rejections}; it is a share of images, from 0 to below 1")
    logits = probabilities.double().clamp_min(FLOOR).log()
    temperature = best_temperature(logits, torch.tensor(targets))
    found = torch.from_numpy(scores((logits / temperature).softmax(1).numpy()))
    threshold = float(torch.quantile(found, false_rejections))
    return Calibration(temperature, (threshold,) * outputs, len(targets), float(false_rejections))
