"""Decodes a picture file to an upright RGB image in bounded memory, with Pillow only: for the model and for the runtime."""

from __future__ import annotations

import functools
import logging
import math
import os
import stat
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, UnidentifiedImageError

from exporters.errors import DataError
from exporters.texts import shown

logger = logging.getLogger("edge_dfcil")

# Pillow uses four bytes per pixel: a picture takes 270 MB at most, and 70 MB once it has been made smaller.
MAX_PIXELS = 2**26  # more are refused
FULL_PIXELS = 2**24  # more are halved (thirded, ...) as they are read; photographs of 12 megapixels are not
SMALLEST_SIDE = 1024  # no side is made smaller than this

# Not tried, whatever the name of a file: EPS runs Ghostscript, and Pillow alone cannot decode pixels of the others.
_REFUSED_FORMATS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_COMMON_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
_NOT_PICTURES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}  # although Pillow registers them
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"avif", b"avis"}
_HEIF_ENDINGS = {".heic", ".heics", ".heif", ".heifs", ".hif", ".avif", ".avifs"}
# Pictures of cameras, of scanners and of drawing programs that Pillow cannot read: they are counted as skipped.
_OTHER_ENDINGS = {
    *(".3fr", ".arw", ".cr2", ".cr3", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf"),
    *(".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"),
    *(".dcm", ".djvu", ".exr", ".hdr", ".jp2", ".j2k", ".jpx", ".jxl", ".jxr", ".wdp", ".kra", ".svg", ".svgz", ".xcf"),
}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x112  # the tag of EXIF and TIFF
# For each mode, the colour space that a profile must have, and the mode from which pixels are converted.
_SPACES = {
    **dict.fromkeys(("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr"), ("RGB", "RGB")),
    **dict.fromkeys(("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"), ("GRAY", "L")),
    "CMYK": ("CMYK", "CMYK"),
}
_BLACK_POINT_COMPENSATION: Any = 0x2000  # `ImageCms.Flags` has it by name from Pillow 10.3 on
_SAME = 2  # of 255: a profile that changes no colour by more is taken as sRGB, whose curve is rounded in different ways


def is_picture_name(name: str) -> bool:
    """Whether a file's ending is that of a picture, readable here or not."""
    ending = os.path.splitext(name)[1].lower()
    known = ending in Image.registered_extensions() or ending in _HEIF_ENDINGS or ending in _OTHER_ENDINGS
    return known and ending not in _NOT_PICTURES


def is_picture_content(path: str | Path) -> bool:
    """Whether a regular file begins like a picture of a common format; for files without an ending."""
    try:
        _check_regular(path)
        with Image.open(path, formats=_COMMON_FORMATS):
            return True
    except Exception:
        return False


def read_picture(path: str | Path) -> Image.Image:
    """A picture as sRGB, turned upright by its EXIF, on white where it is transparent.

    Of several frames the first is read (of an icon the largest). 16-bit grey is scaled by its full range, whatever part of it
    a picture uses; floats by the smallest of the ranges [0, 1], [0, 255] and [0, 65535] that contains them. A picture of more
    than 2**24 pixels is made smaller by a whole factor while it is read. Colours are converted by the picture's ICC profile
    (relative colorimetric); a damaged profile is ignored, and so are all if Pillow was built without Little CMS. Pixels of a
    picture whose profile is sRGB, or that has none, are not changed.

    Raises a `DataError` that names the file, if it is not a picture, is damaged, is not a regular file, or has more than 2**26
    pixels.
    """
    try:
        _check_regular(path)
        with _open(path) as picture:
            _shrink_on_load(picture)
            return to_rgb(picture)
    except DataError as error:
        raise DataError(f"{shown(path)} is not a picture that can be read ({error})") from error
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file: struct.error, TypeError, ...
        reason = str(error) or type(error).__name__
        raise DataError(f"{shown(path)} is not a picture that can be read ({reason})") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """An open picture as `read_picture` gives it. Raises `DataError` when it is too large, else what Pillow raises."""
    _check_size(picture.size)
    _load(picture)
    orientation = _orientation(picture)  # after loading, which applies that of a TIFF and removes it
    plain = _to_srgb(_without_alpha(_to_eight_bits(_shrink(picture))), picture.mode, picture.info.get("icc_profile"))
    turn = _TURNS.get(orientation)
    return plain if turn is None else plain.transpose(turn)


# Opening


def _check_regular(path: str | Path) -> None:
    """Pipes, sockets and devices are not opened: reading one may never end."""
    if not isinstance(path, (str, os.PathLike)):
        raise DataError(f"got a {type(path).__name__}; pass a path")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise DataError("it is a folder" if stat.S_ISDIR(mode) else "it is a pipe, a socket or a device, not a file")


def _open(path: str | Path) -> Image.Image:
    Image.init()
    try:
        return Image.open(path, formats=[name for name in Image.ID if name not in _REFUSED_FORMATS])
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            begin = file.read(12)
        if begin[4:8] != b"ftyp" or begin[8:12] not in _HEIF_BRANDS:
            raise DataError("it is damaged, or of a kind that Pillow cannot read") from None
        return _open_heif(path)


def _open_heif(path: str | Path) -> Image.Image:
    """Opened directly, because registering the plugin with Pillow would change what the host application reads."""
    try:
        import pillow_heif
    except ImportError:
        raise DataError("HEIC and AVIF need a plugin: pip install pillow-heif") from None
    file = pillow_heif.open_heif(path, convert_hdr_to_8bit=True)
    _check_size(file.size)
    picture: Image.Image = file.to_pillow()
    return picture


def _check_size(size: tuple[int, int]) -> None:
    if math.prod(size) > MAX_PIXELS:
        raise DataError(f"it has {size[0]} x {size[1]} pixels, and the limit is {MAX_PIXELS}; scale it down first")


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 when the EXIF cannot be read, as that of many editors."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
        return int(value) if value in _TURNS else 1
    except Exception:
        return 1


def _load(picture: Image.Image) -> None:
    try:
        picture.load()
    except (OSError, MemoryError):
        raise
    except Exception:
        # Pillow reads a TIFF's tags after its pixels: if a tag has a wrong type, the pixels are complete.
        if picture.format != "TIFF" or getattr(picture, "tile", True):
            raise


# Memory


def _factor(size: tuple[int, int]) -> int:
    """The factor by which a picture is made smaller to have at most `FULL_PIXELS`."""
    return min(math.ceil(math.sqrt(math.prod(size) / FULL_PIXELS)), max(1, min(size) // SMALLEST_SIDE))


def _shrink_on_load(picture: Image.Image) -> None:
    """JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, so that a large one is never in memory at full size."""
    factor = _factor(picture.size)
    if picture.format == "JPEG" and factor > 1:
        factor = next(scale for scale in (2, 4, 8) if scale >= factor or scale == 8)
        picture.draft(None, (picture.width // factor, picture.height // factor))


def _shrink(picture: Image.Image) -> Image.Image:
    factor = _factor(picture.size)
    if factor == 1:
        return picture
    try:
        return picture.reduce(factor)
    except ValueError:  # a palette, bits, 16-bit grey
        size = (picture.width // factor, picture.height // factor)
        return picture.resize(size, Image.Resampling.NEAREST)


# Modes


def _without_alpha(picture: Image.Image) -> Image.Image:
    """The picture on white: the colours of transparent pixels are invisible, and often arbitrary."""
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("LA") if picture.mode == "La" else picture
    layers = picture.convert("RGBA")
    if layers.getchannel("A").getextrema() == (255, 255):
        return layers.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats as 8-bit grey; Pillow's own conversion clips it at 255."""
    if not (picture.mode.startswith("I") or picture.mode == "F"):
        return picture
    levels = np.asarray(picture).astype(np.float32)
    low, high = _range(picture, levels)
    scaled = (np.nan_to_num(levels, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
    return Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))


def _range(picture: Image.Image, levels: npt.NDArray[np.float32]) -> tuple[float, float]:
    """The values that are black and white: of the format if it defines them, else the smallest usual range that fits."""
    if picture.mode.startswith("I;16"):
        return 0.0, 2.0 ** _bits(picture) - 1
    if picture.mode == "I" and picture.format in ("PNG", "PPM"):
        return 0.0, 65535.0
    finite = levels[np.isfinite(levels)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    usual = (1.0, 255.0, 65535.0) if picture.mode == "F" else (255.0, 65535.0)
    for white in usual:
        if low >= 0 and high <= white:
            return 0.0, white
    return low, max(high, low + 1e-6 * max(1.0, abs(low)))


def _bits(picture: Image.Image) -> int:
    """The number of bits that a 16-bit picture uses; a TIFF of 12 bits says so in a tag."""
    tags: Any = getattr(picture, "tag_v2", {})
    try:
        bits = int(tags.get(258, (16,))[0])  # BitsPerSample
    except Exception:
        bits = 16
    return bits if 8 < bits <= 16 else 16


# Colours


def _to_srgb(picture: Image.Image, mode: str, profile: Any) -> Image.Image:
    """A picture without transparency as RGB, by the profile of the file, whose pixels may have another mode."""
    space, source = _SPACES.get(mode, ("", ""))
    transform = _transform(profile, space, source) if isinstance(profile, bytes) and space else None
    if transform is None:
        return picture.convert("RGB")
    # The result is marked as sRGB, so that it is not converted again where it is passed on.
    return transform.apply(picture.convert(source))


@functools.lru_cache(maxsize=4)  # pictures of the same camera have the same profile
def _transform(profile: bytes, space: str, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From pixels of a mode to sRGB; None if there is nothing to convert, or if that is impossible."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if source.profile.xcolor_space.strip() != space:
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        found = ImageCms.buildTransform(source, srgb, mode, "RGB", intent, _BLACK_POINT_COMPENSATION)
        return found if mode == "CMYK" or _changes_colours(found, mode) else None
    except Exception as error:  # Little CMS raises many kinds for a damaged profile; without it, each call is an ImportError
        logger.info("a picture's colour profile is ignored: %s", error)
        return None


def _changes_colours(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether any of a grid of colours, or of all greys, becomes another one."""
    steps = np.arange(0, 256, 17 if mode == "RGB" else 1, dtype=np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, len(steps), 3) if mode == "RGB" else steps[None]
    before = Image.fromarray(colours)
    after = np.asarray(transform.apply(before)).astype(int)
    return bool(np.abs(after - np.asarray(before.convert("RGB"))).max() > _SAME)
