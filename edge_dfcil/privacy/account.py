"""What a model keeps, said tensor by tensor. Weights are derived from data: this is an account, not a guarantee."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from edge_dfcil.errors import ModelFileError
from edge_dfcil.model.backbones import batchnorm_layers

WEIGHT = "weight"
STATISTIC = "batchnorm statistic"
COUNTER = "batchnorm counter"


@dataclass(frozen=True)
class Kept:
    """One tensor that a model keeps, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def account(network: nn.Module, tensors: Mapping[str, Tensor]) -> list[Kept]:
    """Every tensor of a model file, by kind. Raises `ModelFileError` for one that is no part of the network.

    Parameters
    ----------
    network
        The classifier that the file belongs to.
    tensors
        What the file holds.
    """
    kinds = {name: WEIGHT for name, _ in network.named_parameters()}
    modules = {id(module): name for name, module in network.named_modules()}
    for layer in batchnorm_layers(network):
        prefix = f"{modules[id(layer)]}."
        kinds |= {prefix + "running_mean": STATISTIC, prefix + "running_var": STATISTIC, prefix + "num_batches_tracked": COUNTER}
    strangers = sorted(set(tensors) - set(kinds))
    if strangers:
        raise ModelFileError(f"the model holds {', '.join(strangers)}, which is neither a weight nor a BatchNorm statistic")
    return [Kept(name, kinds[name], tuple(t.shape), t.numel() * t.element_size()) for name, t in sorted(tensors.items())]
