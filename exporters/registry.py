"""Export formats by name, and what they share: which file may be written, the report, writing all or nothing.

A format is one function from a classifier to an `Artifact`, registered under a name and the ending of its files:

    def to_mine(classifier, about):
        content = ...
        return Artifact(content, max_difference(lambda images: run(content, images), classifier, about.image_size))

    register_exporter("mine", ".mine", to_mine)
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.errors import ExportError
from exporters.files import check_writable, replace_file, resolve
from exporters.values import is_one_of

if TYPE_CHECKING:
    from torch import nn

# What to do instead, by the ending of a file that no format writes.
_HINTS = {".mlpackage": "a Core ML package is a folder; write a Core ML model in one file, .mlmodel"}
MAX_HEADER = 100_000_000  # bytes; no safetensors file has more


@dataclass(frozen=True)
class About:
    """The metadata of an exported file.

    Attributes
    ----------
    classes
        The names of the C outputs, in order.
    image_size
        S, the side in pixels of the square that the network sees.
    source_sha256, version
        The SHA-256 of the model file that it was made from, and the version of the package.
    temperature
        The classifier divides its logits by it; for information, since its answers include it.
    thresholds
        Of each class, for `exporters.rejection`; empty if there are none.
    """

    classes: tuple[str, ...]
    image_size: int
    source_sha256: str = ""
    version: str = ""
    temperature: float = 1.0
    thresholds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """What an exporter returns.

    Attributes
    ----------
    content
        The bytes of the file.
    max_difference
        Largest difference of a probability from the classifier's: every exporter compares before it returns, most simply with
        `exporters.checks.max_difference`. None if the format runs only on other systems, and the caller asked for a file that is
        not compared.
    format
        The name in the report; empty takes the format's name.
    input
        "fixed" or "any", as in `ExportReport`.
    opset, float_bytes, agreement, accuracy, speedup, quantization
        As in `ExportReport`, for formats that have them.
    """

    content: bytes
    max_difference: float | None
    format: str = ""
    input: str = "fixed"
    opset: int | None = None
    float_bytes: int | None = None
    agreement: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, tuple[float, float]] = field(default_factory=dict)
    speedup: float | None = None
    quantization: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and its largest difference from the model on the images it was checked with.

    Attributes
    ----------
    format
        "onnx", "onnx-int8", or the name of another registered format.
    opset
        Of an ONNX file; None for other formats.
    classes, image_size
        The number of classes, and the side in pixels of the square that the network sees.
    bytes
        Size of the file.
    max_difference
        Largest difference of a probability between the file and the model, over all images it was checked with; None for a file
        that could not be checked on this machine.
    source_sha256
        SHA-256 of the model; empty if it was not given.
    seconds
        Duration of the export.
    float_bytes
        Size in bytes that the file would have without quantization.
    agreement
        For an INT8 file: share of images for which it answers as the model does, by set of images ("dreams", "pictures").
    accuracy
        For an INT8 file: share of right answers of the model and of the file, for sets whose answers are known.
    speedup
        For an INT8 file: the float graph's time for one image divided by its own, on this machine with one thread.
    quantization
        For an INT8 file: which weights share a scale, and whether the head stays in floats.
    input
        "fixed" for a file that takes only squares of `image_size` pixels, "any" for one that scales and crops itself.
    """

    path: str
    format: str
    opset: int | None
    classes: int
    image_size: int
    bytes: int
    max_difference: float | None
    source_sha256: str
    seconds: float
    float_bytes: int
    agreement: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, tuple[float, float]] = field(default_factory=dict)
    speedup: float | None = None
    input: str = "fixed"
    quantization: str = ""

    def __str__(self) -> str:
        """The file, how far it is from the model, and for INT8 its size, speed and answers compared with floats."""
        difference = self.max_difference
        compared = (
            "not compared with the model" if difference is None else f"probabilities within {difference:.1g} of the model's"
        )
        lines = [f"{self.path}: {self.classes} classes, {self.bytes} bytes, {compared}"]
        if self.input == "any":
            lines.append(f"takes images of every size, and scales and crops them to {self.image_size} x {self.image_size} pixels")
        if self.speedup is not None:
            size = f"{self.bytes / self.float_bytes:.0%} of the float file's size"
            lines.append(f"{size}, {self.speedup:.1f} times as fast; {self.quantization}")
            lines += [f"answers as the model does for {share:.1%} of the {name}" for name, share in self.agreement.items()]
            lines += [f"accuracy on the {n}: {before:.1%} as float, {after:.1%}" for n, (before, after) in self.accuracy.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Exporter:
    """A registered format."""

    name: str
    ending: str
    export: Callable[..., Artifact]

    def check_options(self, names: Iterable[str]) -> None:
        """Raises `ExportError` for the name of an option that the format does not take."""
        for name in names:
            if not self.takes(name):
                others = " or ".join(repr(one.name) for one in _EXPORTERS.values() if one.takes(name))
                hint = f"; pass format={others}" if others else ""
                raise ExportError(f"the format {self.name!r} does not take {name!a:.80}{hint}. Nothing was written")

    def takes(self, option: str) -> bool:
        """Whether `export` has a keyword of this name."""
        parameters = inspect.signature(self.export).parameters
        return option in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


_EXPORTERS: dict[str, Exporter] = {}


def register_exporter(name: str, ending: str, export: Callable[..., Artifact]) -> None:
    """Adds a format, or replaces the one of that name. Raises `ExportError` for an ending that it cannot have.

    Parameters
    ----------
    name
        The value for `format=`.
    ending
        Of its files, such as ".onnx"; no other format may have it.
    export
        Called with the classifier, an `nn.Module` on the CPU in eval mode from uint8 images (N, 3, S, S) to logits (N, C), an
        `About`, and the options that the caller passed by name. It raises `ExportError` when it cannot make the file, or
        when what it made disagrees with the classifier.
    """
    if not ending.startswith(".") or ending.lower() == ".safetensors":
        raise ExportError(f"ending={ending!r}; it must begin with a dot, and .safetensors is the ending of model files")
    for other in _EXPORTERS.values():
        if other.ending == ending.lower() and other.name != name:
            raise ExportError(f"{ending} is the ending of the format {other.name!r} already")
    _EXPORTERS[name] = Exporter(name, ending.lower(), export)


def list_exporters() -> dict[str, str]:
    """The ending of every registered format, by its name."""
    return {exporter.name: exporter.ending for exporter in _EXPORTERS.values()}


def find_exporter(path: str | os.PathLike[str], format: str | None = None) -> Exporter:
    """The format of that name; with None the one whose ending the path has, ONNX for a path without an ending.

    Raises `ExportError` for a name or an ending that is not known, and for a path with the ending of another format.
    """
    known = ", ".join(f"{name} ({ending})" for name, ending in list_exporters().items())
    if not isinstance(path, (str, os.PathLike)):
        raise ExportError(f"path={path!a:.80} is a {type(path).__name__}; pass the path of a file. Nothing was written")
    ending = Path(path).suffix.lower()
    if format is None:
        found = [exporter for exporter in _EXPORTERS.values() if exporter.ending == (ending or ".onnx")]
        if not found:
            hint = _HINTS.get(ending, f"there are {known}")
            raise ExportError(f"{path}: no format has the ending {ending!r}; {hint}. Nothing was written")
        return found[0]
    if not is_one_of(format, _EXPORTERS):
        raise ExportError(f"format={format!a:.80} is not known; there are {known}. Nothing was written")
    exporter = _EXPORTERS[format]
    if ending not in ("", exporter.ending):
        raise ExportError(f"{path} has the ending {ending!r}, a file of the format {format!r} has {exporter.ending!r}: rename it")
    return exporter


def check_target(path: str | Path, source: str | Path | None = None) -> None:
    """Raises `ExportError` when an export must not, or cannot, be written to a path.

    It must not replace `source`, the file of the model that is exported, nor any other file of edge-dfcil.
    """
    try:
        check_writable(path)
        target = resolve(path)
        if source is not None and target == Path(os.path.realpath(source)):
            raise ExportError(f"{path} is the model itself, which stays as it is; name another file")
        if is_model_file(target):
            raise ExportError(f"{path} is an edge-dfcil model file, which an export must not replace; name another file")
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


def is_model_file(path: Path) -> bool:
    """Whether edge-dfcil wrote this file as a model or a checkpoint; also for a damaged file whose header is intact."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length < MAX_HEADER else b""
    try:
        return "edge_dfcil" in json.loads(header)["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def export(
    classifier: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    classes: Sequence[str],
    image_size: int,
    source: str | Path | None = None,
    source_sha256: str = "",
    version: str = "",
    temperature: float = 1.0,
    thresholds: Sequence[float] = (),
    **options: Any,
) -> ExportReport:
    """Writes a classifier in a registered format, all or nothing, after the format has checked it against the classifier.

    Parameters
    ----------
    classifier
        uint8 images (N, 3, S, S) to logits (N, C), preprocessing included; on the CPU.
    format
        "onnx" or the name of another registered format; None chooses by the ending of the path, and ONNX if it has none.
    classes
        C names.
    image_size
        S, in pixels.
    source
        The file of the model, which must not be overwritten.
    source_sha256, version
        The SHA-256 of the model that it was made from, and the version of the package; kept in the file's metadata.
    temperature, thresholds
        Kept in the file's metadata, for rejection; C thresholds, or none.
    **options
        The format's own: for ONNX `int8`, `on_batch`, `input` and `fit`, see `exporters.onnx.to_onnx`; for Core ML `unchecked`.

    Raises
    ------
    ExportError
        When the path has the ending of no format, or is a model file, a folder or a device; when the file cannot be made,
        disagrees with the classifier, or cannot be written. An existing file at the path is then unchanged.
    """
    begin = time.perf_counter()
    exporter = find_exporter(path, format)
    check_target(path, source)
    about = About(tuple(classes), image_size, source_sha256, version, temperature, tuple(thresholds))
    exporter.check_options(options)
    try:
        inspect.signature(exporter.export).bind(classifier, about, **options)
    except TypeError as error:  # an option of the format is missing, or has the name of one of the first two
        raise ExportError(f"the format {exporter.name!r} does not take these options ({error})") from error
    with _in_eval_mode(classifier):
        made = exporter.export(classifier, about, **options)
    check_target(path, source)  # again: making it may have taken minutes
    try:
        replace_file(path, made.content)
    except OSError as error:
        raise ExportError(f"{path} could not be written: {error.strerror or error}; the existing file is unchanged") from error
    return ExportReport(
        path=str(path),
        format=made.format or exporter.name,
        opset=made.opset,
        classes=len(about.classes),
        image_size=image_size,
        bytes=len(made.content),
        max_difference=made.max_difference,
        source_sha256=source_sha256,
        seconds=time.perf_counter() - begin,
        float_bytes=made.float_bytes if made.float_bytes is not None else len(made.content),
        agreement=made.agreement,
        accuracy=made.accuracy,
        speedup=made.speedup,
        input=made.input,
        quantization=made.quantization,
    )


@contextlib.contextmanager
def _in_eval_mode(classifier: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in classifier.modules()}
    classifier.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


# The formats of this package register themselves. They import this module, so they come last.
importlib.import_module("exporters.onnx")
for _file in pkgutil.iter_modules(importlib.import_module("exporters.formats").__path__, "exporters.formats."):
    importlib.import_module(_file.name)
