"""Calibration: a temperature for a model's probabilities, and thresholds that reject images of unknown classes."""

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

COLDEST = 1e-6  # the lowest temperature: logits divided by less may exceed the range of float32
LARGEST = 1e30  # valid numbers are far below it
MIN_IMAGES = 10  # needed for a calibration
# Weight of (log T)^2. A head's own scale is already an estimate; if all images are classified correctly, the score alone would
# give probabilities of 1.
PRIOR = 0.01
TEMPERATURES = [0.05 * 1.03**step for step in range(204)]  # up to 20; a grid, because the score may have several minima


@dataclass(frozen=True)
class Calibration:
    """Temperature and thresholds, found on images of a task that the head was made without.

    Attributes
    ----------
    temperature
        T: probabilities are softmax(logits / T) (Guo et al., ICML 2017).
    thresholds
        For each output, the score (`exporters.rejection.scores`) below which an image is rejected; empty: no thresholds.
    images
        The images behind these numbers.
    false_rejections
        The share of those images that the thresholds reject, in [0, 1).

    Raises `SettingError` for invalid numbers.
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
                f"{self}: a calibration must have finite numbers, a temperature above 0, and no negative count of images"
            )
        if not COLDEST <= self.temperature <= 1 / COLDEST:
            raise SettingError(
                f"temperature={self.temperature}; logits are divided by it; it must be from {COLDEST} to {1 / COLDEST:g}"
            )
        if not 0 <= self.false_rejections < 1:
            raise SettingError(f"false_rejections={self.false_rejections}; it must be a share of images, from 0 to below 1")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "thresholds": list(self.thresholds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, outputs: int) -> Calibration | None:
        """The inverse of `to_dict`, for a model with this number of outputs; None for None, as in older files.

        Raises `SettingError` for invalid numbers, and `TypeError` for unknown names.
        """
        if values is None:
            return None
        found = cls(**{**values, "thresholds": tuple(values["thresholds"])})
        if found.thresholds and len(found.thresholds) != outputs:
            raise SettingError(f"there are {len(found.thresholds)} thresholds for {outputs} outputs; each output needs one")
        return found

    def of_classes(self, groups: Tensor | None) -> tuple[float, ...]:
        """The threshold of each class: the lowest one of its outputs. `groups` is as in `Model.groups`."""
        if groups is None or not self.thresholds:
            return self.thresholds
        thresholds = torch.tensor(self.thresholds, dtype=torch.float64)
        return tuple(float(thresholds[groups[:, column] > 0].min()) for column in range(groups.shape[1]))

    def moved(self, before: Tensor | None, after: Tensor | None, keep: Sequence[int] | None = None) -> Calibration:
        """The calibration for the outputs `keep` (None: all) after the competing classes have changed.

        `before` and `after` are the `expected_scores` (O,): the thresholds shift by the difference. Without them the
        thresholds are dropped; the temperature stays.
        """
        if before is None or after is None or not self.thresholds:
            return replace(self, thresholds=())
        kept = range(len(self.thresholds)) if keep is None else keep
        shift = after - before[list(kept)]
        shift = torch.where(shift.isnan(), shift.nanmean(), shift)  # for classes without a stored mean
        if bool(shift.isnan().any()):
            return replace(self, thresholds=())
        found = (self.thresholds[output] + step for output, step in zip(kept, shift.tolist(), strict=True))
        return replace(self, thresholds=tuple(max(value, 0.0) for value in found))


@torch.no_grad()
def expected_scores(
    network: Network, statistics: Mapping[str, Statistic], temperature: float, groups: Tensor | None
) -> Tensor | None:
    """The score at the mean feature of each output's class, (O,); NaN for a class without a stored mean; None if no means are
    stored."""
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

    The likelihood (Guo et al., ICML 2017) is unbounded: one of 150 images of sign digits with a confident wrong answer makes T
    2.7, where 1 is better (docs/research-log.md).
    """
    wanted = F.one_hot(targets, logits.shape[1]).to(logits)

    def loss(temperature: float) -> float:
        return float(((logits / temperature).softmax(1) - wanted).square().sum()) + PRIOR * math.log(temperature) ** 2

    return min(TEMPERATURES, key=loss)


def found_on(probabilities: Tensor, targets: Sequence[int], outputs: int, false_rejections: float) -> Calibration:
    """A calibration from probabilities (N, C) at temperature 1 and true classes, with one threshold for all `outputs`.

    Raises `DataError` for fewer than `MIN_IMAGES` images, `SettingError` for a share out of range.
    """
    if len(targets) < MIN_IMAGES:
        raise DataError(f"{len(targets)} images are too few to calibrate on; give at least {MIN_IMAGES}")
    if not 0 <= false_rejections < 1:
        raise SettingError(f"false_rejections={false_rejections}; it must be a share of images, from 0 to below 1")
    logits = probabilities.double().clamp_min(FLOOR).log()
    temperature = best_temperature(logits, torch.tensor(targets))
    found = torch.from_numpy(scores((logits / temperature).softmax(1).numpy()))
    threshold = float(torch.quantile(found, false_rejections))
    return Calibration(temperature, (threshold,) * outputs, len(targets), float(false_rejections))
