"""Features of several scales: beside a backbone's own, the feature maps of its last block at each resolution, pooled to a grid.

The last features of a network are made for the classes it was trained on. What tells new classes apart is often still there
in the middle of it, together with where in the image it was (hypercolumns, Hariharan et al., CVPR 2015). A linear head over
both is served as before; the backbone does no more work.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil.errors import BackboneError
from edge_dfcil.model.contract import copied, probe, run

GRID = 2  # cells a side that a feature map is pooled to
LEVELS = 3  # resolutions, the deepest ones
SMALLEST = 4  # pixels a side: a grid of smaller maps says little more than their mean, which the last features have
MOST = 2048  # numbers that are added to the features, at most: a covariance grows with their square


class Scales:
    """Reads the outputs of some layers while their network runs.

    Hooks stay on the layers, because several threads may run the network: each reads what its own run has left. Copies of a
    network have hooks of their own.

    Parameters
    ----------
    backbone
        The network.
    layers
        Dotted names of layers in it that give feature maps (N, C, H, W).

    Raises `BackboneError` for a name that is not in the backbone.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[str]) -> None:
        self.layers = tuple(layers)
        self._local = threading.local()
        for name in self.layers:
            try:
                layer = backbone.get_submodule(name)
            except AttributeError as error:
                raise BackboneError(f"the backbone has no layer {name!r} to take feature maps from") from error
            layer.register_forward_hook(_Hook(self, name))

    def features(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """The backbone's features (N, F) with the pooled maps behind them, (N, F + the sum of C GRID^2)."""
        if not self.layers:
            found: Tensor = backbone(images)
            return found
        seen: dict[str, Tensor] = {}
        self._local.seen = seen
        try:
            features: Tensor = backbone(images)
        finally:
            self._local.seen = None
        return torch.cat([features, *(_pooled(seen[name]).to(features.dtype) for name in self.layers)], 1)

    def keep(self, name: str, output: Tensor) -> None:
        """Called by the hooks."""
        seen = getattr(self._local, "seen", None)
        if seen is not None:
            seen[name] = output

    # A thread's store is neither copied nor pickled.

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self._local = state["layers"], threading.local()


class _Hook:
    def __init__(self, scales: Scales, name: str) -> None:
        self._scales, self._name = scales, name

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._scales.keep(self._name, output)


def _pooled(maps: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(maps, GRID).flatten(1)


def find_layers(backbone: nn.Module, image_size: int) -> tuple[str, ...]:
    """The last block at each of the deepest resolutions of at least `SMALLEST` pixels, from the image on; as many as add at
    most `MOST` features. None for a network without such maps."""
    trial = copied(backbone)
    last: dict[int, tuple[str, int]] = {}  # by side: the layer, and what it adds

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) >= SMALLEST:
                last[min(output.shape[2:])] = (name, output.shape[1] * GRID**2)

        return keep

    for name, layer in _blocks(trial):
        layer.register_forward_hook(hook(name))
    run(trial, probe(trial, image_size))
    found: list[str] = []
    room = MOST
    for side in sorted(last)[:LEVELS]:
        name, adds = last[side]
        if adds <= room:
            found.insert(0, name)
            room -= adds
    return tuple(found)


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts that a network is a chain of: containers are opened, blocks are not."""
    for name, child in module.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
