"""Dreams on one picture: a contact sheet, a row a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as T

from edge_dfcil.errors import SettingError


def check_drawable(path: Path) -> None:
    """Raises `SettingError` for a path that no picture can be written to, before any is made."""
    if not path.parent.is_dir():
        raise SettingError(f"{path.parent} is not a folder; make it first")
    if path.suffix.lower() not in Image.registered_extensions():
        raise SettingError(f"{path} does not end like a picture; name it .png")


def contact_sheet(images: Tensor, labels: Sequence[str], names: Sequence[str], columns: int) -> Image.Image:
    """One picture of uint8 images (N, 3, S, S): a row a name, which stands in front, at most `columns` images a row."""
    from PIL import ImageDraw, ImageFont

    side, gap, zoom = images.shape[-1], 2, max(1, 64 // images.shape[-1])
    cell = side * zoom + gap
    font = ImageFont.load_default(14)
    margin = int(max(font.getlength(name) for name in names)) + 12
    sheet = Image.new("RGB", (margin + columns * cell, len(names) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((6, row * cell + cell // 2), name, "black", font, anchor="lm")
        mine = [index for index, label in enumerate(labels) if label == name][:columns]
        for column, index in enumerate(mine):
            tile = T.to_pil_image(images[index]).resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * cell, row * cell))
    return sheet
