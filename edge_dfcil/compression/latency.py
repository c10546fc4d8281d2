"""What a convolution costs on this machine, by its channels: measured once with ONNX Runtime and kept for later."""

from __future__ import annotations

import contextlib
import json
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
        A JSON file that entries are kept in; None takes one for this processor and version in the user's cache folder.
    measure
        Milliseconds of a shape; for tests.
    """

    def __init__(self, path: Path | None = None, measure: Callable[[Shape], float] | None = None) -> None:
        self._path, self._measure = path or _cache_file(), measure or measure_convolution
        self._entries: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):  # not there yet, or damaged: measured anew
            self._entries = json.loads(self._path.read_text())

    def __call__(self, shape: Shape) -> float:
        key = "-".join(map(str, astuple(shape)))
        if key not in self._entries:
            self._entries[key] = self._measure(shape)
        return self._entries[key]

    def save(self) -> None:
        """Keeps what was measured; a folder that cannot be written to costs measuring again, no more."""
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


def _cache_file() -> Path:
    from importlib.metadata import version

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = "".join(c if c.isalnum() else "-" for c in f"{platform.node()}-{platform.machine()}")
    return base / "edge-dfcil" / f"latency-{machine}-onnxruntime-{version('onnxruntime')}.json"
