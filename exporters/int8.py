"""INT8: static quantization of an exported graph by ONNX Runtime, calibrated on images, checked against the float graph.

Weights get a scale a channel, activations one a tensor (QDQ form). Weights use seven of their eight bits: x86 CPUs without
VNNI add products in 16 bits, which eight would overflow, and an exported file must give the same answers everywhere.
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

AGREEMENT = 0.9  # share of images, of each set it is checked on, whose answer must be that of the float graph
# Images that a graph sees together. Calibration holds the activations of all layers for so many pixels: 50 MB for
# mobilenet_v3_small, whose quantization takes about 150 MB beside torch, however many images there are.
BATCH, BATCH_PIXELS = 32, 2**17

Images = npt.NDArray[np.uint8]
ImageSet = Images | Iterable[Images]


@dataclass(frozen=True)
class Int8:
    """What a graph is quantized with. A set of images is an array (N, 3, S, S), uint8, or an iterable of such arrays, which is
    read once, batch by batch, and not kept. Its `len`, if it has one, is the number of its images.

    Attributes
    ----------
    calibration
        Images from which the ranges of activations are taken.
    checks
        Images that both graphs are run on, by the name of their set.
    targets
        The right outputs (N,) of those sets that have them.
    widening
        Factor by which the ranges read from `calibration` are widened: above 1 where the images to come reach further than
        those, below which what they exceed the ranges by would be cut off.
    """

    calibration: ImageSet
    checks: Mapping[str, ImageSet]
    targets: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    widening: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """How the INT8 graph answers beside the float graph, by set of images.

    Attributes
    ----------
    agreement
        Share of images with the same answer.
    accuracy
        Share of right answers, float and INT8, for sets with targets.
    max_difference
        The largest difference of a probability.
    """

    agreement: dict[str, float]
    accuracy: dict[str, tuple[float, float]]
    max_difference: float


def count(images: ImageSet) -> int | None:
    """The number of images in a set; None if that is not known before it has been read."""
    if isinstance(images, (list, tuple)):
        return sum(map(len, images))
    return len(images) if isinstance(images, Sized) else None


def quantize(graph: bytes, setting: Int8, advance: Callable[[int], None] = lambda images: None) -> bytes:
    """The graph in INT8.

    `advance` is called with the number of images of every batch that has been calibrated on; what it raises passes through.
    Raises `ExportError` when ONNX Runtime cannot quantize it.
    """
    runtime_library()
    import onnx
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantized = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        with _onnxruntime():
            plain.write_bytes(graph)
            # Folds BatchNorm into convolutions and infers the shapes.
            quantization.quant_pre_process(str(plain), str(prepared))
        first, ranges = _ranges(prepared, setting, advance)
        with _onnxruntime():
            quantization.quantize_static(
                str(prepared),
                str(quantized),
                _OneBatch(first),  # has to be given, but every range is
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                nodes_to_exclude=_of_probabilities(prepared),
                extra_options={"TensorQuantOverrides": ranges},
            )
            model = onnx.load(str(quantized))
    return _labelled_as(onnx.load_from_string(graph), model)


def _of_probabilities(graph: Path) -> list[str]:
    """The nodes that stay floats: a probability of eight bits would be 0 below 1/256, and rejection needs its logarithm."""
    import onnx

    return [node.name for node in onnx.load(str(graph)).graph.node if node.op_type in ("Softmax", "Log")]


def _labelled_as(graph: Any, quantized: Any) -> bytes:
    """The quantized graph with the metadata of the float one, which opset and IR version it keeps."""
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
            raise ExportError(f"images of shape {array.shape} and dtype {array.dtype} came; pass (N, 3, S, S), uint8")
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

    It advises on the root logger what has been done already. The level and the handlers of the root logger serve the whole
    process, so they stay as they are; and a handler is put in while there is none, because `logging.warning` would add one
    permanently.
    """
    root, thread = logging.getLogger(), threading.get_ident()

    def is_other(record: logging.LogRecord) -> bool:
        return record.thread != thread or "onnxruntime" not in Path(record.pathname).parts

    stand_in = logging.lastResort if not root.handlers else None  # what answers for a root logger without handlers
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

    Raises `ExportError` when they agree on too few of a set, or a set is empty.
    """
    ours, theirs = session(quantized), session(graph)
    agreement, accuracy, largest = {}, {}, 0.0
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
        agreement[name] = float((answers == wanted).mean())
        if name in setting.targets:
            accuracy[name] = _accuracies(name, setting.targets[name], wanted, answers)
        if agreement[name] < AGREEMENT:
            raise ExportError(
                f"the INT8 graph gives another answer than the model for {1 - agreement[name]:.1%} of the {len(answers)} {name}, "
                f"{1 - AGREEMENT:.0%} is allowed. Nothing was written. Calibrate on images like those to come, or export floats"
            )
    return Comparison(agreement, accuracy, largest)


def _accuracies(name: str, targets: npt.NDArray[np.int64], *answers: npt.NDArray[np.int64]) -> tuple[float, float]:
    if len(targets) != len(answers[0]):
        raise ExportError(f"{len(answers[0])} {name} came with {len(targets)} targets; each image needs one")
    as_float, as_int8 = (float((found == targets).mean()) for found in answers)
    return as_float, as_int8
