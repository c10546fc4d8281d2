"""Calls every verb with random, mostly invalid arguments: `python -m tests.rubbish --inputs 10000`.

The arguments are images, loaders, names, settings, paths and command lines of many kinds, some of them valid. Each call must give
a valid result, or raise an error of the package (or a `TypeError` or `ValueError` that the package itself raises). Only a call
that succeeds may change the model.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from edge_dfcil import RECIPES, EdgeDfcilError, Learner, Model, Recipe
from edge_dfcil.cli import main
from edge_dfcil.compression.distillation import Distillation, distill
from edge_dfcil.compression.pruning import Pruning, prune
from edge_dfcil.demo import digits
from edge_dfcil.privacy.audit import audit
from edge_dfcil.recipe import SETTINGS
from exporters import OnnxClassifier

GOLDEN = Path(__file__).parent / "golden" / "schema2"
OURS = tuple(f"{os.sep}{package}{os.sep}" for package in ("edge_dfcil", "exporters"))
Draw = random.Random


@dataclass
class Account:
    """The results of a run, by verb."""

    succeeded: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    unexplained: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)  # the first of each unexplained kind


class Mine(Exception):
    """The error that a caller's own loader raises."""


# Invalid arguments


NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 3, 2**31, 2**70, 10**400, 1.5, float("nan"), float("inf"), -0.0, True),
    *(np.int64(2), np.float32(2)),
)
ODD: tuple[Any, ...] = (None, "", "x", b"x", [], {}, (), set(), object(), "1", "\ud800", "\x1b[2J", [None], {"x": 1}, int, len)
NAMES: tuple[Any, ...] = (
    *("0", "1", "new", "", " ", "0 ", "zero", "ZERO", "e\u0301", "\xe9"),
    *("\x1b[2J", "\ud800", "\u202e", "a\0b", "a\nb", "../x", "x" * 10**5),
    *(0, 1, None, b"0", float("nan"), ("0",), ["0"], np.str_("0"), True),
)


FOLDERS = (
    *("0", "5", "new", "NEW", "cafe\u0301", "caf\xe9", " ", "0 ", ".hidden", "__MACOSX", "\u202e", "a\nb", "\x1b[2J", "x" * 200),
    *("train", "val", "test", "images"),
    *("5", "6", "7", "apple", "pear") * 4,  # valid names, so that some tasks are learnt
)


def names(draw: Draw) -> Any:
    some = [draw.choice(NAMES) for _ in range(draw.randint(0, 4))]
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: some,
        lambda: tuple(some),
        lambda: draw.choice(NAMES),
        lambda: iter(some),
        lambda: dict(enumerate(some)),
        lambda: dict(zip(["0", "1", "9", 5], some, strict=False)),
        lambda: [str(digit) for digit in range(10)],
        lambda: draw.choice(ODD),
        lambda: np.array(["0", "1"]),
        lambda: torch.tensor([0, 1]),
    )
    return draw.choice(kinds)()


def tensors(draw: Draw) -> Any:
    plain = torch.randint(0, 256, (draw.choice([1, 2, 5]), 3, 16, 16), dtype=torch.uint8)
    floats = plain / 255
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: plain,
        lambda: floats,
        lambda: floats.requires_grad_(),
        lambda: plain.to_sparse(),
        lambda: floats.to_sparse(),
        lambda: plain.to("meta"),
        lambda: floats.to("meta"),
        lambda: floats.to(draw.choice([torch.float16, torch.bfloat16, torch.float64, torch.complex64])),
        lambda: plain.to(draw.choice([torch.int8, torch.int16, torch.int64, torch.bool])),
        lambda: floats * draw.choice([float("nan"), float("inf"), -1, 300]),
        lambda: torch.quantize_per_tensor(floats, 0.1, 0, torch.quint8),
        lambda: plain[:, :, ::3, ::2],
        lambda: plain.permute(0, 2, 3, 1),
        lambda: plain[0],
        lambda: plain[:, :1],
        lambda: plain[:, :2],
        lambda: plain[:0],
        lambda: plain[..., :0],
        lambda: torch.zeros([3] * draw.choice([0, 1, 2, 5, 6]), dtype=torch.uint8),
        lambda: plain.expand(2, *plain.shape),
        lambda: torch.nested.nested_tensor([floats[0], floats[0, :, :4]]),
        lambda: torch.nn.Parameter(floats),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return draw.choice(kinds)()


def arrays(draw: Draw) -> Any:
    plain = np.zeros((2, 3, 16, 16), np.uint8)
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: plain,
        lambda: plain[..., ::-1],
        lambda: plain.astype(draw.choice(["f2", "f4", ">f4", "f8", "i8", "u2", "c8", "O", "U3", "S2", "M8[s]", "?"])),
        lambda: np.zeros((2, 3, 16, 16), [("a", "u1")]),
        lambda: np.ma.masked_array(plain, plain == 0),
        lambda: np.array(None),
        lambda: np.full((2, 16, 16, 3), np.nan),
        lambda: np.zeros((1, 3, 16, 16), np.longdouble),
        lambda: plain[:, :, :1, :1],
        lambda: np.matrix([[1, 2]]) if hasattr(np, "matrix") else plain,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return draw.choice(kinds)()


def pictures(draw: Draw) -> Any:
    mode = draw.choice(["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "LA", "YCbCr", "LAB", "HSV", "PA", "RGBX", "La"])
    found = Image.new(mode, draw.choice([(16, 16), (1, 1), (1, 300), (0, 5), (40, 20)]))
    if draw.random() < 0.1:
        found.close()
    return found


def write_files(folder: Path) -> list[Any]:
    """Paths of pictures of many kinds, and of files that only look like pictures."""
    plain = Image.fromarray(np.arange(3 * 400, dtype=np.uint8).reshape(20, 20, 3) // 5)
    plain.save(folder / "plain.png")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(folder / "sixteen.png")
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    plain.convert("P").save(folder / "palette.png")
    plain.convert("RGBA").save(folder / "alpha.png")
    plain.save(folder / "animated.gif", save_all=True, append_images=[plain.rotate(90)])
    plain.resize((1, 1)).save(folder / "one.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "truncated.png").write_bytes((folder / "plain.png").read_bytes()[:300])
    (folder / "flipped.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[::-1])
    (folder / "renamed.png").write_text("hello")
    (folder / "named.txt").write_bytes((folder / "plain.png").read_bytes())
    (folder / "empty.png").touch()
    (folder / "a\nb\x1b[2J.png").write_bytes(b"x")
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.from_pillow(plain).save(folder / "photo.heic")
    for name in ("0", "1", ".hidden", "__MACOSX", "cafe\u0301", "empty"):
        (folder / "classes" / name).mkdir(parents=True)
        if name != "empty":
            for number in range(3):
                plain.rotate(number).save(folder / "classes" / name / f"{number}.png")
    (folder / "classes" / "0" / ".DS_Store").write_bytes(b"x")
    (folder / "classes" / "0" / "Thumbs.db").write_bytes(b"x")
    (folder / "classes" / "1" / "bad.png").write_bytes(b"x")
    with contextlib.suppress(OSError, NotImplementedError, AttributeError):
        (folder / "loop.png").symlink_to(folder / "loop.png")
        (folder / "link.png").symlink_to(folder / "plain.png")
        (folder / "nowhere.png").symlink_to(folder / "missing.png")
        (folder / "classes" / "0" / "around").symlink_to(folder / "classes")
        os.mkfifo(folder / "pipe.png")
    found: list[Any] = [*folder.iterdir(), folder / "missing.png", folder, "", "\0", "\ud800", "x" * 5000, Path("/dev/null")]
    return [*found, *map(str, found[:4]), os.fsencode(str(found[0]))]


class Kinds:
    """Draws arguments."""

    def __init__(self, folder: Path) -> None:
        (folder / "files").mkdir()
        self.files = write_files(folder / "files")
        self.train = digits()[0].of(("0", "1", "2"))

    def path(self, draw: Draw) -> Any:
        return draw.choice([*self.files, draw.choice(ODD)])

    def images(self, draw: Draw) -> Any:
        one = draw.choice([tensors, tensors, arrays, pictures, self.path, lambda draw: draw.choice([*NUMBERS, *ODD])])
        kind = draw.random()
        if kind < 0.6:
            return one(draw)
        some = [one(draw) for _ in range(draw.randint(1, 3))]
        if kind < 0.8:
            return some
        nested: Any = some
        for _ in range(draw.choice([1, 3, 5000])):
            nested = [nested]
        endless: list[Any] = []
        endless.append(endless)
        kinds = (iter(some), tuple(some), nested, endless, {"images": some[0]}, {"x": some[0]}, [{"image": some[0]}])
        return draw.choice(kinds)

    def targets(self, draw: Draw, count: int) -> Any:
        kinds: tuple[Callable[[], Any], ...] = (
            lambda: torch.randint(0, 3, (count,)),
            lambda: torch.full((count,), draw.choice([-1, 5, 99])),
            lambda: torch.zeros(count, dtype=draw.choice([torch.float32, torch.bool, torch.complex64, torch.uint8])),
            lambda: torch.zeros(count, device="meta", dtype=torch.long),
            lambda: torch.full((count,), float("nan")),
            lambda: torch.zeros(count, 3),
            lambda: torch.zeros(count + 1, dtype=torch.long),
            lambda: [draw.choice(NAMES) for _ in range(count)],
            lambda: torch.zeros(count, dtype=torch.long).to_sparse(),
            lambda: np.zeros(count, draw.choice(["i4", "f4", "O", "U2"])),
            lambda: draw.choice([*ODD, *NUMBERS]),
        )
        return draw.choice(kinds)()

    def loader(self, draw: Draw, learner: Learner | None = None) -> Any:
        batch = (torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1, 2, 0]))

        class Raises:
            def __iter__(self) -> Iterator[Any]:
                yield batch
                raise draw.choice([Mine, KeyError, OSError, ValueError, MemoryError, RecursionError])("mine")

        class Endless:
            def __iter__(self) -> Iterator[Any]:
                for number in range(60):
                    if number == 40 and learner is not None:
                        learner.cancel()
                    yield batch
                raise Mine("it would never end")

        class Changes:
            passes = 0

            def __iter__(self) -> Iterator[Any]:
                self.passes += 1
                yield batch if self.passes == 1 else draw.choice([(batch[0][:1], batch[1][:1]), (batch[0], batch[1] + 7), None])

        kinds: tuple[Callable[[], Any], ...] = (
            lambda: [(self.images(draw), self.targets(draw, 2)) for _ in range(draw.randint(0, 2))],
            lambda: [batch, (batch[0], self.targets(draw, 4))],
            lambda: [batch, (tensors(draw), self.targets(draw, 2))],
            lambda: [batch],
            Raises,
            Endless,
            Changes,
            lambda: iter([batch]),
            lambda: [{"image": batch[0], "label": self.targets(draw, 4)}],
            lambda: [{"x": 1}],
            lambda: self.images(draw),
            lambda: DataLoader(Dies(), num_workers=1) if draw.random() < 0.02 else Dies(),
        )
        return draw.choice(kinds)()


class Dies(Dataset[Any]):
    """A data set that ends the worker process that reads it."""

    classes = ("0", "1", "2")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if index == 2 and torch.utils.data.get_worker_info() is not None:
            os._exit(3)
        if index >= len(self):
            raise IndexError(index)
        return torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.tensor([index % 2])


# Verbs: each draws its arguments and makes one call


class Verbs:
    """Every public verb, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kinds = folder, Kinds(folder)
        self.file = folder / "m.safetensors"
        shutil.copy(GOLDEN / "closed_form.safetensors", self.file)
        self.base = Model.load(self.file, "cpu")
        self.content = self.file.read_bytes()
        self.learner = Learner.load(self.file, "cpu", precision="float32")
        self.before, self.digest = self.learner.model, self.learner.model.digest()
        self.onnx = OnnxClassifier(GOLDEN / "closed_form-any.onnx", threads=1)
        self.verbs = {name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")}

    def fresh(self) -> None:
        """Restores the model and its file."""
        if self.learner.model is not self.before:
            self.learner = self.learner.with_model(self.base)
            self.before = self.learner.model
        if self.file.read_bytes() != self.content:
            self.file.write_bytes(self.content)

    def changed(self) -> bool:
        return self.learner.model is not self.before or self.file.read_bytes() != self.content

    def do_new(self, draw: Draw) -> None:
        values = [*NUMBERS, *ODD, *NAMES]
        options: dict[str, Any] = {}
        for _ in range(draw.randint(1, 2)):
            given = ["image_size", "method", "recipe", "memory_budget", "precision", "seed", "weights", "mean", "std"]
            options[draw.choice(given)] = draw.choice([*values, (0.5,) * 3, [0.1, float("nan"), 1], np.ones(3), torch.ones(3)])
        backbone = draw.choice(["resnet8", "resnet8", draw.choice(values), torch.nn.Linear(3, 3), torch.nn.ReLU])
        device = draw.choice(["cpu", "cpu", "cpu", draw.choice(values), "meta", "cuda:99"])
        found = Learner(backbone, **{"image_size": 16, "device": device, "multiscale": False, **options})
        assert found.model.digest()

    def do_recipe(self, draw: Draw) -> None:
        names: list[Any] = [*SETTINGS, draw.choice([one for one in NAMES if isinstance(one, Hashable)])]
        name = draw.choice(names)
        value = draw.choice([*NUMBERS, *ODD, draw.choice(["3", "1e-3", "1e999", "nan", "none", "9" * 5000, "0.4,x", "true"])])
        if draw.random() < 0.5:
            found = RECIPES["edge"].changed({name: value})
        else:
            found = Recipe.from_dict({"preset": draw.choice(["edge", "x", None, 1]), name: value})
        assert Recipe.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found

    def do_predict(self, draw: Draw) -> None:
        images = self.kinds.images(draw)
        top_k = draw.choice([1, 1, 1, *NUMBERS, *ODD])
        reject: Any = draw.choice([False, True, None, "x"])
        for one in self.learner.predict(images, top_k, reject):
            assert one.top[0][0] in self.learner.classes and np.isfinite(one.score)

    def do_probabilities(self, draw: Draw) -> None:
        found = self.learner.probabilities(self.kinds.images(draw))
        assert found.shape[1] == 5 and bool(found.isfinite().all())

    def do_embed(self, draw: Draw) -> None:
        assert self.learner.embed(self.kinds.images(draw)).shape[1] == 624

    def do_evaluate(self, draw: Draw) -> None:
        found = self.learner.evaluate(self.kinds.loader(draw), draw.choice([None, names(draw), list("0123456789")]))
        assert 0 <= found.accuracy <= 1

    def do_learn_task(self, draw: Draw) -> None:
        options: dict[str, Any] = {"progress": False}
        if draw.random() < 0.3:
            option = draw.choice(["time_budget", "checkpoint", "callbacks"])
            options[option] = draw.choice([*NUMBERS[:3], *ODD])
        loader = self.kinds.loader(draw, self.learner)
        given = draw.choice([None, names(draw), ["5", "6", "7"], list("0123456789")])
        self.learner.learn_task(loader, given, relearn=draw.choice([False, True]), **options)

    def do_calibrate(self, draw: Draw) -> None:
        share = draw.choice([0.05, *NUMBERS, *ODD])
        self.learner.calibrate(self.kinds.loader(draw), list("0123456789"), false_rejections=share)

    def do_forget(self, draw: Draw) -> None:
        self.learner.forget(names(draw))

    def do_rename(self, draw: Draw) -> None:
        self.learner.rename(names(draw))

    def do_merge(self, draw: Draw) -> None:
        self.learner.merge(names(draw), draw.choice(NAMES))

    def do_dream(self, draw: Draw) -> None:
        n = draw.choice([*(value for value in NUMBERS if not (isinstance(value, int) and value > 3)), *ODD])
        quality: Any = draw.choice(["fast", "x", None])
        self.learner.dream(n, names(draw), quality=quality, progress=False)

    def do_distill(self, draw: Draw) -> None:
        settings: Any = draw.choice(ODD)
        if draw.random() < 0.7:
            values = {"rounds": 1, "dreams": 8, "generator_steps": 1, "steps": 1, "batch": 4, "source": "noise"}
            name = draw.choice([*values, "learning_rate", "temperature", "quality", "inherit"])
            settings = Distillation(**{**values, name: draw.choice([value for value in (*NUMBERS, *ODD) if value != 2**31])})
        to: Any = draw.choice(["resnet8", draw.choice([*NAMES, *ODD]), torch.nn.Linear(3, 3), torch.nn.ReLU])
        evaluation = draw.choice([None, self.kinds.loader(draw)])
        student, _ = distill(self.learner, to, settings=settings, evaluation=evaluation, classes=names(draw), progress=False)
        assert student.model is not self.before

    def do_prune(self, draw: Draw) -> None:
        settings: Any = draw.choice(ODD)
        if draw.random() < 0.7:
            given = draw.choice([{"ratio": draw.choice([*NUMBERS, *ODD])}, {"ratio": 0.1, "flops": 0.5}, {}, {"group": -1}])
            settings = Pruning(**given)
        prune(self.learner, settings, evaluation=self.kinds.loader(draw), progress=False)

    def do_adopt(self, draw: Draw) -> None:
        linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
        module: Any = draw.choice([linear, torch.nn.ReLU(), *ODD])
        Learner.from_classifier(module, names(draw), image_size=draw.choice([16, *NUMBERS, *ODD]), device="cpu")

    def do_audit(self, draw: Draw) -> None:
        members, others = self.kinds.loader(draw), self.kinds.loader(draw)
        given = draw.choice([None, names(draw), list("0123456789")])
        audit(self.learner.model, members, others, given, generated=draw.choice([None, None, tensors(draw)]))

    def do_save(self, draw: Draw) -> None:
        self.learner.save(self._target(draw))

    def do_load(self, draw: Draw) -> None:
        path = draw.choice([self.file, self.kinds.path(draw), self.kinds.path(draw)])
        device = draw.choice(["cpu", "cpu", draw.choice(NAMES), "meta"])
        Learner.load(path, device, backbone=draw.choice([None, None, *ODD]), memory_budget=draw.choice([None, *NUMBERS, *ODD]))

    def do_export(self, draw: Draw) -> None:
        options = {draw.choice(["format", "input", "calibration", "x"]): draw.choice([*ODD[1:], 3])}
        self.learner.export(self._target(draw), draw.choice([None, "int8", *ODD]), progress=False, **options)

    def _target(self, draw: Draw) -> Any:
        inside = self.folder / "out"
        inside.mkdir(exist_ok=True)
        kinds = [inside / name for name in ("m", "no/m", "x" * 300, ".", "a\0b", "\ud800")]
        return draw.choice([Path("/dev/null"), *kinds, *(one for one in ODD if not isinstance(one, str))])

    def do_onnx(self, draw: Draw) -> None:
        images = self.kinds.images(draw)
        if draw.random() < 0.5:
            assert self.onnx.probabilities(images).shape[1] == 5
        else:
            self.onnx.predict(images, draw.choice([1, 1, 1, *NUMBERS, *ODD]), draw.choice([False, True]))

    def do_onnx_open(self, draw: Draw) -> None:
        OnnxClassifier(self.kinds.path(draw), threads=draw.choice([0, 1, *NUMBERS, *ODD]), public_key=draw.choice([None, *ODD]))

    def do_command(self, draw: Draw) -> None:
        """A call of the command line. An exit status of 1 or 2 with a message counts as refused."""
        texts = [one for one in (*NAMES, *ODD) if isinstance(one, str) and one != "\ud800"] + [
            "-1",
            "--",
            "--x",
            "1e9",
            "nan",
            "--json",
        ]

        def some() -> str:
            return str(draw.choice([*self.kinds.files[:-1], *texts, str(self.file)])) if draw.random() < 0.8 else "0"

        model = draw.choice([str(self.file), str(self.file), some()])
        command = draw.choice(
            ["predict", "evaluate", "inspect", "forget", "rename", "dream", "verify", "sign", "export", "prune"]
        )
        given = [some() for _ in range(draw.randint(1, 3))]
        if command == "dream":
            given = [some(), "--per-class", draw.choice(["0", "-1", "x"])]
        if command == "export":
            given = [str(self._target(draw)), draw.choice(["--format", "--input"]), draw.choice(texts)]
        if command == "prune":
            given = ["--out", str(self._target(draw)), "--share", draw.choice(["0", "x", "2"])]
        _invoke([command, *(text.replace("\0", "").replace("\ud800", "") for text in (model, *given))])  # no system passes these

    def do_teach(self, draw: Draw) -> None:
        """`learn`, `evaluate` or `audit`, on a random tree of folders."""
        tree = self.folder / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        for _ in range(draw.randint(0, 4)):
            inside = [draw.choice(FOLDERS) for _ in range(draw.choice([0, 1, 1, 1, 2]))]
            self._fill(draw, tree.joinpath(*inside))
        options = draw.choice([["learn", "--model", str(self.file)], ["evaluate", str(self.file)], ["audit", str(self.file)]])
        given = {"learn": [str(tree)], "evaluate": [str(tree)], "audit": ["--members", str(tree), "--non-members", str(tree)]}
        size = ["--batch-size", draw.choice(["2", "32", "0", "x"])] if draw.random() < 0.2 else []
        extra = [*size, *draw.choice([[], [], ["--relearn"], ["--strict"]])] if options[0] == "learn" else []
        _invoke([*options, *given[options[0]], *extra])
        Model.load(self.file, "cpu")

    def _fill(self, draw: Draw, folder: Path) -> None:
        with contextlib.suppress(OSError):  # a link or a file may already have this name
            folder.mkdir(parents=True, exist_ok=True)
            files = [one for one in self.kinds.files if isinstance(one, Path) and one.is_relative_to(self.folder)]
            good = [one for one in files if one.name in ("plain.png", "palette.png", "alpha.png")]
            for number in range(draw.choice([0, 1, 12, 12])):
                source = draw.choice(files if draw.random() < 0.2 else good)
                target = folder / f"{number}{draw.choice(['', '.txt', '.JPG']) if draw.random() < 0.1 else source.suffix}"
                if draw.random() < 0.1:
                    target.symlink_to(draw.choice([source, folder, folder.parent]))
                elif source.is_file():
                    shutil.copy(source, target)


def _invoke(arguments: list[str]) -> None:
    """Runs a command line. An exit status of 1 or 2 with a message counts as refused; any other failure is raised."""
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    result.output.encode()
    if result.exit_code:
        assert result.exit_code in (1, 2) and result.stderr.strip(), f"exit {result.exit_code}: {result.output}"
        raise click.ClickException(result.stderr)


def explained(error: BaseException) -> bool:
    """Whether an error is one of the package, a built-in one that the package itself raises, or the loader's own."""
    if isinstance(error, (EdgeDfcilError, click.ClickException, Mine)):
        return bool(str(error))
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):  # Python's, which names it
        return True
    if any("the loader raised this" in note for note in getattr(error, "__notes__", ())):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = any(part in last.filename for part in OURS) and (last.line or "").startswith("raise ")  # not by an operator in it
    return type(error) in (TypeError, ValueError) and raised and bool(str(error))


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def run(inputs: int, folder: Path, seed: int = 0) -> Account:
    """Makes `inputs` calls, equally many of each verb. Raises `AssertionError` for an unexplained error, and for a verb that
    fails and changes the model."""
    verbs, draw, account = Verbs(folder), random.Random(seed), Account()
    torch.manual_seed(seed)
    for number in range(inputs):
        name, verb = [*verbs.verbs.items()][number % len(verbs.verbs)]
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                verb(draw)
        except Exception as error:
            if explained(error):
                _count(account.refused, name)
            else:
                _count(account.unexplained, name)
                place = traceback.extract_tb(error.__traceback__)
                ours = [frame for frame in place if any(part in frame.filename for part in OURS)][-1:]
                where = f"{ours[0].filename.rpartition(os.sep)[2]}:{ours[0].lineno}" if ours else "the harness"
                key = f"{name}: {type(error).__name__} in {where}"
                account.examples.setdefault(key, f"input {number}: {str(error)[:200]!r}")
            if verbs.changed():
                _count(account.unexplained, name)
                account.examples.setdefault(f"{name}: changed", f"input {number}: the verb failed and changed the model")
        else:
            _count(account.succeeded, name)
        verbs.fresh()
    assert verbs.learner.model.digest() == verbs.digest, "a verb has changed the tensors of a model, which is immutable"
    assert not account.examples, f"seed {seed}: {json.dumps(account.examples, indent=1)}\n{json.dumps(asdict(account))}"
    return account


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(asdict(run(given.inputs, Path(temporary), given.seed))))
