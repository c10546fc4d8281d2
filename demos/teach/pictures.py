"""Pictures that the page sends, decoded within limits, and the ready pictures of the server."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from edge_dfcil import DataError
from edge_dfcil.demo import NAMES, Batches, digits
from edge_dfcil.model.pictures import open_folder, to_image
from exporters.decoding import to_rgb

MAX_BYTES = 16 * 2**20  # of one picture
MAX_PIXELS = 2**25  # of one picture: 33 megapixels, decoded in about 130 MB
TOO_MANY = f"the picture has too many pixels, at most {MAX_PIXELS:,} are allowed; scale it down"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
HELD_BACK = 5  # every fifth picture of a class in a folder is held back for measuring
MAX_HELD_BACK = 40  # per class: measuring happens after every commit and has to be quick
MAX_OF_FOLDER = 500  # per class: a folder's pictures stay in memory


def decode(content: bytes) -> Image.Image:
    """An uploaded picture as upright RGB.

    Raises `DataError` for content that is not a picture in one of `FORMATS`, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # larger ones are refused below, undecoded
            picture = Image.open(BytesIO(content), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise DataError(TOO_MANY)
        return to_rgb(picture)
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit
        raise DataError(TOO_MANY) from error
    except Exception as error:  # Pillow's decoders raise exceptions of many types for damaged files
        kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise DataError(f"this is not a picture that can be read; send a whole {kinds} file") from error


def square(content: bytes, size: int) -> Tensor:
    """An uploaded picture as a uint8 image (3, size, size). Raises as `decode`."""
    return to_image(decode(content), size)


@dataclass(frozen=True)
class Ready:
    """Labelled pictures that the page offers for teaching, and measures with. They belong to the demo, not to a task.

    Attributes
    ----------
    title
        The source of the pictures, as the page shows it.
    train, test
        By class name: uint8 images (N, 3, S, S) to teach, and others to measure with.
    """

    title: str = ""
    train: Mapping[str, Tensor] = field(default_factory=dict)
    test: Mapping[str, Tensor] = field(default_factory=dict)


def ready_digits() -> Ready:
    """scikit-learn's handwritten digits, which need no network and no camera."""
    train, test = digits()

    def by_name(part: Batches) -> dict[str, Tensor]:
        return {name: part.of((name,)).images for name in NAMES}

    return Ready("scikit-learn's handwritten digits", by_name(train), by_name(test))


def ready_folder(path: Path, size: int) -> Ready:
    """A folder of class folders, read once. Raises `DataError` and `ClassError` as `open_folder`."""
    dataset: Any = open_folder(path, size, shuffle=False).loader.dataset
    found: dict[str, list[Tensor]] = {name: [] for name in dataset.classes}
    for index, target in enumerate(dataset.targets):
        pictures = found[dataset.classes[target]]
        if len(pictures) < MAX_OF_FOLDER:
            pictures.append(dataset[index][0])
    train, test = {}, {}
    for name, pictures in found.items():
        held = set(range(HELD_BACK - 1, len(pictures), HELD_BACK)[:MAX_HELD_BACK])
        train[name] = torch.stack([picture for place, picture in enumerate(pictures) if place not in held])
        if held:
            test[name] = torch.stack([pictures[place] for place in sorted(held)])
    return Ready(f"the folder {path.resolve().name}", train, test)
