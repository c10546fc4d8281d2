"""A list of every tensor that a model keeps. Weights are derived from data: the list is no privacy guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from edge_dfcil.errors import ModelFileError
from edge_dfcil.model.statistics import ROLES

WEIGHT = "weight"
STATISTIC = "batchnorm statistic"
COUNTER = "batchnorm counter"
_BATCHNORM = {"running_mean": STATISTIC, "running_var": STATISTIC, "num_batches_tracked": COUNTER}


@dataclass(frozen=True)
class Kept:
    """One tensor that a model keeps.

    Attributes
    ----------
    kind
        `weight`, `batchnorm statistic`, `batchnorm counter`, or the role of a class statistic, such as `class_mean`.
    bytes
        Size in bytes.
    images
        The images behind a class statistic: of each class, or one number for all together; None for the other kinds.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    images: tuple[int, ...] | None = None

    @property
    def from_data(self) -> bool:
        """Whether it is derived from images: true of all kinds but counters."""
        return self.kind != COUNTER

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "from_data": self.from_data}


def account(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> list[Kept]:
    """Every tensor of a model file, in the order of their names.

    Raises `ModelFileError` for a tensor that is neither part of the network nor a class statistic that the file describes.

    Parameters
    ----------
    tensors, settings
        The result of `model.file.read`, or `Model.tensors()` and `Model.settings()`.
    """
    statistics, kept = settings.get("statistics", {}), []
    for name, tensor in sorted(tensors.items()):
        last = name.rpartition(".")[2]
        images = None
        if name.startswith("statistics."):
            described = statistics.get(last.partition(":")[0], {})
            kind, images = described.get("role", ""), tuple(described.get("images", ()))
            known = kind in ROLES
        else:
            kind = _BATCHNORM.get(last, WEIGHT)
            known = name.startswith(("backbone.", "head."))
        if not known:
            raise ModelFileError(f"the model contains {name}, which is neither a weight nor a statistic that it declares")
        kept.append(Kept(name, kind, tuple(tensor.shape), tensor.numel() * tensor.element_size(), images))
    return kept
