"""OnnxClassifier answers as the learner does, for images of any form and size, and says what it cannot read."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_dfcil import DataError, ExportError, Learner, SettingError
from edge_dfcil.model import preprocessing
from edge_dfcil.model.inputs import as_images
from exporters import OnnxClassifier, resize

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "schema1"
SIDE = 16


@pytest.fixture(scope="module")
def classifier() -> OnnxClassifier:
    return OnnxClassifier(GOLDEN / "cifar.onnx", threads=1)


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner.load(GOLDEN / "cifar.safetensors", "cpu")


def noise(*shape: Any, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.sampled_from([8, 16, 32, 48]), floats=st.booleans())
@example(height=480, width=640, size=224, floats=False)
@example(height=768, width=576, size=32, floats=True)
@example(height=1, width=199, size=16, floats=False)
@example(height=33, width=32, size=32, floats=False)
def test_a_photo_becomes_the_square_that_the_learner_makes(height: int, width: int, size: Any, floats: bool) -> None:
    photo = noise(2, 3, height, width, seed=height * width)
    photo = photo.astype(np.float32) / 255 if floats else photo
    expected = preprocessing.fit(torch.from_numpy(photo), size).numpy()
    found = resize.fit(photo, size)
    assert found.shape == expected.shape == (2, 3, size, size)
    assert found.dtype == photo.dtype
    step = 1 / 255 if floats else 1
    assert np.abs(found.astype(np.float64) - expected.astype(np.float64)).max() <= 1.001 * step


def test_a_constant_image_stays_constant() -> None:
    for value in (0, 1, 254, 255):
        assert (resize.fit(np.full((3, 77, 123), value, np.uint8), 16) == value).all()


@pytest.mark.parametrize("size", [(16, 16), (48, 64), (17, 16), (200, 90), (5, 9)])
def test_it_answers_as_the_learner_does_for_any_size(classifier: Any, learner: Learner, size: tuple[Any, ...]) -> None:
    photos = noise(4, 3, *size)
    theirs = learner.predict(torch.from_numpy(photos), top_k=5)
    for mine, other in zip(classifier.predict(photos, top_k=5), theirs, strict=True):
        # A pixel may differ by 1/255 after scaling, and the network amplifies that.
        assert dict(mine.top) == pytest.approx(dict(other.top), abs=1e-4 if size == (16, 16) else 0.05)


def forms_of(photo: Any, folder: Path) -> Any:
    """One photo (3, H, W) in every form that the public calls take."""
    upright = np.ascontiguousarray(photo.transpose(1, 2, 0))
    picture = Image.fromarray(upright)
    path = folder / os.fsdecode("foto ø.png".encode())
    picture.save(path)
    arrays = [photo, upright, upright[None], torch.from_numpy(photo), photo[None], [photo], [photo[None]]]
    loaders = [[(photo[None], [0])], iter([photo[None]]), {"image": photo}, [{"pixel_values": photo[None]}]]
    return [*arrays, picture, path, str(path), [path], [picture], *loaders]


def test_one_image_in_every_form_is_the_same_image(classifier: Any, tmp_path: Path) -> None:
    photo = noise(3, 40, 56)
    expected = classifier.probabilities(photo[None])
    assert expected.shape == (1, 5)
    for form in forms_of(photo, tmp_path):
        np.testing.assert_array_equal(classifier.probabilities(form), expected)
    for floats in (photo / np.float32(255), (photo[None] / 255).tolist()):
        np.testing.assert_allclose(classifier.probabilities(floats), expected, atol=0.02)


def test_it_takes_what_the_learner_takes(classifier: Any, learner: Learner, tmp_path: Path) -> None:
    photo = noise(3, 40, 56)
    grey = [photo[0], photo[:1], photo[:1].transpose(1, 2, 0), photo[None, :1]]
    forms = [form for form in forms_of(photo, tmp_path) if not isinstance(form, Iterator)]  # an iterator can be read only once
    for form in (*forms, *grey, [path_of_grey(tmp_path)], torch.rand(2, 3, 9, 9).bfloat16()):
        expected = [answer for batch in as_images(form, SIDE) for answer in learner.predict(batch, top_k=5)]
        found = classifier.predict(form, top_k=5)
        assert len(found) == len(expected)
        for mine, other in zip(found, expected, strict=True):
            assert dict(mine.top) == pytest.approx(dict(other.top), abs=0.05)


def path_of_grey(folder: Path) -> Any:
    """A 16-bit picture, which Pillow by itself would turn white."""
    path = folder / "grey.png"
    Image.fromarray(noise(30, 20).astype(np.uint16) * 257).save(path)
    return path


def test_images_of_different_sizes_and_many_of_them_keep_their_order(classifier: Any) -> None:
    photos = [noise(3, 10 + n % 7, 20, seed=n) for n in range(150)]
    together = classifier.predict(photos)
    assert [answer.label for answer in together] == [classifier.predict(photo)[0].label for photo in photos]
    assert classifier.predict([]) == classifier.predict(np.zeros((0, 3, 16, 16), np.uint8)) == []
    assert classifier.probabilities([]).shape == (0, 5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros(16, np.uint8), r"shape is \(16,\)"),
        (np.zeros((1, 2, 16, 16), np.uint8), "channels last"),
        (np.zeros((4, 16, 16), np.uint8), "channels last"),
        (np.zeros((1, 3, 0, 16), np.uint8), r"\(1, 3, 0, 16\)"),
        (np.zeros((1, 3, 16, 16), np.int64), "int64"),
        (np.full((1, 3, 16, 16), -1.5), "normalise"),
        (np.full((1, 3, 16, 16), np.nan), "nan"),
        (None, "NoneType"),
        (7, "shape"),
        ({"label": 1}, "label"),
        ({"image": 1}, "shape"),
        ({1, 2}, "set"),
        (b"photo.png", "bytes"),
        ([np.zeros((3, 8, 8), np.uint8), None], "image 1: .*NoneType"),
        ([[1, 2], [3]], "images"),
        ("no-such-file.png", "no-such-file"),
        (str(Path(__file__)), "test_runtime"),
    ],
)
def test_images_it_does_not_take(classifier: Any, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classifier.predict(images)


def test_top_k_of_nothing(classifier: Any) -> None:
    with pytest.raises(SettingError, match="top_k"):
        classifier.predict(noise(1, 3, 16, 16), top_k=0)


def changed(tmp_path: Path, change: Any) -> Path:
    model = onnx.load(GOLDEN / "cifar.onnx")
    change(model)
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_a_file_too_new_for_the_runtime_names_both_versions(tmp_path: Path) -> None:
    import onnxruntime

    def newer_ir(model: onnx.ModelProto) -> None:
        model.ir_version = 99

    def newer_opset(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 98

    for change, number in ((newer_ir, "99"), (newer_opset, "98")):
        with pytest.raises(ExportError, match=rf"{number}.*onnxruntime {onnxruntime.__version__}.*up to \d+.*Upgrade") as caught:
            OnnxClassifier(changed(tmp_path, change))
        assert "cannot be read as ONNX" not in str(caught.value)


def test_damaged_metadata_is_reported(tmp_path: Path) -> None:
    def damage(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == "classes").value = "["

    with pytest.raises(ExportError, match="metadata cannot be read"):
        OnnxClassifier(changed(tmp_path, damage))


def test_a_file_whose_name_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.onnx")
    try:
        path.write_bytes((GOLDEN / "cifar.onnx").read_bytes())
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    assert OnnxClassifier(path).classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    "code",
    [
        f"from exporters import OnnxClassifier; OnnxClassifier({str(GOLDEN / 'cifar.onnx')!r})",
        "import exporters, onnxruntime",
        "from exporters.timing import latencies; "
        f"latencies({{'a': open({str(GOLDEN / 'cifar.onnx')!r}, 'rb').read()}}, 16, rounds=1)",
    ],
)
def test_nothing_is_left_in_the_home_folder(tmp_path: Path, code: str) -> None:
    """ONNX Runtime would write a device id and a queue of telemetry events there, once per process; so each is a new one."""
    unset = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
    assert not list(tmp_path.rglob("*"))


def test_telemetry_is_the_users_choice_and_a_late_import_is_reported() -> None:
    code = """
        import logging, os, sys
        logging.basicConfig(stream=sys.stdout, format="%(name)s %(message)s")
        os.environ.pop("ORT_DISABLE_TELEMETRY", None)
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "0"
        sys.modules["onnxruntime"] = None
        import exporters
        print(os.environ["ORT_DISABLE_TELEMETRY"], os.environ["HF_HUB_DISABLE_TELEMETRY"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, check=True)
    warning, variables = done.stdout.splitlines()
    assert warning.startswith("edge_dfcil onnxruntime was imported before")
    assert variables == "1 0"
