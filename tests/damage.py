"""Damages files at random: `python -m tests.damage --files 10000`.

Model, checkpoint, ONNX and recipe files are cut, flipped, swapped and overwritten; model files are also falsified and given a
correct digest. Each file must be refused with an error of the package, or be read with the same result as before: no other
error, no other answer.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from edge_dfcil import EdgeDfcilError, ExportError, Learner, Model, ModelFileError, Recipe, SettingError
from edge_dfcil.model import file
from edge_dfcil.recipe import RECIPES, SETTINGS, dotted, read_recipe
from exporters import OnnxClassifier, seals
from exporters.onnx import FORMAT

GOLDEN = Path(__file__).parent / "golden" / "schema2"
KINDS = ("model", "checkpoint", "onnx", "recipe", "lying")
IMAGES = np.arange(2 * 3 * 16 * 16, dtype=np.uint8).reshape(2, 3, 16, 16)


@dataclass
class Account:
    """The results of a run, by kind of file."""

    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    same: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    other: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))


# Damage


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(start + int(draw.expovariate(1 / 40)) + 1, len(content))


def flip(content: bytes, draw: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        found[_anywhere(content, draw)] ^= 1 << draw.randrange(8)
    return bytes(found)


def _anywhere(content: bytes, draw: random.Random) -> int:
    """An offset; half of the draws are near the ends, which contain the structure."""
    end = min(4000, len(content))
    return draw.choice([draw.randrange(end), len(content) - 1 - draw.randrange(end), *(draw.randrange(len(content)),) * 2])


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: _anywhere(content, draw)]


def extend(content: bytes, draw: random.Random) -> bytes:
    return content + draw.choice([b"\0", b" ", b"}", content[:100], draw.randbytes(draw.randint(1, 200))])


def swap(content: bytes, draw: random.Random) -> bytes:
    (a, b), (c, d) = sorted([_span(content, draw), _span(content, draw)])
    return content if b > c else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def zero(content: bytes, draw: random.Random) -> bytes:
    a, b = _span(content, draw)
    return content[:a] + bytes(b - a) + content[b:]


def duplicate(content: bytes, draw: random.Random) -> bytes:
    a, b = _span(content, draw)
    return content[:b] + content[a:b] + content[b:]


def overwrite_number(content: bytes, draw: random.Random) -> bytes:
    """Replaces a number in the file's text, or the length at its beginning."""
    if draw.random() < 0.2:
        return draw.choice([0, 1, 2**31, 2**40, 2**60, 2**64 - 1]).to_bytes(8, "little") + content[8:]
    found = draw.choice([*re.finditer(rb"\d+(?:\.\d+)?", content[:20_000])])
    number = draw.choice([b"0", b"-1", b"1", b"1e999", b"NaN", b'"x"', b"null", b"[]", b"9" * 500, str(2**40).encode(), b"true"])
    return content[: found.start()] + number + content[found.end() :]


def overwrite_word(content: bytes, draw: random.Random) -> bytes:
    """Replaces a word of the file by another of its words or by a hostile one."""
    words = [*re.finditer(rb"[A-Za-z_]{3,}", content[:20_000] + b"")]
    found = draw.choice(words)
    other = draw.choice([draw.choice(words).group(), b"../../x", b"\\u001b[2J", b"F64", b"preset", b"", b"\xff"])
    return content[: found.start()] + other + content[found.end() :]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip, cut, extend, swap, zero, duplicate),
    *(overwrite_number, overwrite_word),
)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content after one or two drawn mutations."""
    for _ in range(draw.choice([1, 1, 1, 2])):
        content = draw.choice(MUTATIONS)(content, draw) if len(content) > 8 and re.search(rb"\d", content) else content
    return content


# Falsified content


VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**53, 10**300, 1e308, float("nan"), float("inf"), "", "x", "../../x", "\x1b[2J", "e\u0301"),
    *([], [[]], {}, {"x": 1}, [float("nan")] * 3, [1.0] * 3, ["a"] * 3, [["a", "a"]], "\ud800"),
)


def lie(settings: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The settings with one or two values replaced, at any depth."""
    found = copy.deepcopy(settings)
    for _ in range(draw.randint(1, 2)):
        place: Any = found
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
                break
            place = place[key]
        if draw.random() < 0.1 and isinstance(place, dict):
            del place[key]
        else:
            value = draw.choice(VALUES)  # copied, since a second change may go into it
            place[key] = json.loads(json.dumps(value)) if isinstance(value, (dict, list)) else value
        if not found:
            break
    return found


def lying_tensors(tensors: Mapping[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """The tensors, of which one is missing or has another shape, dtype, name or wrong values."""
    found = dict(tensors)
    name = draw.choice(list(found))
    value = found.pop(name)
    change = draw.choice(["nan", "shape", "dtype", "gone", "renamed", "negative", "empty"])
    if change in ("nan", "negative"):
        value = value.clone().reshape(-1)
        value[: 1 + len(value) // 2] = float("nan") if change == "nan" and value.is_floating_point() else -7
        found[name] = value.reshape(tensors[name].shape)
    elif change == "shape":
        found[name] = torch.zeros([*value.shape, 1])
    elif change == "dtype":
        found[name] = value.to(draw.choice([torch.float64, torch.int64, torch.bfloat16, torch.complex64, torch.bool]))
    elif change == "renamed":
        found[draw.choice(["../x", "statistics.x", name + "x", "\x1b[2J"])] = value
    elif change == "empty":
        found[name] = torch.zeros(0, *[2**20] * (value.dim() - 1)) if value.dim() else torch.zeros(0)
    return found


def sealed() -> bytes:
    """The golden file, which is older than seals, as a current export would write it."""
    model = onnx.load(GOLDEN / "closed_form-any.onnx")
    next(entry for entry in model.metadata_props if entry.key == "format").value = FORMAT
    content: bytes = model.SerializeToString()
    return seals.seal(content)


# The check of each kind: True when it is read as before, False when it is refused. Raises `AssertionError` otherwise.


class Checks:
    """Files of each kind, and the checks of damaged ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors, self.settings = file.read(GOLDEN / "closed_form.safetensors")
        position = {"fingerprint": {"model": "x"}, "decided": {}, "reports": [], "seconds": 1.5, "stage": None}
        self.position: dict[str, Any] = {**position, "recipe": RECIPES["edge"].to_dict()}
        weights = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("statistics")}
        checkpoint = file.write(folder / "c", weights, self.position, kind="checkpoint")
        self.digests = {
            "model": file.digest(self.tensors, self.settings),
            "checkpoint": file.digest(weights, self.position),
        }
        self.contents = {
            "model": (GOLDEN / "closed_form.safetensors").read_bytes(),
            "checkpoint": checkpoint.read_bytes(),
            "onnx": sealed(),
            "recipe": json.dumps(RECIPES["edge"].to_dict(), indent=1).encode(),
        }
        self.answers = OnnxClassifier(GOLDEN / "closed_form-any.onnx", threads=1).probabilities(IMAGES)

    def damaged(self, kind: str, draw: random.Random) -> bytes:
        """A damaged file of a kind; empty for "lying", whose file is made in its check. Half of the recipes are still JSON."""
        if kind == "lying":
            return b""
        if kind == "recipe" and draw.random() < 0.5:
            return json.dumps(lie(json.loads(self.contents[kind]), draw)).encode()
        return damaged(self.contents[kind], draw)

    def _written(self, content: bytes, name: str) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def model(self, content: bytes) -> bool:
        path = self._written(content, "m.safetensors")
        try:
            found = Model.load(path, "cpu")
        except ModelFileError as error:
            check_message(error, path)
            return False
        assert found.digest() == self.digests["model"], "a damaged model gives other answers"
        return True

    def checkpoint(self, content: bytes) -> bool:
        path = self._written(content, "m.checkpoint")
        try:
            tensors, position = file.read(path, "checkpoint")
        except ModelFileError as error:
            check_message(error, path)
            return False
        assert file.digest(tensors, position) == self.digests["checkpoint"], "a damaged checkpoint continues differently"
        return True

    def onnx(self, content: bytes) -> bool:
        path = self._written(content, "m.onnx")
        try:
            found = OnnxClassifier(path, threads=1)
        except ExportError as error:
            check_message(error, path)
            return False
        np.testing.assert_array_equal(found.probabilities(IMAGES), self.answers)
        return True

    def recipe(self, content: bytes) -> bool:
        """True when it is read as a recipe, whose values are then those of the JSON."""
        path = self._written(content, "recipe.json")
        try:
            found = read_recipe(path)
        except SettingError as error:
            str(error).encode()
            return False
        said: dict[str, Any] = json.loads(content)
        whole = dotted(_without_preset(found.to_dict()))
        assert whole.keys() == SETTINGS.keys()
        for name, value in dotted(_without_preset(said)).items():
            floats = isinstance(whole[name], float) and isinstance(value, int)  # 10**300 is the float 1e300
            read = _read(name, value) if isinstance(value, str) else float(value) if floats else value
            assert whole[name] == value or read == whole[name], f"{name} is {whole[name]!r}, not {value!r}"
        assert Recipe.from_dict(found.to_dict()) == found
        return True

    def lying(self, draw: random.Random) -> bool:
        """A falsified model file with a correct digest: True when it is read as a valid model."""
        tensors, settings = self.tensors, self.settings
        if draw.random() < 0.7:
            settings = lie(settings, draw)
        else:
            tensors = lying_tensors(tensors, draw)
        path = self.folder / "l.safetensors"
        try:
            file.write(path, tensors, settings)
            found = Learner.load(path, "cpu")
        except EdgeDfcilError as error:
            str(error).encode()
            return False
        check_valid(found)
        return True


def _without_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("preset", "version")}


def _read(name: str, text: str) -> Any:
    """A setting's text as the package reads it on the command line."""
    found = dotted(_without_preset(RECIPES["edge"].changed({name: text}).to_dict()))
    return found[name]


def check_valid(learner: Learner) -> None:
    """Asserts that a learner from a file is one that the package could have made."""
    model = learner.model
    assert json.dumps(model.settings(), allow_nan=False)
    assert Recipe.from_dict(learner.recipe.to_dict()) == learner.recipe
    assert all(bool(tensor.isfinite().all()) for tensor in model.tensors().values() if tensor.is_floating_point())
    assert len(model.outputs) == model.network.n_classes
    assert all(name.isprintable() and name.strip() == name for name in model.classes)
    assert bool(model.network.mean.isfinite().all()) and bool((model.network.std > 0).all())


def check_message(error: EdgeDfcilError, path: Path) -> None:
    """Asserts that an error's message is printable, and names the file or what does not fit."""
    text = str(error)
    assert text.isprintable(), f"a message with control characters: {text!r}"
    assert path.name in text or "fit" in text or "backbone" in text, f"a message that does not name the file: {text}"


def run(files: int, folder: Path, seed: int = 0, kinds: Sequence[str] = KINDS) -> Account:
    """Damages `files` files of each kind, and falsifies a tenth as many. Raises `AssertionError` for one that is accepted with
    another answer, and for any error of a reader that is not one of the package."""
    checks, draw, account = Checks(folder), random.Random(seed), Account()
    for kind in kinds:
        for number in range(files if kind != "lying" else max(files // 10, 1)):
            content = checks.damaged(kind, draw)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    same = checks.lying(draw) if kind == "lying" else getattr(checks, kind)(content)
            except Exception as error:
                account.other[kind] += 1
                kept = Path(tempfile.gettempdir()) / f"damage-{kind}-{seed}-{number}"
                shutil.copy(folder / {"lying": "l.safetensors"}.get(kind, _NAMES.get(kind, "")), kept)
                raise AssertionError(f"{kind} {number} of seed {seed}, kept as {kept}: {error!r}") from error
            (account.same if same else account.refused)[kind] += 1
    return account


_NAMES = {"model": "m.safetensors", "checkpoint": "m.checkpoint", "onnx": "m.onnx", "recipe": "recipe.json"}


def memory_folder() -> str | None:
    """A folder whose files are in memory, or None."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=memory_folder()) as temporary:
        print(json.dumps(asdict(run(given.files, Path(temporary), given.seed, given.kinds))))
