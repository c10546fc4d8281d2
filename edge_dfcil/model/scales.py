"""Features of several scales: the backbone's own features, and the pooled feature maps of its blocks.

The last features of a network fit the classes that it was trained on. What separates new classes is often still present in
earlier layers. Feature maps are read by position (hypercolumns, Hariharan et al., CVPR 2015), as means over the cells of a grid,
and by their variation over the image, as standard deviations (as in style transfer, Gatys et al., CVPR 2016). One linear head
takes all of them; the backbone does no more work.
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

GRID = 2  # cells a side to which a feature map is pooled
SMALLEST = 4  # pixels a side: on smaller maps a grid adds little to the mean, which the last features contain
MOST = 2560  # features, including the backbone's own: a covariance grows with their square
ROOM = 1280  # features that may be added in any case
TINY = 1e-5  # added to variances: the gradient of a standard deviation is infinite at 0


class Scales:
    """Reads the outputs of some layers while their network runs.

    Hooks stay on the layers, because several threads may run the network: each thread reads the outputs of its own run. Copies
    of a network have separate hooks.

    Parameters
    ----------
    backbone
        The network.
    layers
        Dotted names of layers in it that give feature maps (N, C, H, W).
    spread
        Whether a map's standard deviations are read in addition to its means; older files use the means only.

    Raises `BackboneError` for a name that is not in the backbone.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[str], spread: bool = True) -> None:
        self.layers, self.spread = tuple(layers), spread
        self._local = threading.local()
        for name in self.layers:
            try:
                layer = backbone.get_submodule(name)
            except AttributeError as error:
                raise BackboneError(f"the backbone has no layer {name!r} to take feature maps from") from error
            layer.register_forward_hook(_Hook(self, name))

    def features(self, backbone: nn.Module, images: Tensor) -> Tensor:
        """The backbone's features (N, F) followed by the pooled maps, (N, F + the sum of C (GRID^2 + 1))."""
        if not self.layers:
            found: Tensor = backbone(images)
            return found
        seen: dict[str, Tensor] = {}
        self._local.seen = seen
        try:
            features: Tensor = backbone(images)
        finally:
            self._local.seen = None
        return torch.cat([features, *(pooled(seen[name], self.spread).to(features.dtype) for name in self.layers)], 1)

    def keep(self, name: str, output: Tensor) -> None:
        """Called by the hooks."""
        seen = getattr(self._local, "seen", None)
        if seen is not None:
            seen[name] = output

    # Thread-local data is neither copied nor pickled.

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "spread": self.spread}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layers, self.spread, self._local = state["layers"], state["spread"], threading.local()


class _Hook:
    def __init__(self, scales: Scales, name: str) -> None:
        self._scales, self._name = scales, name

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self._scales.keep(self._name, output)


def pooled(maps: Tensor, spread: bool) -> Tensor:
    """Means of the cells (N, C GRID^2), followed by the standard deviations of the whole maps (N, C)."""
    cells = F.adaptive_avg_pool2d(maps, GRID).flatten(1)
    if not spread:
        return cells
    variances = (maps - maps.mean((2, 3), keepdim=True)).square().mean((2, 3))
    return torch.cat([cells, (variances + TINY).sqrt()], 1)


def find_layers(backbone: nn.Module, image_size: int) -> tuple[str, ...]:
    """The blocks to read, in the backbone's order; none for a network without feature maps of at least `SMALLEST` pixels a side.

    Chosen are first the last block at each resolution, the deepest first, then other blocks, the narrowest first, as long as
    there is room.
    """
    trial = copied(backbone)
    found: dict[str, tuple[int, int]] = {}  # by name, in order: side and channels
    blocks = dict(_blocks(trial))

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) >= SMALLEST:
                found[name] = min(output.shape[2:]), output.shape[1]

        return keep

    for name, layer in blocks.items():
        layer.register_forward_hook(hook(name))
    room = max(MOST - run(trial, probe(trial, image_size)).shape[1], ROOM)
    last = {side: name for name, (side, _) in found.items()}
    others = [name for name in found if name not in last.values() and any(blocks[name].children())]
    chosen = []
    for name in [last[side] for side in sorted(last)] + sorted(others, key=lambda name: found[name][1]):
        adds = found[name][1] * (GRID**2 + 1)
        if adds <= room:
            chosen.append(name)
            room -= adds
    return tuple(name for name in found if name in chosen)


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a network in order: containers are expanded, blocks are not."""
    for name, child in module.named_children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
