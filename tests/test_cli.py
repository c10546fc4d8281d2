"""The command line: what it answers, what it refuses, and, in real processes, what a kill leaves behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from edge_dfcil import Callback, Learner, Session, SettingError, compression, exporting
from edge_dfcil.cli import main, predict
from edge_dfcil.cli.options import build_module, chosen_recipe
from edge_dfcil.demo import Batches
from edge_dfcil.model import file
from edge_dfcil.recipe import RECIPES
from exporters import files
from tests.conftest import NAMES, QUICK, quick_learner
from tests.golden.make import own_classifier

ROOT = Path(__file__).resolve().parent.parent
ENTRY = [sys.executable, "-m", "edge_dfcil"]
# Settings with which the first task of a new model takes about a second.
SHORT = [text for name, value in QUICK.differences().items() for text in ("--set", f"{name}={value}")]
SETTINGS = ["--backbone", "resnet8", "--image-size", "16", *SHORT]


def cli(*arguments: object, expect: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == expect, done.output
    return done


def folder_of(root: Path, batches: Any, names: Any, per_class: Any = 12) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number, image in enumerate(batches.of((name,)).images[:per_class]):
            to_pil_image(image).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, train: Batches) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pictures")
    return folder_of(root / "first", train, ("0", "1")), folder_of(root / "second", train, ("2", "3"))


@pytest.fixture
def model(learnt: Learner, tmp_path: Path) -> Path:
    return learnt.save(tmp_path / "model.safetensors")


def test_the_whole_story(pictures: Any, model: Path, tmp_path: Path) -> None:
    first, second = pictures
    answer = json.loads(cli("learn", second, "--model", model, "--json").stdout)
    assert answer["new_classes"] == ["2", "3"]
    assert answer["classes"] == ["0", "1", "2", "3"]
    assert answer["images"] == 24
    assert Learner.load(model).classes == ("0", "1", "2", "3")

    answer = json.loads(cli("evaluate", model, second, "--json").stdout)
    assert answer["n"] == 24
    assert set(answer["per_class"]) == {"2", "3"}

    done = cli("predict", model, first / "0" / "1.png", second / "3" / "2.png", "--top-k", 2, "--json")
    answers = json.loads(done.stdout)
    assert [a["image"] for a in answers] == [str(first / "0" / "1.png"), str(second / "3" / "2.png")]
    assert all(len(a["top"]) == 2 for a in answers)
    assert "1.png" in cli("predict", model, first / "0" / "1.png").stdout

    answer = json.loads(cli("inspect", model, "--json").stdout)
    assert answer["tasks"] == [["0", "1"], ["2", "3"]]
    assert set(answer["kept"]) == {"weight", "batchnorm statistic", "batchnorm counter"}
    assert {tensor["kind"] for tensor in answer["tensors"]} == set(answer["kept"])
    shown = cli("inspect", model, "--tensors").stdout
    assert "head.weight\tweight\t4x64\t" in shown
    assert "keeps no picture" in shown and "recipe edge (version 1), schedule.epochs 1" in shown

    answer = json.loads(cli("dream", model, tmp_path / "dreams.png", "--per-class", 3, "--json").stdout)
    assert sum(answer["dreams"].values()) == 12
    assert (tmp_path / "dreams.png").stat().st_size > 0

    answer = json.loads(cli("export", model, tmp_path / "m.onnx", "--input", "any", "--json").stdout)
    assert (answer["classes"], answer["input"]) == (4, "any")
    assert answer["bytes"] == (tmp_path / "m.onnx").stat().st_size


def test_a_new_model_has_the_settings_given(pictures: Any, tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    cli("learn", pictures[0], "--model", path, *SETTINGS, "--recipe", "edge", "--method", "finetune", "--no-flip", "--multiscale")
    learner = Learner.load(path)
    assert (learner.backbone, learner.image_size, learner.method.name, learner.recipe) == ("resnet8", 16, "finetune", QUICK)
    assert learner.network.scales.layers
    done = cli("learn", pictures[1], "--model", path, "--backbone", "resnet20", expect=1)
    assert "leave out --backbone" in done.stderr


class TestRecipe:
    def test_a_file_and_single_settings(self, pictures: Any, tmp_path: Path) -> None:
        path, new = tmp_path / "quick.json", tmp_path / "new"
        path.write_text(json.dumps(QUICK.to_dict()))
        settings = ["--recipe", path, "--set", "schedule.momentum=0.8", "--no-flip"]
        cli("learn", pictures[0], "--model", new, "--backbone", "resnet8", "--image-size", 16, "--method", "finetune", *settings)
        assert Learner.load(new).recipe == QUICK.changed({"schedule.momentum": 0.8})

    def test_a_model_that_is_there_learns_on_with_what_is_set(self, pictures: Any, model: Path) -> None:
        before = Learner.load(model).recipe
        cli("learn", pictures[1], "--model", model, "--set", "generator.steps=3", "--set", "remember.mu=0.5")
        assert Learner.load(model).recipe == before.changed({"generator.steps": 3, "remember.mu": 0.5})

    @pytest.mark.parametrize(
        "command",
        [
            ["dream", "{model}", "{tmp}/d.png"],
            ["export", "{model}", "{tmp}/m.onnx"],
            ["prune", "{model}", "--ratio", "0.1"],
            ["distill", "{model}", "--to", "resnet8"],
            ["learn", "{pictures}", "--model", "{model}"],
            ["demo"],
        ],
        ids=lambda command: command[0],
    )
    def test_a_setting_that_cannot_be_is_refused_by_every_command(
        self, command: list[Any], model: Path, pictures: Any, tmp_path: Path
    ) -> None:
        places = {"tmp": tmp_path, "model": model, "pictures": pictures[1]}
        arguments = [part.format(**places) for part in command]
        assert "recipe.generator.width is 0" in cli(*arguments, "--set", "generator.width=0", expect=1).stderr
        assert "'generator.width'" in cli(*arguments, "--set", "generator.wide=3", expect=1).stderr
        assert "edge, strict" in cli(*arguments, "--recipe", "slow", expect=1).stderr
        assert "GROUP.NAME=VALUE" in cli(*arguments, "--set", "width", expect=2).stderr
        assert {p.name for p in tmp_path.iterdir()} == {model.name}

    def test_a_name_wins_over_a_file_and_a_file_need_not_end_in_json(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "edge").write_text('{"generator": {"width": 8}}')
        (tmp_path / "mine").write_text('{"generator": {"width": 8}}')
        assert chosen_recipe(QUICK, None, {}) is QUICK
        assert chosen_recipe(QUICK, "edge", {}) == RECIPES["edge"]
        assert chosen_recipe(QUICK, "mine", {"schedule.epochs": "2"}).differences() == {
            "generator.width": 8,
            "schedule.epochs": 2,
        }
        with pytest.raises(SettingError, match=r"none\.json is not a recipe"):
            chosen_recipe(QUICK, "none.json", {})


class TestOwnModules:
    """A model whose backbone is the user's own module: every command takes the function that builds it."""

    @pytest.fixture
    def adopted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        torch.manual_seed(0)
        module = own_classifier().train()
        for _ in range(10):
            module(torch.rand(32, 3, 16, 16))
        statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
        learner = Learner.from_classifier(module, ["a", "b", "c"], image_size=16, recipe=QUICK, device="cpu", **statistics)
        (tmp_path / "mine.py").write_text(
            "from torch import nn\nfrom tests.golden.make import own_classifier\n"
            "class Factory:\n    def build(): return nn.Sequential(*own_classifier()[:-1], nn.Identity())\n"
            "def number(): return 3\ndef fails(): raise RuntimeError('no weights here')\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        return learner.save(tmp_path / "adopted.safetensors")

    @pytest.mark.slow
    def test_each_command(self, adopted: Any, pictures: Any, tmp_path: Path) -> None:
        module = ["--module", "mine:Factory.build"]
        cli("learn", pictures[0], "--model", adopted, *module)
        assert len(json.loads(cli("predict", adopted, pictures[0] / "0" / "1.png", "--json", *module).stdout)) == 1
        assert "accuracy" in cli("evaluate", adopted, pictures[0], *module).stdout
        assert "dreams" in cli("dream", adopted, tmp_path / "d.png", "--per-class", 1, *module).stdout
        assert "5 classes" in cli("export", adopted, tmp_path / "m.onnx", *module).stdout
        shown = cli("inspect", adopted).stdout
        assert shown.startswith("Sequential at 16 px, abd") and "keeps no picture" in shown
        assert cli("inspect", adopted, *module).stdout == shown

    def test_a_new_model_of_it(self, adopted: Any, pictures: Any, tmp_path: Path) -> None:
        path = tmp_path / "new"
        settings = ["--image-size", 16, "--method", "finetune", *SHORT, "--module", "mine:Factory.build"]
        cli("learn", pictures[0], "--model", path, *settings)
        assert Learner.load(path, backbone=nn.Sequential(*own_classifier()[:-1], nn.Identity())).classes == ("0", "1")
        refused = cli("learn", pictures[0], "--model", tmp_path / "other", "--backbone", "resnet8", *settings, expect=1)
        assert "--backbone and --module" in refused.stderr

    def test_without_it_the_option_is_named(self, adopted: Any, pictures: Any) -> None:
        assert "--module" in cli("predict", adopted, pictures[0] / "0" / "1.png", expect=1).stderr

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mine", "package.module:callable"),
            (":build", "package.module:callable"),
            ("nowhere:build", "No module named 'nowhere'"),
            ("mine:nothing", "nothing"),
            ("mine:fails", "no weights here"),
            ("mine:number", "a int was given"),
        ],
    )
    def test_what_builds_no_module_is_refused(self, adopted: Any, name: str, message: str) -> None:
        path = list(sys.path)
        with pytest.raises(ValueError, match=message):
            build_module(name)
        assert sys.path == path


def test_predict_answers_the_good_pictures_and_names_the_bad(
    pictures: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "AT_ONCE", 2)
    good = [pictures[0] / "0" / f"{number}.png" for number in range(3)]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"x")
    done = cli("predict", model, good[0], bad, good[1], tmp_path / "none.png", good[2], "--json", expect=1)
    assert [one["image"] for one in json.loads(done.stdout)] == [str(path) for path in good]
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "bad.png" in lines[0] and "none.png" in lines[1]
    alone = [json.loads(cli("predict", model, path, "--json").stdout)[0] for path in good]
    assert [one["label"] for one in json.loads(done.stdout)] == [one["label"] for one in alone]


@pytest.mark.slow
def test_a_budget_is_planned_shown_and_kept_or_refused(pictures: Any, model: Path) -> None:
    before = model.read_bytes()
    shown = cli("learn", pictures[1], "--model", model, "--memory-budget", "300MB", "--dry-run").stdout
    assert "activations" in shown and "budget 300.0 MB" in shown

    refused = cli("learn", pictures[1], "--model", model, "--memory-budget", "100KB", expect=1).stderr
    assert "What would help" in refused
    assert "is not a size" in cli("learn", pictures[1], "--model", model, "--memory-budget", "much", expect=1).stderr
    assert model.read_bytes() == before

    report = json.loads(cli("learn", pictures[1], "--model", model, "--memory-budget", "300MB", "--json").stdout)
    assert report["peak_bytes"] <= report["plan"]["budget"] == 300_000_000


@pytest.mark.slow
def test_the_precision_is_what_was_asked_for(pictures: Any, model: Path) -> None:
    assert "bfloat16" in cli("learn", pictures[1], "--model", model, "--precision", "half", expect=2).stderr
    report = json.loads(cli("learn", pictures[1], "--model", model, "--precision", "bfloat16", "--json").stdout)
    assert report["computing"] == {"precision": "bfloat16", "threads": None, "channels_last": True, "measured": {}}


def test_damaged_pictures_are_named_skipped_and_counted_or_refused(learnt: Learner, train: Batches, tmp_path: Path) -> None:
    model = learnt.save(tmp_path / "m")
    images = folder_of(tmp_path / "images", train, ("5", "6"))
    (images / "5" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    whole = (images / "6" / "3.png").read_bytes()
    (images / "6" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "6" / "notes.txt").write_text("not counted: not a picture by its ending")
    before = model.read_bytes()
    done = cli("learn", images, "--model", model, "--strict", expect=1)
    assert "broken.jpg" in done.stderr
    assert model.read_bytes() == before
    done = cli("learn", images, "--model", model, "--json")
    assert "broken.jpg" in done.stderr
    assert "cut.png" in done.stderr
    assert "skipped 2 of 26" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["images"] == 24
    assert len(answer["skipped"]) == 2


class TestSmaller:
    """Distillation, pruning and INT8: each writes a separate file and leaves the model unchanged. The settings are shortened."""

    @pytest.fixture(autouse=True)
    def _model_stays(self, model: Path) -> Iterator[None]:
        before = model.read_bytes()
        yield
        assert model.read_bytes() == before

    def test_distilled(self, pictures: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def quick(learner: Learner, to: Any, settings: Any, **more: Any) -> Any:
            few = replace(settings, dreams=32, generator_steps=2, steps=2, batch=16)
            return compression.distillation.distill(learner, to, settings=few, **more)

        monkeypatch.setattr(compression, "distill", quick)
        shown = cli(
            "distill", model, "--to", "resnet14", "--rounds", 1, "--eval", pictures[0], "--set", "generator.steps=2", "--json"
        )
        answer = json.loads(shown.stdout)
        assert answer["student"] == "resnet14" and len(answer["accuracy"]) == 2
        assert Learner.load(answer["model"]).backbone == "resnet14"
        assert Path(answer["model"]) == tmp_path / "model-resnet14.safetensors"

    @pytest.mark.slow
    def test_pruned(self, pictures: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def quick(learner: Learner, settings: Any, **more: Any) -> Any:
            return compression.pruning.prune(learner, replace(settings, dreams=32, rounds=2), **more)

        monkeypatch.setattr(compression, "prune", quick)
        out = tmp_path / "small.safetensors"
        answer = json.loads(cli("prune", model, "--ratio", "0.1", "--no-repair", "--out", out, "--json").stdout)
        assert answer["filters"][1] <= 0.9 * answer["filters"][0]
        assert json.loads(cli("predict", out, pictures[0] / "0" / "1.png", "--json").stdout)[0]["label"] in ("0", "1")

    @pytest.mark.slow
    def test_in_int8(self, pictures: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exporting, "MIN_CALIBRATION", 64)
        pictured = ["--calibration", pictures[0], "--eval", pictures[0]]
        shown = cli("export", model, tmp_path / "int8.onnx", "--quantize", "int8", "--force", *pictured).stdout
        assert "of the float file's size" in shown and "of the dreams" in shown


class TestCheckpoint:
    """The same command continues a stopped task, and no checkpoint is left once the model is saved."""

    @pytest.fixture
    def stopped(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        """Stops a task in the middle of a stage that has a checkpoint."""

        class Stop(Callback):
            def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
                if stage.name == "learn" and step == 5:
                    raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("edge_dfcil.running.with_progress", lambda *_: [Stop()])
            yield patched

    @pytest.mark.slow
    def test_the_same_command_goes_on(self, pictures: Any, model: Path, tmp_path: Path, stopped: Any) -> None:
        whole = shutil.copy(model, tmp_path / "whole.safetensors")
        done = cli("learn", pictures[1], "--model", model, expect=1)
        assert "the same command continues" in done.stderr and "the model is unchanged" in done.stderr
        (checkpoint,) = tmp_path.glob(".*")
        assert Learner.load(model).classes == ("0", "1")
        stopped.undo()
        assert json.loads(cli("learn", pictures[1], "--model", model, "--json").stdout)["resumed"]
        assert not checkpoint.exists()
        assert not json.loads(cli("learn", pictures[1], "--model", whole, "--json").stdout)["resumed"]
        one, other = (file.read(path)[0] for path in (model, whole))
        assert all(torch.equal(one[name], other[name]) for name in other)

    @pytest.mark.slow
    def test_another_task_begins_from_its_start(
        self, pictures: Any, model: Path, tmp_path: Path, train: Batches, stopped: Any
    ) -> None:
        cli("learn", pictures[1], "--model", model, expect=1)
        stopped.undo()
        other = folder_of(tmp_path / "other", train, ("5", "6"))
        assert not json.loads(cli("learn", other, "--model", model, "--json").stdout)["resumed"]
        assert not [*tmp_path.glob(".*")]

    @pytest.mark.slow
    @pytest.mark.parametrize("enough", [True, False])
    def test_a_disk_that_is_full_in_the_end_gives_the_model_the_room_of_the_checkpoint(
        self, pictures: Any, model: Path, monkeypatch: pytest.MonkeyPatch, enough: bool
    ) -> None:
        replace_file = files.replace_file

        def full(path: Any, content: bytes) -> None:
            if Path(path) == model and (not enough or [*model.parent.glob(".*.checkpoint")]):
                raise OSError(errno.ENOSPC, "No space left on device")
            replace_file(path, content)

        with monkeypatch.context() as patched:
            patched.setattr(files, "replace_file", full)
            failed = cli("learn", pictures[1], "--model", model, expect=0 if enough else 1).stderr
        assert len([*model.parent.glob(".*.checkpoint")]) == (0 if enough else 1)
        if not enough:
            assert "No space left" in failed and Learner.load(model).classes == ("0", "1")
            assert json.loads(cli("learn", pictures[1], "--model", model, "--json").stdout)["resumed"]
        assert Learner.load(model).classes == ("0", "1", "2", "3")

    @pytest.mark.slow
    def test_stopped_after_the_model_was_saved_there_is_nothing_left_to_do(
        self, pictures: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Session, "clear_checkpoint", lambda session: (_ for _ in ()).throw(KeyboardInterrupt))
            cli("learn", pictures[1], "--model", model, expect=1)
        assert [*tmp_path.glob(".*")]
        saved = model.read_bytes()
        assert "had learnt this" in cli("learn", pictures[1], "--model", model).stdout
        assert model.read_bytes() == saved and not [*tmp_path.glob(".*")]
        assert "known already" in cli("learn", pictures[1], "--model", model, expect=1).stderr

    @pytest.mark.slow
    def test_one_can_be_named_or_none(self, pictures: Any, model: Path, tmp_path: Path, stopped: Any) -> None:
        before = {*tmp_path.iterdir()}
        done = cli("learn", pictures[1], "--model", model, "--checkpoint", "none", expect=1)
        assert {*tmp_path.iterdir()} == before and "continues from here" not in done.stderr
        cli("learn", pictures[1], "--model", model, "--checkpoint", tmp_path / "here", expect=1)
        assert {*tmp_path.iterdir()} == before | {tmp_path / "here"}

    @pytest.mark.slow
    def test_a_time_budget_is_kept_in_the_report(self, pictures: Any, model: Path) -> None:
        report = json.loads(cli("learn", pictures[1], "--model", model, "--time-budget", "10min", "--json").stdout)
        assert report["fitted"]["share"] == 1
        assert "is not a time" in cli("learn", pictures[0], "--model", model, "--time-budget", "soon", expect=1).stderr


def test_classes_are_renamed_and_forgotten(pictures: Any, model: Path) -> None:
    assert "cat" in cli("rename", model, "0", "cat", "1", "dog").stdout
    assert Learner.load(model).classes == ("cat", "dog")
    assert json.loads(cli("forget", model, "cat", "--json").stdout)["classes"] == ["dog"]
    assert Learner.load(model).classes == ("dog",)
    before = model.read_bytes()
    assert "pairs" in cli("rename", model, "dog", expect=2).stderr
    assert "fox" in cli("forget", model, "fox", expect=1).stderr
    assert "every class" in cli("forget", model, "dog", expect=1).stderr
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "{model}", "--to", "resnet33"], "resnet33"),
        (["distill", "{model}", "--to", "resnet8", "--out", "{model}"], "is the model itself"),
        (["distill", "{model}", "--to", "resnet8", "--out", "{tmp}/no/m"], "make it first"),
        (["prune", "{model}"], "give one of ratio"),
        (["prune", "{model}", "--ratio", "2"], "Pruning.ratio is 2.0; it must be below 1"),
        (["export", "{model}", "{tmp}/m.onnx", "--eval", "{pictures}"], "for quantize='int8'"),
        (["learn", "{tmp}/nowhere", "--model", "{model}"], "is not a folder"),
        (["learn", "{tmp}", "--model", "{model}"], "folder of pictures for each class"),
        (["learn", "{pictures}", "--model", "{model}"], "known already"),
        (["learn", "{pictures}", "--model", "{tmp}/no/model"], "make it first"),
        (["learn", "{pictures}", "--model", "{tmp}/new", "--backbone", "resnet33"], "resnet33"),
        (["learn", "{pictures}", "--model", "{tmp}/new", "--recipe", "slow"], "slow"),
        (["predict", "{model}", "{tmp}/nothing.png"], "nothing.png"),
        (["predict", "{tmp}/nothing", "{tmp}/nothing.png"], "is not a file"),
        (["evaluate", "{model}", "{pictures2}"], "does not know '2', '3'"),
        (["inspect", "{pictures}/0/0.png"], "not an edge-dfcil model file"),
        (["dream", "{model}", "{tmp}/no/dreams.png"], "make it first"),
        (["dream", "{model}", "{tmp}/dreams"], "does not have the ending of a picture"),
        (["export", "{model}", "{tmp}/no/m.onnx"], "make it first"),
        (["export", "{model}", "{model}"], "onnx (.onnx)"),
        (["export", "{model}", "{tmp}/m.keras"], "onnx (.onnx)"),
        (["export", "{model}", "{tmp}/m.onnx", "--format", "tflite"], "onnx (.onnx)"),
        (["export", "{model}", "{tmp}/m.bin", "--format", "onnx"], "rename it"),
        (["dream", "{model}", "{tmp}"], "does not have the ending of a picture"),
        (["prune", "{model}", "--ratio", "0.1", "--out", "{model}"], "is the model itself"),
        (["learn", "{pictures2}", "--model", "{tmp}"], "folder"),
        (["learn", "{pictures2}", "--model", "{tmp}/new", "--recipe", "{pictures}/0/0.png"], "is not a recipe"),
    ],
)
def test_reported_errors_exit_with_one_and_change_nothing(
    arguments: list[Any], message: str, pictures: Any, model: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"tmp": empty, "model": model, "pictures": pictures[0], "pictures2": pictures[1]}
    before = model.read_bytes()
    done = cli(*[argument.format(**places) for argument in arguments], expect=1)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    "arguments", [["learn"], ["fly"], ["predict", "model"], ["learn", "x", "--model", "m", "--batch-size", "1"]]
)
def test_wrong_usage_exits_with_two(arguments: list[Any]) -> None:
    assert "Usage" in cli(*arguments, expect=2).stderr


def start_learning(pictures: Any, model: Path) -> Any:
    """Starts a process that learns a long task, and returns it after its first step."""
    code = (
        "import signal, sys; from edge_dfcil.cli import main\n"
        "from edge_dfcil import Callback; import edge_dfcil.running as l\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background of a shell ignores SIGINT
        "class Say(Callback):\n"
        "    def on_step_end(self, *a): print('step', flush=True)\n"
        "l.with_progress = lambda callbacks, progress: [Say()]\n"
        "sys.argv = ['edge-dfcil', 'learn', *sys.argv[1:]]; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pictures), "--model", str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "step\n"
    return process


@pytest.fixture
def slow_model(learnt: Learner, tmp_path: Path) -> Path:
    """A model whose next task would take an hour."""

    learnt.recipe = learnt.recipe.changed({"generator.steps": 1_000_000})
    return learnt.save(tmp_path / "slow.safetensors")


@pytest.mark.slow
def test_killed_while_learning_the_old_model_is_intact(pictures: Any, slow_model: Any, test: Batches) -> None:
    before = slow_model.read_bytes()
    process = start_learning(pictures[1], slow_model)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert slow_model.read_bytes() == before
    assert [p.name for p in slow_model.parent.iterdir()] == [slow_model.name]
    assert Learner.load(slow_model).predict(test.images[:1])


@pytest.mark.slow
def test_ctrl_c_is_reported_and_the_old_model_is_intact(pictures: Any, slow_model: Any) -> None:
    before = slow_model.read_bytes()
    process = start_learning(pictures[1], slow_model)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "the model is unchanged" in stderr
    assert "Traceback" not in stderr
    assert slow_model.read_bytes() == before


@pytest.mark.slow
def test_killed_at_any_moment_of_writing_the_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    """Children that save in a loop are killed at different moments; the file on disk always loads."""
    path = quick_learner().save(tmp_path / "m")
    code = (
        "import os, sys, torch; from edge_dfcil import Learner\n"
        "learner = Learner.load(sys.argv[1], 'cpu')\n"
        "for _ in sys.stdin:\n"
        "    child = os.fork()\n"
        "    while child == 0: learner.save(sys.argv[1])\n"
        "    print(child, flush=True); os.waitpid(child, 0); print('ended', flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        for delay in (0.0, 0.005, 0.013, 0.02, 0.027, 0.035, 0.041, 0.05):
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "ended\n"
            assert Learner.load(path, "cpu").classes == ()


@pytest.mark.slow
def test_progress_is_quiet_without_a_terminal(pictures: Any, model: Path) -> None:
    assert cli("learn", pictures[1], "--model", model).stderr == ""


@pytest.mark.slow
def test_progress_is_shown_to_a_terminal(pictures: Any, model: Path) -> None:
    """On a pseudo-terminal: stage, epoch, losses, images per second."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*ENTRY, "learn", pictures[1], "--model", model],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "180"},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # raised when the other side of the pseudo-terminal is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    process.communicate()
    assert process.returncode == 0
    for word in ("dream", "learn", "refine", "epoch 1/", "statistics", "images/s"):
        assert word in shown.decode()


def test_a_link_to_the_model_is_the_model_itself(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(model)
    before = model.read_bytes()
    assert "is the model itself" in cli("export", model, tmp_path / "link.onnx", expect=1).stderr
    assert model.read_bytes() == before


class TestBeforeLearning:
    """What would fail after minutes of learning is refused before it starts."""

    @pytest.fixture(autouse=True)
    def _learning_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Learner, "session", lambda *_, **__: pytest.fail("it learns"))

    @pytest.mark.parametrize("name", ["no/model", "x" * 300, "folder"])
    def test_a_file_that_cannot_be_written(self, name: Any, pictures: Any, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        done = cli("learn", pictures[0], "--model", tmp_path / name, *SETTINGS, expect=1)
        assert done.stderr.startswith("error: ") and [p.name for p in tmp_path.iterdir()] == ["folder"]

    def test_a_class_folder_whose_name_is_not_utf8(self, pictures: Any, model: Path, tmp_path: Path) -> None:
        images = tmp_path / "images"
        shutil.copytree(pictures[0] / "0", images / "tea")
        shutil.copytree(pictures[0] / "1", images / os.fsdecode(b"caf\xe9"))
        assert "caf" in cli("learn", images, "--model", model, expect=1).stderr

    def test_a_model_that_another_process_teaches(self, pictures: Any, model: Path) -> None:
        with file.claim(model):
            assert "in use" in cli("learn", pictures[1], "--model", model, expect=1).stderr


class TestStreams:
    def test_python_dash_m_is_the_command(self, model: Path) -> None:
        for name in ("edge_dfcil", "edge_dfcil.cli"):
            done = subprocess.run([sys.executable, "-m", name, "--version"], capture_output=True, text=True)
            assert (done.returncode, done.stdout.split()[0]) == (0, "edge-dfcil,")
            assert (
                "Usage: edge-dfcil "
                in subprocess.run([sys.executable, "-m", name, "--help"], capture_output=True, text=True).stdout
            )

    @pytest.mark.parametrize("closed", ["| head -1", "| true", ">&-", "2>&- >&-", "> /dev/full"])
    def test_a_stdout_that_is_closed_or_full_ends_in_no_traceback(self, closed: str) -> None:
        """With a command of the same group class that does not import torch, so that the processes start fast."""
        code = (
            "import click\nfrom edge_dfcil.cli.console import Commands, answer, note\n"
            "@click.group(cls=Commands)\ndef main(): pass\n"
            "@main.command()\ndef talk():\n    answer(None, False, ['line'] * 100_000)\n    note('done')\nmain(['talk'])\n"
        )
        line = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", code]
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr
        assert ("No space left" in done.stderr) == ("full" in closed)
        if closed in (">&-", "> /dev/full"):
            assert ("done" in done.stderr) == (closed == ">&-")

    @pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
    def test_names_that_a_terminal_cannot_show_are_written_as_codes(
        self, learnt: Learner, pictures: Any, tmp_path: Path, encoding: str
    ) -> None:
        learnt.rename({"0": "кошка", "1": "café"})
        model, runner = learnt.save(tmp_path / "м.safetensors"), CliRunner(charset=encoding)
        done = runner.invoke(main, ["inspect", str(model)])
        assert done.exit_code == 0 and r"\u043a\u043e" in done.stdout and done.stderr == ""
        found = runner.invoke(main, ["predict", str(model), str(pictures[0] / "0" / "0.png"), "--json"])
        assert json.loads(found.stdout)[0]["label"] in ("кошка", "café") and found.stdout.isascii()
        missing = runner.invoke(main, ["predict", str(model), str(tmp_path / "ж.png")])
        assert missing.exit_code == 1 and r"\u0436.png" in missing.stderr

    def test_json_is_one_line_and_has_no_nan(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read = file.read
        monkeypatch.setattr(file, "read", lambda path: (read(path)[0], {**read(path)[1], "seed": float("nan")}))
        shown = cli("inspect", model, "--json").stdout
        assert shown.count("\n") == 1 and json.loads(shown)["seed"] is None

    def test_a_warning_is_one_line_without_a_place_in_the_code(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read = file.read
        monkeypatch.setattr(file, "read", lambda path: (warnings.warn("look\n  out", stacklevel=1), read(path))[1])
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            done = cli("inspect", model)
        assert done.stderr == "warning: look out\n" and "keeps no picture" in done.stdout

    @pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), KeyboardInterrupt()])
    def test_what_the_machine_raises_is_one_line(self, model: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
        def fails(path: Path) -> None:
            raise error

        monkeypatch.setattr(file, "read", fails)
        done = cli("inspect", model, expect=1)
        assert done.stdout == "" and done.stderr.count("\n") == 1

    def test_streams_are_left_as_they_were(self, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
        before = sys.stdout.errors, warnings.showwarning
        with pytest.raises(SystemExit):
            main(["inspect", str(model)])
        assert (sys.stdout.errors, warnings.showwarning) == before


def test_names_are_those_of_the_folders(pictures: Any, model: Path) -> None:
    assert NAMES[:2] == list(Learner.load(model).classes)
