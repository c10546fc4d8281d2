"""INT8: static quantization of an exported graph by ONNX Runtime, calibrated on images, checked against the float graph.

Weights get a scale a channel, activations one a tensor (QDQ form). Weights use seven of their eight bits: x86 CPUs without
VNNI add products in 16 bits, which eight would overflow, and what ships must answer everywhere as it was measured here.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_dfcil.errors import ExportError
from exporters.timing import session

AGREEMENT = 0.9  # share of images, of each set it is checked on, whose answer must be that of the float graph
BATCH = 32

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Int8:
    """What a graph is quantized with.

    Attributes
    ----------
    calibration
        Images (N, 3, S, S) from which the ranges of activations are taken.
    checks
        Images that both graphs are asked about, by the name of their set.
    targets
        The right outputs (N,) of those sets that have them.
    widening
        Factor by which the ranges read from `calibration` are widened: above 1 where the images to come reach further than
        those, below which what they exceed the ranges by would be cut off.
    """

    calibration: Images
    checks: Mapping[str, Images]
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


def quantize(graph: bytes, setting: Int8) -> bytes:
    """The graph in INT8. Raises `ExportError` when ONNX Runtime cannot quantize it."""
    import onnx
    from onnxruntime import quantization

    if not len(setting.calibration):
        raise ExportError("there is no image to calibrate on; pass calibration=None to calibrate on dreams")
    metadata = {entry.key: entry.value for entry in onnx.load_from_string(graph).metadata_props}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, prepared, quantized = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        plain.write_bytes(graph)
        try:
            # Folds BatchNorm into convolutions and infers the shapes.
            quantization.quant_pre_process(str(plain), str(prepared))
            ranges = _ranges(prepared, setting.calibration, setting.widening)
            quantization.quantize_static(
                str(prepared),
                str(quantized),
                _reader(setting.calibration[:1]),  # has to be given, but every range is
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                reduce_range=True,
                extra_options={"TensorQuantOverrides": ranges},
            )
            model = onnx.load(str(quantized))
        except Exception as error:  # onnxruntime raises many kinds; its message is the useful part
            raise ExportError(f"ONNX Runtime could not quantize this graph: {str(error).splitlines()[0]}") from error
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    return content


def _ranges(prepared: Path, calibration: Images, widening: float) -> dict[str, list[dict[str, Any]]]:
    """The smallest and the largest value of every activation, widened, by its name."""
    from onnxruntime import quantization

    calibrator = quantization.create_calibrator(prepared, augmented_model_path=str(prepared.with_name("calibrate.onnx")))
    calibrator.collect_data(_reader(calibration))

    def wide(value: Any) -> np.float32:
        return np.float32(widening * np.asarray(value).item())

    found = {name: values.range_value for name, values in calibrator.compute_data().data.items()}
    return {name: [{"rmin": wide(low), "rmax": wide(high)}] for name, (low, high) in found.items()}


def _reader(images: Images) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(np.array_split(images, -(-len(images) // BATCH)))

        def get_next(self) -> dict[str, Images] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantizer advises on the root logger what has been done already."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def compare(graph: bytes, quantized: bytes, setting: Int8) -> Comparison:
    """Asks both graphs about every set of images. Raises `ExportError` when they agree on too few of one."""
    ours, theirs = session(quantized), session(graph)
    agreement, accuracy, largest = {}, {}, 0.0
    for name, images in setting.checks.items():
        found, expected = (_probabilities(one, images) for one in (ours, theirs))
        answers, right = found.argmax(1), expected.argmax(1)
        agreement[name] = float((answers == right).mean())
        largest = max(largest, float(np.abs(found - expected).max()))
        if name in setting.targets:
            targets = setting.targets[name]
            accuracy[name] = float((right == targets).mean()), float((answers == targets).mean())
        if agreement[name] < AGREEMENT:
            raise ExportError(
                f"the INT8 graph gives another answer than the model for {1 - agreement[name]:.1%} of the {len(images)} {name}, "
                f"{1 - AGREEMENT:.0%} is allowed. Nothing was written. Calibrate on images like those to come, or export floats"
            )
    return Comparison(agreement, accuracy, largest)


def _probabilities(one: Any, images: Images) -> npt.NDArray[np.float32]:
    batches = np.array_split(images, -(-len(images) // BATCH))
    return np.concatenate([one.run(["probabilities"], {"images": batch})[0] for batch in batches])
