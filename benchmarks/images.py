"""Whether an app gets the model's answers for photographs of every size, with each way of scaling them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image

from benchmarks import accuracy, datasets, machine, tables
from edge_dfcil import Learner
from edge_dfcil.errors import DataError
from edge_dfcil.recipe import dotted, find_recipe
from exporters import OnnxClassifier
from exporters.decoding import read_picture
from exporters.telemetry import runtime_library
from exporters.timing import session

FILE = "images.json"
PRESET = "pretrained-signs"
GRAPH, CLASSIFIER = 'ONNX file, input="any"', "`OnnxClassifier`"
# Heights and widths of camera photographs, crops and thumbnails; portrait and landscape, even and odd.
SIZES = (
    *((96, 96), (64, 64), (100, 100), (97, 131), (48, 80), (120, 160), (160, 120), (192, 192), (224, 224), (240, 320)),
    *((320, 240), (256, 341), (333, 500), (500, 333), (375, 500), (480, 640), (640, 480), (480, 854), (300, 900), (900, 300)),
    *((576, 768), (768, 576), (600, 800), (720, 1280), (1280, 720), (768, 1024), (1080, 1080), (1080, 1920), (1920, 1080)),
    (1944, 2592),
)

Probabilities = npt.NDArray[np.float32]
Way = Callable[[Image.Image], Probabilities]
Resize = Callable[[Image.Image, tuple[int, int]], npt.NDArray[np.uint8]]  # to (width, height)


def run(
    data: Path, model: Path | None, say: Callable[[str], None], sizes: tuple[tuple[int, int], ...] = SIZES, per_size: int = 10
) -> dict[str, Any]:
    """Compares the answers of every way of scaling with those of `Learner.predict`.

    Parameters
    ----------
    data
        A folder with train/ and test/, each with a folder of pictures for each class, or the folder that contains it.
    model
        A model file whose classes have the names of these folders; None learns `PRESET` first.
    per_size
        Photographs of each size; none of the test pictures is used twice before all are used.
    """
    folder = data / "sign_digits" if (data / "sign_digits").is_dir() else data
    learner = Learner.load(model, "cpu") if model is not None else _learnt(data, say)
    pictures = _pictures(folder / "test")
    with tempfile.TemporaryDirectory() as place:
        ways = _ways(learner, Path(place))
        asked = {name: list[Probabilities]() for name in ("learner", *ways)}
        truth, shapes = list[int](), list[str]()
        for height, width in sizes:
            say(f"{height} x {width}")
            for name, picture in (next(pictures) for _ in range(per_size)):
                photo = photograph(picture, height, width)
                truth.append(learner.classes.index(name))
                shapes.append(f"{height} x {width}")
                asked["learner"].append(learner.probabilities(photo).numpy()[0])
                for way, answer in ways.items():
                    asked[way].append(answer(photo))
    answers = {name: np.stack(rows) for name, rows in asked.items()}
    found = machine.provenance(torch.device("cpu"))
    found["versions"] |= _versions()
    return {
        "backbone": learner.backbone,
        "image_size": learner.image_size,
        "classes": len(learner.classes),
        "temperature": learner.model.temperature,
        "photographs": len(truth),
        "right": float((answers["learner"].argmax(1) == truth).mean()),
        "ways": {name: _beside(answers[name], answers["learner"], truth, shapes) for name in ways},
        **found,
    }


def photograph(picture: Image.Image, height: int, width: int) -> Image.Image:
    """A picture as a photograph of another size: it fills the centre square, and its mirror images the rest."""
    side = min(height, width)
    square = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
    while square.shape[:2] != (height, width):
        more = [min(side, want - have) for want, have in zip((height, width), square.shape[:2], strict=True)]
        square = np.pad(square, [*((size // 2, size - size // 2) for size in more), (0, 0)], mode="symmetric")
    return Image.fromarray(square)


def _learnt(data: Path, say: Callable[[str], None]) -> Learner:
    protocol = accuracy.find_preset(PRESET)
    loaded = datasets.load(data, protocol.dataset, protocol.image_size)
    learner = accuracy.new_learner(protocol, "abd", 0, find_recipe(protocol.recipe).changed(dotted(protocol.changes)), "cpu")
    order = datasets.class_order(len(loaded.names), 0)[: protocol.classes]
    size = protocol.classes // protocol.tasks
    for task in range(protocol.tasks):
        say(f"task {task + 1} of {protocol.tasks}")
        classes = order[task * size : (task + 1) * size]
        learner.learn_task(accuracy.training(protocol, loaded, classes, 0), loaded.names, progress=False)
    return learner


def _pictures(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    """Pictures of all classes in turns, with the names of their classes, without end."""
    classes = {path.name: sorted(file for file in path.iterdir() if file.is_file()) for path in sorted(folder.iterdir())}
    if not classes or not all(classes.values()):
        raise DataError(f"{folder} must contain a folder of pictures for each class")
    number = 0
    while True:
        for name, files in classes.items():
            yield name, read_picture(files[number % len(files)])
        number += 1


def _ways(learner: Learner, folder: Path) -> dict[str, Way]:
    size = learner.image_size
    for kind in ("fixed", "any"):
        learner.export(folder / f"{kind}.onnx", input=kind)
    free, fixed = (session(str(folder / f"{kind}.onnx")) for kind in ("any", "fixed"))
    classifier = OnnxClassifier(folder / "fixed.onnx")

    def ask(graph: Any, pixels: npt.NDArray[np.uint8]) -> Probabilities:
        images = np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]
        found: Probabilities = graph.run(["probabilities"], {"images": images})[0][0]
        return found

    def cropped(resize: Resize) -> Way:
        def way(photo: Image.Image) -> Probabilities:
            scale = size / min(photo.size)
            width, height = (max(size, round(side * scale)) for side in photo.size)
            left, top = (width - size) // 2, (height - size) // 2
            return ask(fixed, resize(photo, (width, height))[top : top + size, left : left + size])

        return way

    def squeezed(resize: Resize) -> Way:
        return lambda photo: ask(fixed, resize(photo, (size, size)))

    found: dict[str, Way] = {
        GRAPH: lambda photo: ask(free, np.asarray(photo)),
        CLASSIFIER: lambda photo: classifier.probabilities(photo)[0],
    }
    resizes = _resizes()
    found |= {f"{name}, scaled and cropped": cropped(resize) for name, resize in resizes.items()}
    return found | {f"{name}, squeezed": squeezed(resize) for name, resize in resizes.items()}


def _resizes() -> dict[str, Resize]:
    """The resize functions of the libraries that apps use."""

    def pillow(kind: Image.Resampling) -> Resize:
        return lambda photo, size: np.asarray(photo.resize(size, kind))

    def opencv(cv2: Any, kind: str) -> Resize:
        return lambda photo, size: cv2.resize(np.asarray(photo), size, interpolation=getattr(cv2, kind))

    found = {f"Pillow {kind.name}": pillow(kind) for kind in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)}
    if (cv2 := _opencv()) is not None:
        found |= {f"OpenCV {kind}": opencv(cv2, kind) for kind in ("INTER_LINEAR", "INTER_AREA")}
    return found


def _opencv() -> Any:
    """The module where it is installed, else None."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def _versions() -> dict[str, str]:
    found = {"onnxruntime": runtime_library().__version__, "pillow": PIL.__version__}
    return found if (cv2 := _opencv()) is None else found | {"opencv": cv2.__version__}


def _beside(found: Probabilities, expected: Probabilities, truth: list[int], shapes: list[str]) -> dict[str, Any]:
    """How far answers are from the learner's: all together, and the largest difference of a probability by size."""
    apart = np.abs(found - expected).max(1)
    by_size = {shape: float(apart[np.array(shapes) == shape].max()) for shape in dict.fromkeys(shapes)}
    return {
        "right": float((found.argmax(1) == truth).mean()),
        "same": float((found.argmax(1) == expected.argmax(1)).mean()),
        "median": float(np.median(apart)),
        "largest": float(apart.max()),
        "largest_by_size": by_size,
    }


def describe(found: dict[str, Any]) -> str:
    """The findings as Markdown, a row for each way."""
    sizes = list(next(iter(found["ways"].values()))["largest_by_size"])
    text = (
        f"{found['photographs']} photographs of {len(sizes)} sizes, {sizes[0]} to {sizes[-1]}, made of test pictures of "
        f"{found['classes']} classes: each fills the centre square, and its mirror images the rest. {found['backbone']} at "
        f"{found['image_size']} pixels; `Learner.predict` is right on {tables.percent(found['right'])} %. Differences are of a "
        "probability from the learner's, over all classes. Below the first two rows, the app scales for a file of squares."
    )
    head = ["way", "right, %", "answers as the learner, %", "median difference", "largest difference"]
    rows = []
    for name, way in found["ways"].items():
        shown = [_small(way[key]) for key in ("median", "largest")]
        rows.append([name, tables.percent(way["right"]), tables.percent(way["same"]), *shown])
    return f"{text}\n\n{tables.table(head, rows)}"


def _small(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}" if value else "0"
