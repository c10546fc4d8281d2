"""Class statistics: what a method keeps in addition to the weights, by name, with a role and the number of images behind it.

A statistic is a sum over images (a mean, a count, a covariance), never a single image's feature. A statistic of one class
needs at least `min_images` images of that class, and a statistic of all classes needs as many in total. Others are not stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edge_dfcil import devices
from edge_dfcil.errors import SettingError

MIN_IMAGES = 10


@dataclass(frozen=True)
class Role:
    """What a statistic is.

    Attributes
    ----------
    shape
        A letter for each axis: C outputs, F features, D chosen by the method, P parameters.
    meaning
        In words, for people who read what a model keeps.
    """

    shape: str
    meaning: str

    @property
    def axis(self) -> int | None:
        """The axis that runs over classes; None for a statistic of all classes together."""
        return self.shape.index("C") if "C" in self.shape else None


ROLES = {
    "class_mean": Role("CF", "The mean feature of a class, over at least the stated number of its images."),
    "class_variance": Role("CF", "How each feature varies within a class."),
    "class_count": Role("C", "The number of images of a class."),
    "class_covariance": Role("CFF", "How the features of a class vary together."),
    "shared_covariance": Role("FF", "How features vary within classes, over all images together."),
    # P is F + 3, in older files F + 2: see `heads.lda.Frame`.
    "head_frame": Role("P", "What the rows of the head have in common."),
    "gram": Role("DD", "Sums of products of features, over all images together."),
    "class_correlation": Role("DC", "The sum of the features of a class."),
}


@dataclass(frozen=True)
class Statistic:
    """One tensor of class statistics.

    Attributes
    ----------
    role
        A key of `ROLES`.
    values
        The tensor, on the CPU.
    images
        The images behind it: of each class, in the order of the outputs, or one number for all classes together.
    """

    role: str
    values: Tensor
    images: tuple[int, ...]

    @property
    def axis(self) -> int | None:
        """The axis that runs over classes."""
        return ROLES[self.role].axis

    def only(self, outputs: Sequence[int]) -> Statistic:
        """The statistic for these outputs only. A statistic of all classes together is returned unchanged."""
        if self.axis is None:
            return self
        values = self.values.index_select(self.axis, torch.tensor(outputs, dtype=torch.long))
        return Statistic(self.role, values, tuple(self.images[output] for output in outputs))

    def to_dict(self) -> dict[str, Any]:
        """Its description in a file, in addition to the tensor."""
        return {"role": self.role, "images": list(self.images)}


Statistics = Mapping[str, Statistic]


def check(statistics: Statistics, declared: Mapping[str, str], classes: int, min_images: int = MIN_IMAGES) -> None:
    """Raises `SettingError` unless each statistic is as its method declared it, and comes from enough images.

    Parameters
    ----------
    declared
        Names and roles that the method declares.
    classes
        Outputs of the network.
    """
    for name, statistic in statistics.items():
        if declared.get(name) != statistic.role or statistic.role not in ROLES:
            raise SettingError(
                f"the statistic {name!r} of role {statistic.role!r} is not declared; a method lists what it keeps in `state`, "
                f"with a role of {', '.join(ROLES)}"
            )
        axis = statistic.axis
        if len(statistic.images) != (classes if axis is not None else 1):
            raise SettingError(f"the statistic {name!r} counts images of {len(statistic.images)} classes; there are {classes}")
        if axis is not None and statistic.values.shape[axis] != classes:
            raise SettingError(
                f"the statistic {name!r} has the shape {tuple(statistic.values.shape)}; it needs {classes} classes on axis {axis}"
            )
        for output, images in enumerate(statistic.images):
            row = statistic.values if axis is None else statistic.values.select(axis, output)
            if images < min_images and bool((row != 0).any()):
                raise SettingError(
                    f"the statistic {name!r} is from {images} images{'' if axis is None else f' of output {output}'}; at least "
                    f"{min_images} are needed: leave such a row zero"
                )


def rounded(statistics: Statistics) -> dict[str, Statistic]:
    """The statistics with the precision of a file, so that a model is the same after saving and loading."""
    return unpacked(packed(statistics), described(statistics))


def described(statistics: Statistics) -> dict[str, Any]:
    """The JSON that describes them in a file."""
    return {name: statistic.to_dict() for name, statistic in statistics.items()}


@devices.cpu_by_default()
def packed(statistics: Statistics) -> dict[str, Tensor]:
    """Tensors by their names in a file.

    A shared covariance, by far the largest, is stored as its variances and the correlations above the diagonal, two bytes each.
    """
    tensors: dict[str, Tensor] = {}
    for name, statistic in statistics.items():
        key = f"statistics.{name}"
        if statistic.role == "shared_covariance":
            tensors[key + VARIANCES], tensors[key] = _correlations(statistic.values)
        else:
            tensors[key] = statistic.values
    return tensors


@devices.cpu_by_default()
def unpacked(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> dict[str, Statistic]:
    """The inverse of `packed` and `described`."""
    statistics = {}
    for name, found in described.items():
        values, variances = tensors[f"statistics.{name}"], tensors.get(f"statistics.{name}{VARIANCES}")
        if variances is not None:
            values = _covariance(variances, values)
        statistics[name] = Statistic(found["role"], values, tuple(found["images"]))
    return statistics


def check_stored(tensors: Mapping[str, Tensor], described: Mapping[str, Any], outputs: int) -> None:
    """Raises `SettingError` unless the statistics of a file match its description, in the shapes of their roles.

    Call it before `unpacked`, which allocates memory according to the shapes.
    """
    expected = set()
    for name, found in described.items():
        if not isinstance(found, dict) or found.keys() != {"role", "images"} or found["role"] not in list(ROLES):
            raise SettingError(
                f"the statistic {name!r} is described by {ascii(found)[:200]}; its role must be one of {', '.join(ROLES)}"
            )
        role, images, key = found["role"], found["images"], f"statistics.{name}"
        counts = outputs if ROLES[role].axis is not None else 1
        if not isinstance(images, list) or len(images) != counts or not all(type(n) is int and 0 <= n < 2**53 for n in images):
            raise SettingError(f"the statistic {name!r} states the images {ascii(images)[:200]}; {counts} whole numbers needed")
        values, variances = tensors.get(key), tensors.get(key + VARIANCES)
        if values is None:
            raise SettingError(f"the statistic {name!r} is described but has no tensor")
        expected |= {key} if variances is None else {key, key + VARIANCES}
        if variances is not None:
            pairs = len(variances) * (len(variances) - 1) // 2 if variances.dim() == 1 else -1
            right = role == "shared_covariance" and values.shape == (pairs,) and values.dtype == torch.int16
        else:
            shape = ROLES[role].shape
            sizes = dict(zip(shape, values.shape, strict=False))
            right = tuple(values.shape) == tuple(outputs if axis == "C" else sizes[axis] for axis in shape if axis in sizes)
            right = right and values.dim() == len(shape) and values.dtype.is_floating_point
        if not right:
            raise SettingError(f"the statistic {name!r} of role {role!r} has the shape {tuple(values.shape)}, {values.dtype}")
        spread = variances if variances is not None else values if role in ("class_variance", "class_count") else None
        if spread is not None and (not spread.is_floating_point() or bool((spread < 0).any())):
            raise SettingError(f"the statistic {name!r} has negative variances or counts")
    if surplus := {name for name in tensors if name.startswith("statistics.")} - expected:
        raise SettingError(f"{sorted(surplus)[0]!r} is a statistic that is not described")


def is_of(statistic: Statistic, features: int) -> bool:
    """Whether its shape fits a network with this number of features."""
    shape, values = ROLES[statistic.role].shape, statistic.values
    if shape == "P":
        return len(values) - features in (2, 3)
    return "F" not in shape or values.shape[shape.index("F")] == features


VARIANCES = ":variances"  # suffix of the name of a covariance's second tensor in a file
STEPS = 32767  # of a correlation from 0 to 1


def _correlations(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The variances (F,) of a covariance (F, F), and its correlations above the diagonal, row by row, as int16."""
    variances = covariance.diagonal().clamp_min(0).clone()
    deviations = variances.double().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    above = [torch.zeros(0, dtype=torch.int16)]
    for row, values in enumerate(covariance):  # row by row: indices of all pairs would take more memory than the covariance
        correlations = values[row + 1 :].double() / (deviations[row] * deviations[row + 1 :])
        above.append((correlations.clamp(-1, 1) * STEPS).round().to(torch.int16))
    return variances, torch.cat(above)


def _covariance(variances: Tensor, correlations: Tensor) -> Tensor:
    """The inverse of `_correlations`."""
    features, deviations = len(variances), variances.double().sqrt()
    found = torch.diag(variances)
    for row, values in enumerate(correlations.split(list(range(features - 1, -1, -1)))):
        covariances = values.double() / STEPS * deviations[row] * deviations[row + 1 :]
        found[row, row + 1 :] = found[row + 1 :, row] = covariances.to(found.dtype)
    return found
