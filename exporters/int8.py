"""INT8: static quantization of an exported graph by ONNX Runtime, calibrated on images, checked against the float graph.

Activations get one scale per tensor (QDQ form). Weights get one per channel, or are quantized by the first of `ATTEMPTS` that
answers as the float graph. They use seven of their eight bits: x86 CPUs without VNNI add products in 16 bits, which eight bits
would overflow, and an exported file must give the same answers everywhere.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporters.errors import ExportError
from exporters.telemetry import runtime_library
from exporters.timing import session

AGREEMENT = 0.9  # share of the images of each set to check on for which the answer must be that of the float graph
LOSS = 0.01  # of accuracy, at most, on sets whose answers are known
# Images that a graph sees together. Calibration keeps the activations of all layers for this many pixels: 50 MB for
# mobilenet_v3_small, whose quantization takes about 150 MB in addition to torch, for any number of images.
BATCH, BATCH_PIXELS = 32, 2**17

Images = npt.NDArray[np.uint8]
ImageSet = Images | Iterable[Images]


@dataclass(frozen=True)
class Attempt:
    """A way to quantize: weights per channel or per tensor, and whether the head stays in floats."""

    per_channel: bool = True
    float_head: bool = False

    def __str__(self) -> str:
        return f"per-{'channel' if self.per_channel else 'tensor'} scales{', float head' if self.float_head else ''}"


# The first that passes the checks is written. The head is everything after the last convolution, including pooling: with a common
# scale, a linear layer over features of very different variances, such as those of several scales, loses the small ones.
ATTEMPTS = (Attempt(), Attempt(per_channel=False), Attempt(float_head=True), Attempt(per_channel=False, float_head=True))


@dataclass(frozen=True)
class Int8:
    """The images and options for a quantization. A set of images is an array (N, 3, S, S), uint8, or an iterable of such arrays,
    which is read batch by batch, and not kept. Its `len`, if it has one, is the number of its images. Sets to check on are read
    again for every attempt.

    Attributes
    ----------
    calibration
        Images from which the ranges of activations are taken.
    checks
        Sets of images on which both graphs are run, by name.
    targets
        The right outputs (N,), for those sets that have them.
    widening
        Factor for the ranges read from `calibration`: above 1 if activations of later images will exceed these ranges, where
        they would be clipped.
    force
        Whether a file is written even if it is not faster than floats on this machine. It is smaller, and may be faster on
        others.
    attempts
        Ways to quantize, in the order in which they are tried.
    """

    calibration: ImageSet
    checks: Mapping[str, ImageSet]
    targets: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    widening: float = 1.0
    force: bool = False
    attempts: tuple[Attempt, ...] = ATTEMPTS


@dataclass(frozen=True)
class Comparison:
    """The answers of the INT8 graph compared with those of the float graph, by set of images.

    Attributes
    ----------
    images
        The number of images.
    agreement
        Share of images with the same answer.
    accuracy
        Share of right answers, float and INT8, for sets with targets.
    max_difference
        The largest difference of a probability.
    """

    images: dict[str, int]
    agreement: dict[str, float]
    accuracy: dict[str, tuple[float, float]]
    max_difference: float

    def reason(self) -> str:
        """Why the INT8 graph must not be written; empty if it may be."""
        for name, share in self.agreement.items():
            if share < AGREEMENT:
                of = f"of the {self.images[name]} {name}"
                return f"another answer than the model for {1 - share:.1%} {of}, {1 - AGREEMENT:.0%} is allowed"
        for name, (as_float, as_int8) in self.accuracy.items():
            lost = round((as_float - as_int8) * self.images[name])
            if lost > max(1, LOSS * self.images[name]):  # one image of few is chance
                loss = f"{100 * (as_float - as_int8):.1f} points of accuracy less on the {name}, {100 * LOSS:g} is allowed"
                return f"{loss} ({as_float:.1%} as float, {as_int8:.1%} as INT8)"
        return ""


def count(images: ImageSet) -> int | None:
    """The number of images in a set; None if that is not known before it has been read."""
    if isinstance(images, (list, tuple)):
        return sum(map(len, images))
    return len(images) if isinstance(images, Sized) else None


def quantize(
    graph: bytes, setting: Int8, advance: Callable[[int], None] = lambda images: None
) -> tuple[bytes, Attempt, Comparison]:
    """The graph in INT8, by the first of `setting.attempts` that answers as the float graph on every set to check on.

    `advance` is called after every batch with its number of images; images to check on count only in the first attempt. What it
    raises passes through. Raises `ExportError` when ONNX Runtime cannot quantize the graph, when a set is empty, and when no
    attempt passes, with the figures of each.
    """
    runtime_library()
    from onnxruntime import quantization

    reasons = []
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared = (Path(folder) / name for name in ("float.onnx", "prepared.onnx"))
        with _onnxruntime():
            plain.write_bytes(graph)
            # Folds BatchNorm into convolutions and infers the shapes.
            quantization.quant_pre_process(str(plain), str(prepared))
            _pool(prepared)
        first, ranges = _ranges(prepared, setting, advance)
        for number, attempt in enumerate(setting.attempts):
            quantized = _quantized(graph, prepared, first, ranges, attempt)
            found = compare(graph, quantized, setting, advance if number == 0 else lambda images: advance(0))
            if not (reason := found.reason()):
                return quantized, attempt, found
            reasons.append(f"{attempt}: {reason}")
    raise ExportError(
        f"no INT8 graph answers as the model does. {'; '.join(reasons)}. Nothing was written. Calibrate on images like those "
        "that it will see, or export floats"
    )


def _quantized(graph: bytes, prepared: Path, first: Images, ranges: dict[str, Any], attempt: Attempt) -> bytes:
    import onnx
    from onnxruntime import quantization

    quantized = prepared.with_name("int8.onnx")
    with _onnxruntime():
        quantization.quantize_static(
            str(prepared),
            str(quantized),
            _OneBatch(first),  # required, but not used: every range is given
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=attempt.per_channel,
            reduce_range=True,
            nodes_to_exclude=_of_probabilities(prepared) + (_of_the_head(prepared) if attempt.float_head else []),
            extra_options={"TensorQuantOverrides": ranges},
        )
        model = onnx.load(str(quantized))
    return _labelled_as(onnx.load_from_string(graph), model)


def _pool(graph: Path) -> None:
    """Turns means of whole maps into pooling: ONNX Runtime has an integer kernel for it, and means take six times as long."""
    import onnx

    model = onnx.load(str(graph))
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    ranks = {one.name: len(one.type.tensor_type.shape.dim) for one in model.graph.value_info}
    for node in model.graph.node:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        keeps = all(entry.i == 1 for entry in node.attribute if entry.name == "keepdims")
        if axes is not None and keeps and ranks.get(node.input[0]) == 4 and {int(axis) % 4 for axis in axes} == {2, 3}:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    used = {name for node in model.graph.node for name in node.input}
    for one in [one for one in model.graph.initializer if one.name not in used]:
        model.graph.initializer.remove(one)
    onnx.save(model, str(graph))


def _of_the_head(graph: Path) -> list[str]:
    """The nodes that no convolution follows."""
    import onnx

    leads: set[str] = set()  # tensors from which a convolution is computed
    found = []
    for node in reversed(onnx.load(str(graph)).graph.node):  # in topological order: the inputs of a node come before it
        if node.op_type == "Conv" or leads.intersection(node.output):
            leads.update(node.input)
        else:
            found.append(node.name)
    return found


def _of_probabilities(graph: Path) -> list[str]:
    """The nodes that stay floats: a probability of eight bits would be 0 below 1/256, and rejection needs its logarithm."""
    import onnx

    return [node.name for node in onnx.load(str(graph)).graph.node if node.op_type in ("Softmax", "Log")]


def _labelled_as(graph: Any, quantized: Any) -> bytes:
    """The quantized graph with the metadata of the float one, and no later IR version."""
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(graph.metadata_props)
    quantized.ir_version = min(quantized.ir_version, graph.ir_version)
    content: bytes = quantized.SerializeToString()
    return content


def _ranges(prepared: Path, setting: Int8, advance: Callable[[int], None]) -> tuple[Images, dict[str, list[dict[str, Any]]]]:
    """One image, and the smallest and the largest value of every activation, widened, by its name."""
    from onnxruntime import quantization

    with _onnxruntime():
        augmented = str(prepared.with_name("calibrate.onnx"))
        calibrator = quantization.create_calibrator(prepared, augmented_model_path=augmented)
    first: Images | None = None
    for batch in _batches(setting.calibration):
        with _onnxruntime():
            calibrator.collect_data(_OneBatch(batch))  # merges the ranges with those before, and keeps nothing else
        first = batch[:1].copy() if first is None else first
        advance(len(batch))
    if first is None:
        raise ExportError("there is no image to calibrate on; pass calibration=None to calibrate on dreams")

    def wide(value: Any) -> np.float32:
        return np.float32(setting.widening * np.asarray(value).item())

    found = {name: values.range_value for name, values in calibrator.compute_data().data.items()}
    return first, {name: [{"rmin": wide(low), "rmax": wide(high)}] for name, (low, high) in found.items()}


def _batches(images: ImageSet) -> Iterator[Images]:
    """A set in batches that are small enough for calibration."""
    for chunk in [images] if isinstance(images, np.ndarray) else images:
        array = np.asarray(chunk)
        if array.ndim != 4 or array.dtype != np.uint8:
            raise ExportError(f"got images of shape {array.shape} and dtype {array.dtype}; pass (N, 3, S, S), uint8")
        at_once = max(1, min(BATCH, BATCH_PIXELS // max(1, array.shape[2] * array.shape[3])))
        for start in range(0, len(array), at_once):
            yield array[start : start + at_once]


class _OneBatch:
    """A batch as ONNX Runtime's quantizer reads it."""

    def __init__(self, batch: Images) -> None:
        self._inputs: dict[str, Images] | None = {"images": batch}

    def get_next(self) -> dict[str, Images] | None:
        found, self._inputs = self._inputs, None
        return found


@contextlib.contextmanager
def _onnxruntime() -> Iterator[None]:
    """Turns what ONNX Runtime raises into `ExportError`, and drops what its quantizer logs from this thread.

    The quantizer logs advice to the root logger that has already been followed. The level and the handlers of the root logger
    are for the whole process, so they are not changed. If it has no handler, one is added temporarily, because
    `logging.warning` would add one permanently.
    """
    root, thread = logging.getLogger(), threading.get_ident()

    def is_other(record: logging.LogRecord) -> bool:
        return record.thread != thread or "onnxruntime" not in Path(record.pathname).parts

    stand_in = logging.lastResort if not root.handlers else None  # what logging uses if the root logger has no handlers
    root.addFilter(is_other)
    if stand_in is not None:
        root.addHandler(stand_in)
    try:
        yield
    except Exception as error:  # onnxruntime raises many kinds; its message is the useful part
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"ONNX Runtime could not quantize this graph: {reason}") from error
    finally:
        root.removeFilter(is_other)
        if stand_in is not None:
            root.removeHandler(stand_in)


def compare(graph: bytes, quantized: bytes, setting: Int8, advance: Callable[[int], None] = lambda images: None) -> Comparison:
    """Runs both graphs on every set of images, batch by batch; `advance` is as for `quantize`.

    Raises `ExportError` when a set is empty, or has another number of images than of targets.
    """
    ours, theirs = session(quantized), session(graph)
    images_of, agreement, accuracy, largest = {}, {}, {}, 0.0
    for name, images in setting.checks.items():
        found, right = [], []
        for batch in _batches(images):
            mine, expected = (one.run(["probabilities"], {"images": batch})[0] for one in (ours, theirs))
            largest = max(largest, float(np.abs(mine - expected).max()))
            found.append(mine.argmax(1))
            right.append(expected.argmax(1))
            advance(len(batch))
        if not found:
            raise ExportError(f"there is no image in {name!r} to check the INT8 graph on")
        answers, wanted = np.concatenate(found), np.concatenate(right)
        images_of[name], agreement[name] = len(wanted), float((answers == wanted).mean())
        if name in setting.targets:
            accuracy[name] = _accuracies(name, setting.targets[name], wanted, answers)
    return Comparison(images_of, agreement, accuracy, largest)


def _accuracies(name: str, targets: npt.NDArray[np.int64], *answers: npt.NDArray[np.int64]) -> tuple[float, float]:
    if len(targets) != len(answers[0]):
        raise ExportError(f"got {len(answers[0])} {name} with {len(targets)} targets; each image needs one")
    as_float, as_int8 = (float((found == targets).mean()) for found in answers)
    return as_float, as_int8
