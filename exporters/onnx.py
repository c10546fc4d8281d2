"""A classifier as one ONNX file: plain pixels in, probabilities out, names inside; checked before it is written."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_dfcil.errors import ExportError
from exporters.files import replace_file
from exporters.int8 import Int8, compare, quantize
from exporters.timing import latencies, session

if TYPE_CHECKING:
    from torch import nn

OPSET = 18
FORMAT = "edge-dfcil/1"
TOLERANCE = 1e-4  # largest difference of a probability between the file and the model
CHECKED_BATCHES = (1, 7)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it was from the model on the images it was checked with.

    Attributes
    ----------
    format
        "onnx", or "onnx-int8".
    bytes
        Size of the file.
    max_difference
        Largest difference of a probability between the file and the model, over all images it was checked with.
    float_bytes
        Size that the file would have without quantization.
    agreement
        Of an INT8 file: share of images for which it answers as the model does, by set of images ("dreams", "pictures").
    accuracy
        Of an INT8 file: share of right answers of the model and of the file, for sets whose answers are known.
    speedup
        Of an INT8 file: seconds of the float graph for one image over its own, on this machine with one thread.
    """

    path: str
    format: str
    opset: int
    classes: int
    image_size: int
    bytes: int
    max_difference: float
    source_sha256: str
    seconds: float
    float_bytes: int
    agreement: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, tuple[float, float]] = field(default_factory=dict)
    speedup: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_onnx(
    classifier: nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str],
    image_size: int,
    source_sha256: str = "",
    version: str = "",
    int8: Int8 | None = None,
) -> ExportReport:
    """Writes a classifier as ONNX, opset 18: input `images` uint8 (N, 3, S, S) with N free, output `probabilities` (N, C).

    Parameters
    ----------
    classifier
        uint8 images (N, 3, S, S) to logits (N, C), preprocessing included; on the CPU, in eval mode.
    classes
        C names.
    source_sha256, version
        Of the model that it was made from; kept in the file's metadata.
    int8
        Images to calibrate a static INT8 quantization with and to check it on; None writes floats.

    Raises
    ------
    ExportError
        When the graph cannot be made, disagrees with the classifier by 1e-4 or in an answer, or cannot be written; or when
        the INT8 graph gives another answer than the float one for more than a tenth of a set of images. Nothing is written
        then.
    """
    begin, path = time.perf_counter(), Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path.parent} is not a folder; make it first")
    content = _graph(
        classifier, image_size, {"classes": json.dumps(list(classes)), "source_sha256": source_sha256, "version": version}
    )
    difference = _disagreement(content, classifier, image_size)
    report = ExportReport(
        str(path), "onnx", OPSET, len(classes), image_size, len(content), difference, source_sha256, 0.0, len(content)
    )
    if int8 is not None:
        content, report = _quantized(content, report, int8)
    try:
        replace_file(path, content)
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {error.strerror or error}; what was there before is untouched"
        ) from error
    return replace(report, seconds=time.perf_counter() - begin)


def _quantized(content: bytes, report: ExportReport, setting: Int8) -> tuple[bytes, ExportReport]:
    """The graph in INT8, compared with the float one, and the report of it."""
    small = quantize(content, setting)
    found = compare(content, small, setting)
    seconds = latencies({"float": content, "int8": small}, report.image_size)
    return small, replace(
        report,
        format="onnx-int8",
        bytes=len(small),
        max_difference=max(report.max_difference, found.max_difference),
        agreement=found.agreement,
        accuracy=found.accuracy,
        speedup=seconds["float"] / seconds["int8"],
    )


def _graph(classifier: nn.Module, image_size: int, metadata: dict[str, str]) -> bytes:
    import torch

    class Serving(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = classifier

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.classifier(images).softmax(1)

    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Serving().eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many kinds; its message is the useful part
        raise ExportError(f"torch could not write this network as ONNX: {str(error).splitlines()[0]}") from error
    finally:
        quiet.setLevel(level)
    assert program is not None
    model = program.model_proto
    for key, value in {"format": FORMAT, "image_size": str(image_size), **metadata}.items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    return content


def _disagreement(content: bytes, classifier: nn.Module, image_size: int) -> float:
    """The largest difference of a probability between graph and classifier. Raises `ExportError` if they disagree."""
    import torch

    graph = session(content)
    random, largest = np.random.default_rng(0), 0.0
    for n in CHECKED_BATCHES:
        # Flat colours and noise: smooth and rough images, dark to light.
        images = random.integers(0, 256, (n, 3, 1, 1)) + random.integers(-64, 65, (n, 3, image_size, image_size))
        images = images.clip(0, 255).astype(np.uint8)
        (exported,) = graph.run(["probabilities"], {"images": images})
        with torch.inference_mode():
            expected = classifier(torch.from_numpy(images)).softmax(1).numpy()
        difference = float(np.abs(exported - expected).max()) if exported.shape == expected.shape else float("inf")
        if not difference < TOLERANCE or (exported.argmax(1) != expected.argmax(1)).any():
            raise ExportError(
                f"the exported graph disagrees with the model on a batch of {n}: probabilities differ by {difference:.2g}, "
                f"{TOLERANCE:g} is allowed. Nothing was written"
            )
        largest = max(largest, difference)
    return largest
