"""Exports a classifier as one ONNX file, from pixels to probabilities, with class names; checked before it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters import resize
from exporters.checks import Fit, Run, max_difference, max_difference_at_sizes
from exporters.errors import ExportError
from exporters.int8 import Int8, count, quantize
from exporters.registry import About, Artifact, ExportReport, export, register_exporter
from exporters.scaling import for_any_size, scaling_graph
from exporters.seals import IR_VERSION, seal
from exporters.timing import latencies, session
from exporters.tracing import metadata, serving, tracing
from exporters.values import is_one_of

if TYPE_CHECKING:
    from torch import nn

OPSET = 18
FORMAT = "edge-dfcil/2"  # from 2 on a file is sealed
INPUTS = ("fixed", "any")


def export_onnx(
    classifier: nn.Module,
    path: str | Path,
    *,
    classes: Sequence[str],
    image_size: int,
    source_sha256: str = "",
    version: str = "",
    int8: Int8 | None = None,
    input: str = "fixed",
) -> ExportReport:
    """`exporters.export` with format="onnx"; `int8` and `input` are those of `exporters.onnx.to_onnx`, with its errors."""
    about: dict[str, Any] = {"source_sha256": source_sha256, "version": version}
    return export(classifier, path, format="onnx", classes=classes, image_size=image_size, int8=int8, input=input, **about)


def to_onnx(
    classifier: nn.Module,
    about: About,
    *,
    int8: Int8 | None = None,
    on_batch: Callable[[int, int | None], None] | None = None,
    input: str = "fixed",
    fit: Fit = resize.fit,
) -> Artifact:
    """ONNX, opset 18: input `images` uint8 (N, 3, S, S) or (N, 3, H, W) with N free, output `probabilities` (N, C).

    Parameters
    ----------
    int8
        Images to calibrate a static INT8 quantization with and to check it on; None writes floats.
    on_batch
        For INT8: called after every batch with the number of images read and the number of all images, None if the sets do not
        say. What it raises ends the export.
    input
        "fixed": images are squares of S pixels. "any": H and W are free as well, and the graph scales and crops; it is checked
        with images of many sizes.
    fit
        For "any": how the classifier's images are scaled and cropped, called as `exporters.resize.fit`.

    Raises
    ------
    ExportError
        When the graph cannot be made, or a probability differs from the classifier's by 1e-4; when a pixel that it scales differs
        from that of `fit` by more than 1/255; when the INT8 graph gives another answer than the float one for more than a
        tenth of a set of images, or loses a point of accuracy on one whose answers are known; or when it is not faster than the
        float graph on this machine, unless `int8.force`.
    """
    check_input(input)
    made, answer = _of_squares(classifier, about, int8, on_batch)
    made = made if input == "fixed" else _of_any_size(made, answer, about, fit)
    return replace(made, content=seal(made.content))


def check_input(input: str) -> None:
    """Raises `ExportError` unless it is one of `INPUTS`."""
    if not is_one_of(input, INPUTS):
        raise ExportError(
            f"input={input!a:.80} is not known; pass 'any' for images of every size, or 'fixed' for squares of one size"
        )


def _of_squares(
    classifier: nn.Module, about: About, int8: Int8 | None, on_batch: Callable[[int, int | None], None] | None
) -> tuple[Artifact, Run]:
    """A checked file for squares of S pixels, and a function that gives the expected probabilities."""
    content = _graph(classifier, about)
    difference = max_difference(_runner(content), classifier, about.image_size)
    if int8 is None:
        return Artifact(content, difference, opset=OPSET), _asked(classifier)
    advance = _counter(on_batch, int8)
    small, attempt, found = quantize(content, int8, advance)
    seconds = latencies({"float": content, "int8": small}, about.image_size)
    speedup = seconds["float"] / seconds["int8"]
    if speedup <= 1 and not int8.force:
        raise ExportError(
            f"the INT8 graph takes {1 / speedup:.2f} times as long as the float one on this machine, and would be "
            f"{len(small) / len(content):.0%} of its size. Nothing was written. Export floats, or pass force=True (--force) "
            "for a smaller file, or for a device with integer dot products (x86 with VNNI, Arm from v8.2), where it may be faster"
        )
    made = Artifact(
        small,
        max(difference, found.max_difference),
        format="onnx-int8",
        opset=OPSET,
        float_bytes=len(content),
        agreement=found.agreement,
        accuracy=found.accuracy,
        speedup=speedup,
        quantization=str(attempt),
    )
    return made, _runner(small)


def _of_any_size(made: Artifact, answer: Run, about: About, fit: Fit) -> Artifact:
    """A file for squares as one for images of every size, checked with many."""
    content, size = for_any_size(made.content, about.image_size), about.image_size
    scale = _runner(scaling_graph(size).SerializeToString())
    difference = max_difference_at_sizes(_runner(content), scale, answer, size, fit)
    more = len(content) - len(made.content)
    float_bytes = None if made.float_bytes is None else made.float_bytes + more
    assert made.max_difference is not None  # an ONNX file is always compared
    highest = max(made.max_difference, difference)
    return replace(made, content=content, max_difference=highest, float_bytes=float_bytes, input="any")


def _runner(content: bytes) -> Run:
    """A function from `images` to a graph's only output."""
    graph = session(content)
    return lambda images: graph.run(None, {"images": images})[0]


def _asked(classifier: nn.Module) -> Run:
    """A function from images to the classifier's probabilities."""
    import torch

    @torch.inference_mode()
    def answer(images: Any) -> Any:
        return classifier(torch.from_numpy(images)).softmax(1).numpy()

    return answer


def _counter(on_batch: Callable[[int, int | None], None] | None, setting: Int8) -> Callable[[int], None]:
    """Adds up the images of calibration and checks for a progress bar."""
    parts = [count(images) for images in (setting.calibration, *setting.checks.values())]
    total = None if None in parts else sum(part for part in parts if part is not None)
    done = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if on_batch is not None:
            on_batch(done, total)

    return advance


def _graph(classifier: nn.Module, about: About) -> bytes:
    model = _traced(classifier, about.image_size)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset != OPSET:
        raise ExportError(f"torch wrote ONNX opset {opset} instead of {OPSET} for this network")
    model.ir_version = min(model.ir_version, IR_VERSION)
    for key, value in metadata(about, FORMAT).items():
        model.metadata_props.add(key=key, value=value)
    content: bytes = model.SerializeToString()
    return content


def _traced(classifier: nn.Module, image_size: int) -> Any:
    """The network with a softmax at its end as torch's exporter writes it, an `onnx.ModelProto`."""
    import torch

    example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    with tracing("ONNX"):
        program = torch.onnx.export(
            serving(classifier),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            verbose=False,
        )
    assert program is not None
    return _without_traces(program.model_proto)


def _without_traces(model: Any) -> Any:
    """Removes torch's notes on each operation: stack traces, which contain paths of the machine that exported."""
    for entry in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del entry.metadata_props[:]
    return model


register_exporter("onnx", ".onnx", to_onnx)
