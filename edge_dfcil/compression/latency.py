"""The latency of convolutions on this machine, by shape: measured once with ONNX Runtime, and stored."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.files import replace_file
from exporters.timing import in_turns, session

ROUNDS = 15


@dataclass(frozen=True)
class Shape:
    """A convolution over one image: channels in and out, side of its kernel, stride, groups, and its input's height and width."""

    channels_in: int
    channels_out: int
    kernel: int
    stride: int
    groups: int
    height: int
    width: int

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiplication and an addition counted as two."""
        out = -(-self.height // self.stride) * -(-self.width // self.stride)
        return 2 * self.kernel**2 * self.channels_in // self.groups * self.channels_out * out


class LatencyTable:
    """Milliseconds of convolutions, one image and one thread each.

    Parameters
    ----------
    path
        A JSON file for the entries; None takes one for this machine and ONNX Runtime version in the user's cache folder
        (`XDG_CACHE_HOME`, else `.cache` in the home folder). Without either, nothing is stored.
    measure
        Measures the milliseconds of a shape; tests replace it.
    """

    def __init__(self, path: Path | None = None, measure: Callable[[Shape], float] | None = None) -> None:
        self._path, self._measure = path or _cache_file(), measure or measure_convolution
        self._entries: dict[str, float] = {}
        self._entries.update(_read(self._path))

    def __call__(self, shape: Shape) -> float:
        key = "-".join(map(str, astuple(shape)))
        if key not in self._entries:
            self._entries[key] = self._measure(shape)
        return self._entries[key]

    def save(self) -> None:
        """Stores what was measured. If the folder cannot be written to, it will be measured again."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, json.dumps(self._entries, sort_keys=True, indent=0).encode())


def measure_convolution(shape: Shape) -> float:
    """Milliseconds of a convolution with ReLU in ONNX Runtime, median of a few runs."""
    import onnx
    from onnx import helper, numpy_helper

    random = np.random.default_rng(0)
    size = (shape.channels_out, shape.channels_in // shape.groups, shape.kernel, shape.kernel)
    weight = numpy_helper.from_array(random.standard_normal(size).astype(np.float32), "w")
    pads = [shape.kernel // 2] * 4
    attributes: dict[str, Any] = {"strides": [shape.stride] * 2, "pads": pads, "group": shape.groups}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], **attributes), helper.make_node("Relu", ["c"], ["y"])]
    image = (1, shape.channels_in, shape.height, shape.width)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, image)
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([*nodes], "convolution", [x], [y], [weight])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    run, images = session(model.SerializeToString(), threads=1), random.standard_normal(image).astype(np.float32)
    return 1000 * in_turns({"": lambda: run.run(["y"], {"x": images})}, ROUNDS)[""]


def _read(path: Path | None) -> dict[str, float]:
    """The entries of a file; none if it does not exist yet, or is damaged: they are measured again."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
        return {str(key): float(value) for key, value in found.items() if 0 <= float(value) < math.inf}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _cache_file() -> Path | None:
    """None if there is no home folder, as in a container whose user has none."""
    from importlib.metadata import version

    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    machine = "".join(c if c.isalnum() else "-" for c in f"{platform.node()}-{platform.machine()}")
    return base / "edge-dfcil" / f"latency-{machine}-onnxruntime-{version('onnxruntime')}.json"
