"""Picture files as cameras, scanners and tools write them: each is read as a viewer shows it, or named and counted."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import tracemalloc
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, TiffImagePlugin

from edge_dfcil import ClassError, DataError, SettingError
from edge_dfcil.dreaming.sheet import check_drawable, contact_sheet, writable
from edge_dfcil.model.pictures import PictureFolder, open_folder, read_each, read_picture, read_pictures
from edge_dfcil.model.preprocessing import fit
from exporters import decoding
from exporters.decoding import to_rgb
from exporters.images import batches

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
RAMP = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))


def saved(path: Path, picture: Image.Image | np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pgm" and isinstance(picture, np.ndarray):  # older versions of Pillow read it and cannot write it
        path.write_bytes(b"P5 %d %d 65535\n" % picture.shape[::-1] + picture.astype(">u2").tobytes())
        return path
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def grey(path: Path) -> np.ndarray:
    return np.asarray(read_picture(path)).astype(int)[..., 0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with a picture each."""
    for name in ("cat", "dog"):
        saved(tmp_path / "pictures" / name / "a.png", Image.new("RGB", (16, 16)))
    return tmp_path / "pictures"


def count(folder: Path, **settings: Any) -> int:
    return len(dataset(open_folder(folder, 16, **settings)))


def dataset(opened: PictureFolder) -> Any:
    """The data set, with `classes`, `samples` and a length, which torch's type of a loader's data set lacks."""
    return opened.loader.dataset


class TestDepth:
    @pytest.mark.parametrize(
        ("name", "levels"),
        [
            ("16.png", RAMP.astype(np.uint16) * 257),
            ("16.tif", RAMP.astype(np.uint16) * 257),
            ("big.tif", (RAMP.astype(np.uint16) * 257).astype(">u2")),
            ("16.pgm", RAMP.astype(np.uint16) * 257),
            ("16in32.tif", RAMP.astype(np.int32) * 257),
            ("8in32.tif", RAMP.astype(np.int32)),
            ("unit.tif", RAMP.astype(np.float32) / 255),
            ("float8.tif", RAMP.astype(np.float32)),
            ("float16.tif", RAMP.astype(np.float32) * 257),
        ],
    )
    def test_every_depth_is_read_as_its_version_of_eight_bits(self, tmp_path: Path, name: str, levels: Any) -> None:
        assert abs(grey(saved(tmp_path / name, levels)) - RAMP).max() <= 1

    def test_a_dark_picture_of_16_bits_stays_dark(self, tmp_path: Path) -> None:
        assert grey(saved(tmp_path / "dark.png", (RAMP // 8).astype(np.uint16) * 257)).max() == 31

    def test_ranges_of_no_format_are_stretched(self, tmp_path: Path) -> None:
        levels = RAMP.astype(np.float32) * 1e6 - 5e7
        assert abs(grey(saved(tmp_path / "x.tif", levels)) - RAMP * (255 / 248)).max() <= 1
        assert grey(saved(tmp_path / "flat.tif", np.full((4, 4), -3.0, np.float32))).max() == 0

    def test_pixels_that_are_no_numbers_are_black(self, tmp_path: Path) -> None:
        levels = np.array([[np.nan, 0.5], [np.inf, -np.inf]], np.float32)
        assert grey(saved(tmp_path / "x.tif", levels)).tolist() == [[0, 128], [255, 0]]

    def test_a_tiff_of_12_bits_says_so(self, tmp_path: Path) -> None:
        values = np.linspace(0, 4095, 8).astype(int)
        packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2).tolist())
        fields = {256: 8, 257: 1, 258: 12, 259: 1, 262: 1, 277: 1, 278: 1, 279: len(packed)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted({**fields, 273: 8}.items()))
        begin = 8 + len(packed)
        data = b"II*\0" + struct.pack("<I", begin) + packed + struct.pack("<H", 9) + entries + bytes(4)
        (tmp_path / "12.tif").write_bytes(data)
        assert abs(grey(tmp_path / "12.tif")[0] - np.linspace(0, 255, 8)).max() <= 1


class TestTransparency:
    HIDDEN_RED = np.concatenate([np.full((8, 16, 4), (255, 0, 0, 0)), np.full((8, 16, 4), (0, 0, 255, 255))]).astype(np.uint8)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
    def test_hidden_colours_are_not_seen(self, tmp_path: Path, mode: str) -> None:
        whole = Image.fromarray(self.HIDDEN_RED)
        picture = whole.convert("RGB").quantize(2) if mode == "P" else whole.convert(mode)
        options = {"transparency": picture.getpixel((0, 0))} if mode == "P" else {}
        seen = read_picture(saved(tmp_path / "x.png", picture, **options))
        assert seen.getpixel((0, 0)) == (255, 255, 255)
        assert seen.getpixel((0, 15)) != (255, 255, 255)

    def test_modes_that_are_in_memory_only(self) -> None:
        whole = Image.fromarray(self.HIDDEN_RED)
        palette = whole.convert("RGB").quantize(2)
        palette.putalpha(whole.getchannel("A"))
        for picture in (palette, whole.convert("RGBa"), whole.convert("LA").convert("La")):
            assert to_rgb(picture).getpixel((0, 0)) == (255, 255, 255), picture.mode
            assert to_rgb(picture).getpixel((0, 15)) != (255, 255, 255), picture.mode

    def test_a_transparent_colour_of_a_picture_without_alpha(self, tmp_path: Path) -> None:
        picture = Image.new("RGB", (4, 4), "red")
        picture.putpixel((0, 0), (0, 255, 0))
        seen = read_picture(saved(tmp_path / "x.png", picture, transparency=(255, 0, 0)))
        assert seen.getpixel((3, 3)) == (255, 255, 255)
        assert seen.getpixel((0, 0)) == (0, 255, 0)

    def test_half_transparent_is_mixed_with_white_and_opaque_stays(self, tmp_path: Path) -> None:
        assert np.array(read_picture(saved(tmp_path / "a.png", Image.new("RGBA", (2, 2), (0, 0, 0, 128)))))[0, 0, 0] == 127
        assert read_picture(saved(tmp_path / "b.png", Image.new("RGBA", (2, 2), (9, 8, 7, 255)))).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("name", ["cmyk.jpg", "palette.gif", "bits.tif", "film.gif", "mpo.mpo", "icon.ico", "x.webp", "x.jp2"])
def test_other_modes_and_the_first_frame(tmp_path: Path, name: str) -> None:
    red = Image.new("RGB", (32, 32), (250, 0, 0))
    picture = {"cmyk": red.convert("CMYK"), "palette": red.quantize(4), "bits": red.convert("1")}.get(name[:-4], red)
    options = {"save_all": True, "append_images": [Image.new("RGB", (32, 32), "blue")]} if name[:4] in ("film", "mpo.") else {}
    seen = read_picture(saved(tmp_path / name, picture, **options))
    assert seen.mode == "RGB"
    if name != "bits.tif":
        assert np.abs(np.asarray(seen)[16, 16].astype(int) - [250, 0, 0]).max() < 12


class TestExif:
    @staticmethod
    def photo(tag: int, kind: int, number: int) -> bytes:
        """A red photo of 24 x 16, to be turned by 90 degrees, with one more tag of any type."""
        jpeg = BytesIO()
        Image.new("RGB", (24, 16), "red").save(jpeg, "JPEG")
        entries = struct.pack("<HHHII", 2, 0x112, 3, 1, 6) + struct.pack("<HHII", tag, kind, number, 50) + bytes(4)
        exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(range(60, 160))
        return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg.getvalue()[2:]

    @settings(deadline=None, max_examples=60)
    @given(st.sampled_from([0x10E, 0x11A, 0x8769, 0x8825, 0x9000, 0xA005, 0x112]), st.integers(0, 14), st.integers(0, 70000))
    def test_a_mistyped_tag_never_ends_a_run(
        self, tmp_path_factory: pytest.TempPathFactory, tag: Any, kind: int, number: int
    ) -> None:
        path = tmp_path_factory.mktemp("exif") / "photo.jpg"
        path.write_bytes(self.photo(tag, kind, number))
        seen = read_picture(path)
        assert seen.size in ((16, 24), (24, 16))
        assert tag == 0x112 or seen.size == (16, 24), "the orientation is applied in spite of the other tag"

    def test_the_orientation_of_a_tiff_is_applied_once(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x112] = 6
        assert read_picture(saved(tmp_path / "x.tif", Image.new("RGB", (24, 16)), exif=exif)).size == (16, 24)

    def test_a_tiff_with_a_mistyped_tag_is_read(self, tmp_path: Path) -> None:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[0x8769] = "no offset"
        tags.tagtype[0x8769] = 2
        assert read_picture(saved(tmp_path / "x.tif", Image.new("RGB", (24, 16)), tiffinfo=tags)).size == (24, 16)


class TestMemory:
    @pytest.mark.parametrize("shape", [(1, 20000), (20000, 1), (2, 5000)])
    def test_a_thin_picture_is_cut_before_it_is_scaled(self, tmp_path: Path, shape: tuple[Any, ...]) -> None:
        path = saved(tmp_path / "thin.png", Image.new("L", shape, 77))
        images = read_pictures([path], 224)
        assert images.shape == (1, 3, 224, 224)
        assert images.unique().tolist() == [77]

    def test_cutting_keeps_what_was_seen(self) -> None:
        """Compared with the middle of the whole picture after scaling."""
        wide = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 90), (24, 540), mode="bilinear")
        whole = torch.nn.functional.interpolate(wide, (16, 360), mode="bilinear", antialias=True)[..., 172:188]
        assert (fit(wide, 16) - whole).abs().max() < 0.02

    def test_a_large_picture_is_made_smaller_as_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "FULL_PIXELS", 100 * 100)
        monkeypatch.setattr(decoding, "SMALLEST_SIDE", 16)
        for name, mode in (("x.jpg", "RGB"), ("x.png", "RGBA"), ("p.png", "P"), ("16.png", "I;16")):
            seen = read_picture(saved(tmp_path / name, Image.new(mode, (400, 300))))
            assert 50 * 50 < seen.width * seen.height <= 100 * 100
            assert abs(seen.width / seen.height - 4 / 3) < 0.1

    def test_a_bomb_is_refused_without_being_decoded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = saved(tmp_path / "bomb.png", Image.new("1", (9000, 9000)))
        tracemalloc.start()
        with pytest.raises(DataError, match=r"bomb\.png.*9000 x 9000 pixels.*scale it down"):
            read_picture(path)
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.stop()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(DataError, match="bomb"):
            read_picture(path)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Display P3's primaries, adapted to the illuminant of profiles; its curve is that of sRGB.
P3_PRIMARIES = {"rXYZ": (0.51512, 0.24120, -0.00105), "gXYZ": (0.29198, 0.69225, 0.04189), "bXYZ": (0.15710, 0.06657, 0.78407)}
INKS = {"C": (55, -37, -50), "M": (48, 74, -3), "Y": (89, -5, 93), "CM": (24, 22, -46), "CY": (50, -65, 27), "MY": (47, 68, 48)}


def with_primaries(profile: bytes, primaries: Mapping[str, tuple[float, ...]]) -> bytes:
    """A matrix profile whose three primaries are replaced."""
    changed = bytearray(profile)
    for entry in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12):
        name, place = profile[entry : entry + 4].decode(), int.from_bytes(profile[entry + 4 : entry + 8], "big")
        if name in primaries:
            changed[place + 8 : place + 20] = struct.pack(">3i", *(round(value * 2**16) for value in primaries[name]))
    return bytes(changed)


P3 = with_primaries(SRGB, P3_PRIMARIES)


def print_profile() -> bytes:
    """A small CMYK profile: a table of the Lab colours of all mixtures of whole inks; black covers the others."""
    table = bytearray()
    for inks in itertools.product(*(("", ink) for ink in "CMYK")):
        mixture = "".join(inks)
        lightness, a, b = (100, 0, 0) if not mixture else (12, 0, 0) if "K" in mixture else INKS.get(mixture, (20, 0, 0))
        table += bytes([round(2.55 * lightness), a + 128, b + 128])
    identity = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    curve = bytes(range(256))
    a2b = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * curve + bytes(table) + 3 * curve
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    tags = {b"wtpt": white, b"A2B0": a2b, b"A2B1": a2b}
    header = bytearray(128)
    header[8:12], header[12:24], header[36:40] = b"\x02\x40\x00\x00", b"prtrCMYKLab ", b"acsp"
    header[68:80] = white[8:]
    place, directory, content = 132 + 12 * len(tags), b"", b""
    for name, tag in tags.items():
        directory += name + struct.pack(">2I", place + len(content), len(tag))
        content += tag + bytes(-len(tag) % 4)
    header[:4] = (place + len(content)).to_bytes(4, "big")
    return bytes(header) + len(tags).to_bytes(4, "big") + directory + content


def pixels_of(picture: Image.Image) -> bytes:
    assert picture.mode == "RGB"
    return picture.tobytes()


class TestColours:
    """Pictures are converted by their ICC profile."""

    def test_a_wide_gamut_is_converted(self, tmp_path: Path) -> None:
        """The pure red of sRGB in the values of Display P3; greys are the same in both."""
        for name in ("x.png", "x.jpg", "x.webp", "x.tif"):
            seen = read_picture(saved(tmp_path / name, Image.new("RGB", (16, 16), (234, 51, 35)), icc_profile=P3))
            assert seen.getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=8)  # JPEG and WebP lose a little
            grey = read_picture(saved(tmp_path / name, Image.new("RGB", (16, 16), (90, 90, 90)), icc_profile=P3))
            assert grey.getpixel((8, 8)) == pytest.approx((90, 90, 90), abs=2)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
    def test_srgb_stays_as_it_is_to_the_bit(self, tmp_path: Path, mode: str) -> None:
        """Also where its curve or its primaries are rounded, as in the profiles of many vendors."""
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
        picture = Image.fromarray(pixels).convert("RGB").convert(mode)
        plain = pixels_of(read_picture(saved(tmp_path / "plain.png", picture)))
        rounded = with_primaries(SRGB, {"rXYZ": (0.4361, 0.2225, 0.0139)})
        for profile in (SRGB, rounded):
            assert pixels_of(read_picture(saved(tmp_path / "x.png", picture, icc_profile=profile))) == plain
        assert pixels_of(picture.convert("RGB")) == plain

    def test_transparent_and_turned_pictures_and_palettes(self, tmp_path: Path) -> None:
        picture = Image.new("RGBA", (20, 10), (234, 51, 35, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 10, 10))
        exif = Image.Exif()
        exif[0x112] = 6
        seen = read_picture(saved(tmp_path / "x.png", picture, icc_profile=P3, exif=exif))
        assert seen.size == (10, 20)
        assert seen.getpixel((5, 2)) == (255, 255, 255)
        assert seen.getpixel((5, 17)) == pytest.approx((255, 0, 0), abs=1)
        palette = picture.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
        assert read_picture(saved(tmp_path / "p.png", palette, icc_profile=P3)).getpixel((15, 5)) == seen.getpixel((5, 17))

    def test_inks_are_those_of_the_profile(self, tmp_path: Path) -> None:
        for name in ("x.jpg", "x.tif"):
            cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
            plain = read_picture(saved(tmp_path / name, cyan)).getpixel((8, 8))
            printed = read_picture(saved(tmp_path / name, cyan, icc_profile=print_profile())).getpixel((8, 8))
            assert plain == pytest.approx((0, 255, 255), abs=3)
            assert printed == pytest.approx((0, 150, 218), abs=12)
            paper = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
            seen = read_picture(saved(tmp_path / name, paper, icc_profile=print_profile())).getpixel((8, 8))
            assert seen == pytest.approx((255, 255, 255), abs=2)

    @pytest.mark.parametrize(
        "profile",
        [b"no profile", P3[:300], P3[:128] + bytes(len(P3) - 128), print_profile(), print_profile()[:400], b"\0" * 3000],
        ids=["text", "cut", "no tags", "of CMYK", "of CMYK, cut", "zeros"],
    )
    def test_a_profile_that_cannot_be_used_is_ignored(self, tmp_path: Path, profile: bytes) -> None:
        for mode in ("RGB", "L"):
            picture = Image.new(mode, (16, 16), "orange")
            plain = pixels_of(read_picture(saved(tmp_path / "plain.png", picture)))
            seen = read_picture(saved(tmp_path / "x.png", picture, icc_profile=profile))
            assert pixels_of(seen) == plain

    def test_a_picture_that_is_passed_on_is_not_converted_again(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        path = saved(tmp_path / "x.png", pixels, icc_profile=P3)
        once = read_picture(path)
        assert pixels_of(once) != pixels.tobytes()
        assert pixels_of(to_rgb(once)) == pixels_of(once)
        with Image.open(path) as opened:
            assert pixels_of(to_rgb(opened)) == pixels_of(once)
            assert opened.info["icc_profile"] == P3 and pixels_of(opened) == pixels.tobytes(), "the caller's picture is unchanged"
        (batch,) = batches([path], 16, 1)
        assert np.array_equal(batch, read_pictures([path], 16).numpy()), "without torch it is the same picture"

    def test_without_colour_management_profiles_are_ignored(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As with a Pillow that was built without Little CMS."""

        def missing(*arguments: Any) -> Any:
            raise ImportError("The _imagingcms C module is not installed")

        monkeypatch.setattr(ImageCms, "ImageCmsProfile", missing)
        profile = with_primaries(P3, {"rXYZ": (0.5, 0.25, 0.0)})  # one that is not cached from another test
        seen = read_picture(saved(tmp_path / "x.png", Image.new("RGB", (8, 8), (234, 51, 35)), icc_profile=profile))
        assert seen.getpixel((4, 4)) == (234, 51, 35)


class TestWhatIsNoPicture:
    def test_nothing_but_files_is_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(tmp_path / "socket.png"))
        (tmp_path / "null.png").symlink_to("/dev/zero")
        for name in ("pipe.png", "socket.png", "null.png"):
            with pytest.raises(DataError, match=f"{name}.*a pipe, a socket or a device"):
                read_picture(tmp_path / name)
        server.close()
        with pytest.raises(DataError, match="is a folder"):
            read_picture(tmp_path)
        with pytest.raises(DataError, match="NoneType"):
            read_picture(None)  # type: ignore[arg-type]

    @settings(deadline=None, max_examples=60)
    @given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.data())
    def test_damage_is_a_data_error_or_a_picture(self, tmp_path_factory: pytest.TempPathFactory, kind: Any, data: Any) -> None:
        whole = BytesIO()
        Image.fromarray(np.tile(RAMP[..., None], (1, 1, 3))).save(whole, kind)
        content = bytearray(whole.getvalue())
        for _ in range(3):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.mktemp("damaged") / "x.png"
        path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
        with contextlib.suppress(DataError):  # and no other error
            assert read_picture(path).mode == "RGB"

    def test_a_name_that_would_move_the_cursor_is_escaped(self, tmp_path: Path) -> None:
        (tmp_path / "a\x1b[2J.png").write_bytes(b"x")
        with pytest.raises(DataError) as error:
            read_picture(tmp_path / "a\x1b[2J.png")
        assert "\x1b" not in str(error.value)


class TestHeif:
    def test_heic_and_avif_are_read_upright(self, tmp_path: Path) -> None:
        heif = pytest.importorskip("pillow_heif")
        pixels = np.zeros((32, 64, 3), np.uint8)
        pixels[:, :32] = 255
        exif = Image.Exif()
        exif[0x112] = 6
        for name in ("x.heic", "x.jpg"):
            heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / name, exif=exif.tobytes(), quality=95)
            seen = np.asarray(read_picture(tmp_path / name)).astype(int)
            assert seen.shape == (64, 32, 3)
            assert seen[10].mean() > 240
            assert seen[-10].mean() < 15
        assert ".heic" not in Image.registered_extensions(), "the host application's Pillow is unchanged"

    def test_without_the_plugin_they_are_counted(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
        (folder / "cat" / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(60))
        opened = open_folder(folder, 16)
        assert opened.skipped == (str(folder / "cat" / "b.heic"),)
        assert "pip install pillow-heif" in opened.reasons[opened.skipped[0]]


class TestFolder:
    def test_what_tools_leave_behind_is_passed_over(self, folder: Path) -> None:
        for stray in (".hidden", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"):
            saved(folder / stray / "a.png", Image.new("RGB", (8, 8)))
            saved(folder / "cat" / stray / "a.png", Image.new("RGB", (8, 8)))
        for junk in (".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt", "labels.json", "film.mp4", "._a.png", "README"):
            (folder / "dog" / junk).write_bytes(bytes(40))
        opened = open_folder(folder, 16, strict=True)
        assert dataset(opened).classes == ["cat", "dog"]
        assert len(dataset(opened)) == 2
        assert opened.skipped == ()

    def test_every_kind_of_picture_is_read_or_counted(self, folder: Path) -> None:
        for name, kind in (
            ("b.gif", "GIF"),
            ("c.jfif", "JPEG"),
            ("d.JPE", "JPEG"),
            ("e.tga", "TGA"),
            ("f", "PNG"),
        ):
            saved(folder / "cat" / name, Image.new("RGB", (8, 8)), format=kind)
        for name in ("h.svg", "i.CR2", "j.psd", "k.eps", "l.jxl", "m.dcm"):
            (folder / "dog" / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
        saved(folder / "beside.png", Image.new("RGB", (8, 8)))
        opened = open_folder(folder, 16)
        assert len(dataset(opened)) == 2 + 5
        assert len(opened.skipped) == 6 + 1
        assert "not in a class folder" in opened.reasons[str(folder / "beside.png")]

    def test_pictures_in_folders_within_keep_their_order(self, folder: Path) -> None:
        for name in ("b/2.png", "b/10.png", "d.png/1.png", "c.png"):
            saved(folder / "cat" / name, Image.new("RGB", (8, 8)))
        names = [os.path.relpath(path, folder / "cat") for path, target in dataset(open_folder(folder, 16)).samples[:-1]]
        assert names == ["a.png", "c.png", "b/10.png", "b/2.png", "d.png/1.png"]

    def test_links_are_followed_out_of_the_folder_and_once(self, folder: Path, tmp_path: Path) -> None:
        for i in range(3):
            saved(tmp_path / "more" / f"{i}.png", Image.new("RGB", (8, 8)))
        (tmp_path / "more" / "again").symlink_to(tmp_path / "more")
        (folder / "cat" / "more").symlink_to(tmp_path / "more")
        (folder / "cat" / "more2").symlink_to(tmp_path / "more")
        (folder / "cat" / "self").symlink_to(folder / "cat")
        (folder / "cat" / "up").symlink_to(folder)
        (folder / "cat" / "other").symlink_to(folder / "dog")
        (folder / "cat" / "top").symlink_to(tmp_path)
        assert count(folder) == 2 + 3

    def test_broken_links_and_pipes_are_counted_and_not_waited_for(self, folder: Path) -> None:
        (folder / "cat" / "b.png").symlink_to("b.png")
        (folder / "cat" / "c.png").symlink_to("nowhere.png")
        os.mkfifo(folder / "dog" / "d.png")
        assert len(open_folder(folder, 16).skipped) == 3
        assert count(folder) == 2

    def test_a_class_by_a_link_and_one_class_twice(self, folder: Path, tmp_path: Path) -> None:
        saved(tmp_path / "elsewhere" / "a.png", Image.new("RGB", (8, 8)))
        (folder / "fox").symlink_to(tmp_path / "elsewhere")
        assert count(folder) == 3
        (folder / "kitten").symlink_to(folder / "cat")
        with pytest.raises(DataError, match=r"cat and .*kitten share pictures by a link"):
            open_folder(folder, 16)
        (folder / "kitten").unlink()
        saved(folder / "cat" / "young" / "a.png", Image.new("RGB", (8, 8)))
        (folder / "kitten").symlink_to(folder / "cat" / "young")
        with pytest.raises(DataError, match=r"cat and .*kitten share pictures by a link"):
            open_folder(folder, 16)

    def test_links_up_are_no_classes(self, folder: Path, tmp_path: Path) -> None:
        (folder / "all").symlink_to(folder)
        (folder / "above").symlink_to(tmp_path)
        assert dataset(open_folder(folder, 16)).classes == ["cat", "dog"]

    def test_a_class_without_pictures_is_named(self, folder: Path) -> None:
        (folder / "fox").mkdir()
        (folder / "elk").mkdir()
        (folder / "elk" / "a.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"elk, fox; 1 pictures that cannot be read"):
            open_folder(folder, 16)

    def test_splits_are_no_classes(self, tmp_path: Path) -> None:
        for path in ("train/cat", "train/dog", "val/cat", "val/dog"):
            saved(tmp_path / path / "a.png", Image.new("RGB", (8, 8)))
        with pytest.raises(DataError, match=r"train and val.*parts of a data set.*/train"):
            open_folder(tmp_path, 16)
        assert count(tmp_path / "train") == 2

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        for name in ("train", "test", "bus"):
            saved(tmp_path / name / "a.png", Image.new("RGB", (8, 8)))
        assert dataset(open_folder(tmp_path, 16)).classes == ["bus", "test", "train"]

    def test_folders_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is not a folder"):
            open_folder(tmp_path / "nowhere", 16)
        with pytest.raises(DataError, match="contains no folder"):
            open_folder(tmp_path, 16)
        saved(tmp_path / "a.png", Image.new("RGB", (8, 8)))
        with pytest.raises(DataError, match="1 pictures itself: sort them"):
            open_folder(tmp_path, 16)

    @pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "cat ", "Cat", "c\u200bat", "a\nb"])
    def test_folder_names_that_are_no_class_names(self, folder: Path, name: Any) -> None:
        saved(folder / name / "a.png", Image.new("RGB", (8, 8)))
        with pytest.raises(ClassError):
            open_folder(folder, 16)

    def test_strict_names_the_first_that_cannot_be_read(self, folder: Path) -> None:
        (folder / "cat" / "b.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match=r"b\.png"):
            open_folder(folder, 16, strict=True)


def test_each_picture_that_can_be_read_is(tmp_path: Path) -> None:
    good = [saved(tmp_path / f"{i}.png", Image.new("RGB", (8 + i, 8), (i, 0, 0))) for i in range(5)]
    (tmp_path / "bad.png").write_bytes(b"no picture")
    batches = list(read_each([good[0], tmp_path / "bad.png", *good[1:], tmp_path / "none.png"], 8, at_once=3))
    assert [path for batch in batches for path in batch.paths] == good
    assert torch.cat([batch.images for batch in batches])[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert [path.name for batch in batches for path, _ in batch.failed] == ["bad.png", "none.png"]
    assert all(path.name in reason for batch in batches for path, reason in batch.failed)
    assert read_pictures([], 8).shape == (0, 3, 8, 8)


class TestContactSheet:
    @pytest.mark.parametrize(
        "names",
        [
            ("\u043a\u043e\u0448\u043a\u0430", "\u043f\u0442\u0438\u0446\u0430"),
            ("\u65e5\u672c", "\u4e2d\u56fd"),
            ("\U0001f431", "\U0001f436"),
            ("\u0e01\u0e02", "\u0e01\u0e03"),
            ("caf\u00e9", "cafe"),
            ("a\x1b", "a\x1c"),
        ],
    )
    def test_different_names_look_different(self, names: tuple[Any, ...]) -> None:
        sheet = np.asarray(contact_sheet(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), names, names, 1))
        half, margin = len(sheet) // 2, sheet.shape[1] - 66
        assert not np.array_equal(sheet[:half, :margin], sheet[half:, :margin])

    def test_without_a_font_the_codes_are_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge_dfcil.dreaming.sheet._font_of_matplotlib", lambda: None)
        monkeypatch.setattr("edge_dfcil.dreaming.sheet._font_of_system", lambda characters: None)
        assert writable("x\u043a")[0] == r"x\u043a"
        assert writable("a black cat")[0] == "a black cat"

    def test_only_what_can_be_written(self, tmp_path: Path) -> None:
        check_drawable(tmp_path / "x.png")
        for name in ("x.psd", "x.txt", "x"):
            with pytest.raises(SettingError, match=r"name it \.png"):
                check_drawable(tmp_path / name)
