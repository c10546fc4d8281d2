"""Dreams in one picture: a contact sheet with a row for each class."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from edge_dfcil.errors import SettingError

TEXT_SIZE = 14  # pixels
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def check_drawable(path: Path) -> None:
    """Raises `SettingError` for a path to which no picture can be written. To be called before a picture is made."""
    if not path.parent.is_dir():
        raise SettingError(f"{path.parent} is not a folder; make it first")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise SettingError(f"{path} does not have the ending of a picture format that can be written; name it .png")


def contact_sheet(images: Tensor, labels: Sequence[str], names: Sequence[str], columns: int) -> Image.Image:
    """One picture of uint8 images (N, 3, S, S): a row for each name, with the name in front, at most `columns` images a row.

    A name is written in a font of this system that has all its characters; otherwise missing characters are written as their
    code (`\\u043a`), so that different names look different.
    """
    side, gap, zoom = images.shape[-1], 2, max(1, 64 // images.shape[-1])
    cell = side * zoom + gap
    texts = [writable(name) for name in names]
    margin = int(max((font.getlength(text) for text, font in texts), default=0)) + 12
    sheet = Image.new("RGB", (margin + columns * cell, len(names) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, (text, font)) in enumerate(zip(names, texts, strict=True)):
        draw.text((6, row * cell + cell // 2), text, "black", font, anchor="lm")
        mine = [index for index, label in enumerate(labels) if label == name][:columns]
        for column, index in enumerate(mine):
            tile = T.to_pil_image(images[index]).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * cell, row * cell))
    return sheet


# Fonts


def writable(name: str) -> tuple[str, Font]:
    """A name as it can be written, and the font to write it with: the one that lacks the fewest characters."""
    best = min(_fonts(name), key=lambda font: sum(not _has(font, character) for character in name))
    return "".join(c if _has(best, c) else c.encode("unicode_escape").decode() for c in name), best


def _fonts(name: str) -> Iterator[Font]:
    """Pillow's own font, which has Latin letters; for other names those of matplotlib and of the system as well."""
    own = ImageFont.load_default(TEXT_SIZE)
    yield own
    if all(_has(own, character) for character in name):
        return
    for path in (_font_of_matplotlib(), _font_of_system("".join(sorted(set(name))))):
        if path is not None:
            try:
                yield ImageFont.truetype(path, TEXT_SIZE)
            except OSError:  # a bitmap font, which has fixed sizes
                continue


def _has(font: Font, character: str) -> bool:
    """Whether a font draws a character; a missing character is drawn like one that does not exist."""
    if not character.isprintable():
        return False
    if character.isspace():
        return True
    return bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))


def _font_of_matplotlib() -> str | None:
    """DejaVu Sans (Latin, Greek, Cyrillic, Arabic, ...), a file of matplotlib, which is not imported for that."""
    found = importlib.util.find_spec("matplotlib")
    path = Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf" if found is not None and found.origin else None
    return str(path) if path is not None and path.is_file() else None


@functools.lru_cache
def _font_of_system(characters: str) -> str | None:
    """The file of the font that fontconfig, if it is installed, chooses for these characters."""
    if shutil.which("fc-match") is None:
        return None
    pattern = ":charset=" + " ".join(f"{ord(character):x}" for character in characters)
    try:
        done = subprocess.run(["fc-match", "-f", "%{file}", pattern], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout or None
