"""Scaling and cropping inside an ONNX graph, bit-identical to `edge_dfcil.model.preprocessing.fit` on uint8 images.

ONNX has an antialiased `Resize`, but does not define its rounding. ONNX Runtime's differs from torch's in up to a quarter of the
pixels of a photograph, by one step of 255, and that moved the confidence of a sharp classifier by up to 0.12
(docs/research-log.md). Here the weights are computed as in torch, in 16 bits, and the sums are of integers: `MatMulInteger`, on
the high and on the low bytes of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from exporters.resize import BITS, LONGEST, MOST_BITS
from exporters.seals import IR_VERSION

GROUP = 32  # columns that are computed together: each is a sum over few pixels, and zeros between them cost time
PREFIX = "fit/"  # of every name that is added to a graph


def for_any_size(content: bytes, size: int) -> bytes:
    """Turns a graph for `images` uint8 (N, 3, S, S), with S = `size`, into one for (N, 3, H, W) with H and W free.

    Squares of S pixels pass unchanged; other images are scaled until the short side is S and cropped to the centre.
    """
    import onnx

    model, front = onnx.load_from_string(content), scaling_graph(size).graph
    graph = model.graph
    for node in graph.node:
        node.input[:] = [PREFIX + "squares" if name == "images" else name for name in node.input]
    constants = [*front.initializer, *graph.initializer]
    nodes = [*front.node, *graph.node]
    joined = onnx.helper.make_graph(nodes, graph.name, front.input, graph.output, constants, value_info=graph.value_info)
    model.graph.CopyFrom(joined)
    for entry in model.metadata_props:
        if entry.key == "input":
            entry.value = "any"
    return bytes(model.SerializeToString())


def scaling_graph(size: int) -> Any:
    """The part that is put in front, an `onnx.ModelProto`: `images` uint8 (N, 3, H, W) to `fit/squares` (N, 3, S, S)."""
    from onnx import TensorProto, helper

    graph = _Graph()
    shape = graph("Shape", "images", start=2)
    is_square = graph("ReduceMin", graph("Cast", graph("Equal", shape, _ints(size)), to=TensorProto.INT32), keepdims=0)
    inside, outside = _Graph("scaled/"), _Graph("kept/")
    fitted = _fitted(inside, shape, size)
    kept = outside("Identity", "images")
    branches = {"then_branch": outside.proto(kept), "else_branch": inside.proto(fitted)}
    either = graph("If", graph("Cast", is_square, to=TensorProto.BOOL), **branches)
    graph("Reshape", either, _ints(0, 3, size, size), name="squares")
    entry = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, "height", "width"])
    end = helper.make_tensor_value_info(PREFIX + "squares", TensorProto.UINT8, ["batch", 3, size, size])
    made = helper.make_graph(graph.nodes, "scaling", [entry], [end], graph.constants)
    return helper.make_model(made, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", 18)])


class _Graph:
    """Nodes in the order in which they are added: `graph("Add", a, b)` adds one and returns the name of its output.

    Inputs are names, or arrays, which become constants.
    """

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._prefix = PREFIX + prefix

    def __call__(self, operator: str, *inputs: Any, name: str = "", **attributes: Any) -> str:
        from onnx import helper

        names = [one if isinstance(one, str) else self._constant(np.asarray(one)) for one in inputs]
        output = self._prefix + (name or str(len(self.nodes)))
        self.nodes.append(helper.make_node(operator, names, [output], name=output, **attributes))
        return output

    def _constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"{self._prefix}constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def proto(self, output: str) -> Any:
        """The nodes as a branch, whose inputs are names of the enclosing graph."""
        from onnx import TensorProto, helper

        end = helper.make_tensor_value_info(output, TensorProto.UINT8, None)
        return helper.make_graph(self.nodes, self._prefix, [], [end], self.constants)


def _ints(*values: int) -> Any:
    return np.array(values, np.int64)


def _fitted(graph: _Graph, shape: str, size: int) -> str:
    """Images of `shape` (H, W), scaled and cropped."""
    short = graph("ReduceMin", shape)
    longest = graph("Mul", short, _ints(LONGEST))
    begin = graph("Div", graph("Max", graph("Sub", shape, longest), _ints(0)), _ints(2))
    images = graph("Slice", "images", begin, graph("Add", begin, longest), _ints(2, 3))
    before = graph("Min", shape, longest)
    scale = graph("Div", np.float64(size), _doubles(graph, short))
    after = graph("Max", _whole(graph, graph("Round", graph("Mul", _doubles(graph, before), scale))), _ints(size))
    rows, columns = ([graph("Gather", sizes, np.int64(side)) for sizes in (before, after)] for side in (0, 1))
    narrow = _resampled(graph, images, columns[0], columns[1], size)
    turned = graph("Transpose", narrow, perm=[0, 1, 3, 2])
    return graph("Transpose", _resampled(graph, turned, rows[0], rows[1], size), perm=[0, 1, 3, 2])


def _resampled(graph: _Graph, images: str, before: str, after: str, size: int) -> str:
    """Images (N, 3, H, before) to the middle `size` of `after` columns."""
    first, last, taps, weights, factor = _weights(graph, before, after)
    group = min(GROUP, size)
    groups = -(-size // group)
    begin = _whole(graph, graph("Round", graph("Mul", _doubles(graph, graph("Sub", after, np.int64(size))), np.float64(0.5))))
    outputs = graph("Add", begin, np.minimum(np.arange(groups * group), size - 1))  # the last group is filled up
    first, last, weights = (graph("Gather", values, outputs) for values in (first, last, weights))
    matrix = _matrix(graph, first, before, taps, weights, groups, group)
    products = []
    for number in range(groups):
        low = graph("Gather", first, _ints(number * group))
        high = graph("Gather", last, _ints((number + 1) * group - 1))
        part = graph("Slice", images, low, high, _ints(3))
        rows = graph("Slice", matrix, low, high, _ints(0))
        columns = graph("Slice", rows, _ints(2 * number * group), _ints(2 * (number + 1) * group), _ints(1))
        products.append(graph("MatMulInteger", part, columns))
    halves = graph("Reshape", graph("Concat", *products, axis=3), _ints(0, 0, 0, groups, 2, group))
    high, low = (graph("Slice", halves, _ints(half), _ints(half + 1), _ints(4)) for half in (0, 1))
    sums = graph("Add", graph("Mul", high, np.int32(256)), low)
    lines = graph("Slice", graph("Reshape", sums, _ints(0, 0, 0, groups * group)), _ints(0), _ints(size), _ints(3))
    whole = graph("Cast", factor, to=_type(np.int32))
    rounded = graph("Div", graph("Add", lines, graph("Div", whole, np.int32(2))), whole)
    return graph("Cast", graph("Min", rounded, np.int32(255)), to=_type(np.uint8))


def _weights(graph: _Graph, before: str, after: str) -> tuple[str, str, str, str, str]:
    """For each of `after` columns the first pixel and the one after the last; the largest number of pixels between; the weights,
    int32 (after, taps); about the sum of these. As in `exporters.resize`."""
    half, one, zero = np.float64(0.5), np.float64(1), np.int64(0)
    scale = graph("Div", _doubles(graph, before), _doubles(graph, after))
    reach = graph("Max", scale, one)
    number = graph("Range", zero, after, np.int64(1))
    centers = graph("Mul", scale, graph("Add", _doubles(graph, number), half))
    first = graph("Max", _whole(graph, graph("Add", graph("Sub", centers, reach), half)), zero)
    last = graph("Min", _whole(graph, graph("Add", graph("Add", centers, reach), half)), before)
    taps = graph("ReduceMax", graph("Sub", last, first), keepdims=0)
    pixels = graph("Add", _column(graph, first), graph("Range", zero, taps, np.int64(1)))
    away = graph("Add", graph("Sub", _doubles(graph, pixels), _column(graph, centers)), half)
    triangle = graph("Max", graph("Sub", one, graph("Mul", graph("Abs", away), graph("Div", one, reach))), np.float64(0))
    raw = graph("Where", graph("Less", pixels, _column(graph, last)), triangle, np.float64(0))
    weights = graph("Div", raw, graph("ReduceSum", raw, _ints(1)))
    powers = 2.0 ** np.arange(MOST_BITS + 1)
    fits = graph("Less", graph("Mul", powers, graph("ReduceMax", weights, keepdims=0)), np.float64(2**BITS - 0.5))
    factor = graph("ReduceMax", graph("Where", fits, powers, one), keepdims=0)
    whole = graph("Cast", graph("Add", graph("Mul", weights, factor), half), to=_type(np.int32))
    return first, last, taps, whole, factor


def _matrix(graph: _Graph, first: str, before: str, taps: str, weights: str, groups: int, group: int) -> str:
    """Weights (columns, taps) as a matrix (before, groups * 2 * group), uint8: for each group the high bytes, then the low."""
    place = graph("Sub", graph("Range", np.int64(1), graph("Add", before, np.int64(1)), np.int64(1)), _column(graph, first))
    inside = graph("Min", graph("Max", place, np.int64(0)), graph("Add", taps, np.int64(1)))  # both ends are padded with 0
    index = graph("Cast", inside, to=_type(np.int32))
    halves = []
    for half in (graph("Div", weights, np.int32(256)), graph("Mod", weights, np.int32(256))):
        padded = graph("Pad", graph("Cast", half, to=_type(np.uint8)), _ints(0, 1, 0, 1))
        dense = graph("GatherElements", padded, index, axis=1)
        halves.append(graph("Reshape", dense, _ints(groups, 1, group, -1)))
    rows = graph("Reshape", graph("Concat", *halves, axis=1), _ints(groups * 2 * group, -1))
    return graph("Transpose", rows, perm=[1, 0])


def _doubles(graph: _Graph, name: str) -> str:
    return graph("Cast", name, to=_type(np.float64))


def _whole(graph: _Graph, name: str) -> str:
    """Truncated to whole numbers."""
    return graph("Cast", name, to=_type(np.int64))


def _column(graph: _Graph, name: str) -> str:
    return graph("Unsqueeze", name, _ints(1))


def _type(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
