"""The command line, in real processes: what it answers, what it refuses, and what a kill leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torchvision.transforms.v2.functional import to_pil_image

from edge_dfcil import Learner
from tests.conftest import NAMES, quick_learner

ENTRY = [sys.executable, "-m", "edge_dfcil.cli"]


def cli(*arguments, expect=0):
    done = subprocess.run([*ENTRY, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    assert "Traceback" not in done.stderr
    return done


def folder_of(root: Path, batches, names, per_class=12) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number, image in enumerate(batches.of((name,)).images[:per_class]):
            to_pil_image(image).save(root / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, train):
    root = tmp_path_factory.mktemp("pictures")
    return folder_of(root / "first", train, ("0", "1")), folder_of(root / "second", train, ("2", "3"))


@pytest.fixture
def model(learnt, tmp_path):
    return learnt.save(tmp_path / "model.safetensors")


def test_the_whole_story(pictures, model, tmp_path):
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
    assert "keeps no picture" in cli("inspect", model).stdout

    answer = json.loads(cli("dream", model, tmp_path / "dreams.png", "--per-class", 3, "--json").stdout)
    assert sum(answer["dreams"].values()) == 12
    assert (tmp_path / "dreams.png").stat().st_size > 0

    answer = json.loads(cli("export", model, tmp_path / "m.onnx", "--json").stdout)
    assert answer["classes"] == 4
    assert answer["bytes"] == (tmp_path / "m.onnx").stat().st_size


def test_a_new_model_has_the_settings_given(pictures, tmp_path):
    # One step is enough to see the settings; the recipe's numbers are not on the command line.
    path = tmp_path / "new.safetensors"
    cli("learn", pictures[0], "--model", path, "--backbone", "resnet8", "--image-size", 16, "--method", "finetune", "--no-flip")
    learner = Learner.load(path)
    assert (learner.backbone, learner.image_size, learner.method.name, learner.recipe.augmentation.flip) == (
        "resnet8",
        16,
        "finetune",
        False,
    )
    done = cli("learn", pictures[1], "--model", path, "--backbone", "resnet20", expect=1)
    assert "leave out --backbone" in done.stderr


def test_a_budget_is_planned_shown_and_kept_or_refused(pictures, model):
    before = model.read_bytes()
    shown = cli("learn", pictures[1], "--model", model, "--memory-budget", "300MB", "--dry-run").stdout
    assert "activations" in shown and "budget 300.0 MB" in shown
    plan = json.loads(cli("learn", pictures[1], "--model", model, "--dry-run", "--json").stdout)
    assert plan["budget"] is None and plan["peak_bytes"] > 0

    refused = cli("learn", pictures[1], "--model", model, "--memory-budget", "100KB", expect=1).stderr
    assert "What would help" in refused
    assert "is no size" in cli("learn", pictures[1], "--model", model, "--memory-budget", "much", expect=1).stderr
    assert model.read_bytes() == before

    report = json.loads(cli("learn", pictures[1], "--model", model, "--memory-budget", "300MB", "--json").stdout)
    assert report["peak_bytes"] <= report["plan"]["budget"] == 300_000_000


def test_damaged_pictures_are_named_skipped_and_counted_or_refused(learnt, train, tmp_path):
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


def test_a_model_becomes_smaller(pictures, model, tmp_path):
    """Distilled, pruned and in INT8: each a file of its own, the model as it was."""
    before = model.read_bytes()
    done = cli("distill", model, "--to", "resnet14", "--rounds", 1, "--eval", pictures[0], "--json")
    answer = json.loads(done.stdout)
    assert answer["student"] == "resnet14" and len(answer["accuracy"]) == 2
    assert Learner.load(answer["model"]).backbone == "resnet14"
    assert Path(answer["model"]) == tmp_path / "model-resnet14.safetensors"

    out = tmp_path / "small.safetensors"
    answer = json.loads(cli("prune", model, "--ratio", "0.1", "--no-repair", "--out", out, "--json").stdout)
    assert answer["filters"][1] <= 0.9 * answer["filters"][0]
    assert json.loads(cli("predict", out, pictures[0] / "0" / "1.png", "--json").stdout)[0]["label"] in ("0", "1")

    shown = cli(
        "export", model, tmp_path / "int8.onnx", "--quantize", "int8", "--calibration", pictures[0], "--eval", pictures[0]
    )
    assert "of the float file's size" in shown.stdout and "of the dreams" in shown.stdout
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "{model}", "--to", "resnet33"], "resnet33"),
        (["distill", "{model}", "--to", "resnet8", "--out", "{model}"], "is the model itself"),
        (["distill", "{model}", "--to", "resnet8", "--out", "{tmp}/no/m"], "make it first"),
        (["prune", "{model}"], "give one of ratio"),
        (["prune", "{model}", "--ratio", "2"], "above 0 and below 1"),
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
        (["dream", "{model}", "{tmp}/dreams"], "does not end like a picture"),
        (["export", "{model}", "{tmp}/no/m.onnx"], "make it first"),
    ],
)
def test_told_errors_exit_with_one_and_change_nothing(arguments, message, pictures, model, tmp_path):
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
def test_wrong_usage_exits_with_two(arguments):
    assert "Usage" in cli(*arguments, expect=2).stderr


def start_learning(pictures, model):
    """A learning process whose task takes long, once it is inside."""
    code = (
        "import signal, sys; from edge_dfcil.cli import main\n"
        "from edge_dfcil.training import Callback; import edge_dfcil.learner as l\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background of a shell ignores it
        "class Tell(Callback):\n"
        "    def on_step_end(self, *a): print('step', flush=True)\n"
        "l.with_progress = lambda callbacks, progress: [Tell()]\n"
        "sys.argv = ['edge-dfcil', 'learn', *sys.argv[1:]]; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pictures), "--model", str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "step\n"
    return process


@pytest.fixture
def slow_model(learnt, tmp_path):
    """A model whose next task would take an hour."""

    learnt.recipe = learnt.recipe.changed({"generator.steps": 1_000_000})
    return learnt.save(tmp_path / "slow.safetensors")


def test_killed_while_learning_the_old_model_is_intact(pictures, slow_model, test):
    before = slow_model.read_bytes()
    process = start_learning(pictures[1], slow_model)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert slow_model.read_bytes() == before
    assert [p.name for p in slow_model.parent.iterdir()] == [slow_model.name]
    assert Learner.load(slow_model).predict(test.images[:1])


def test_ctrl_c_is_told_and_the_old_model_is_intact(pictures, slow_model):
    before = slow_model.read_bytes()
    process = start_learning(pictures[1], slow_model)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "the model is the one from before" in stderr
    assert "Traceback" not in stderr
    assert slow_model.read_bytes() == before


def test_killed_at_any_moment_of_writing_the_file_is_the_old_or_the_new(tmp_path):
    """Processes that save in a loop are killed at different moments; what is on disk always loads."""
    path = quick_learner().save(tmp_path / "m")
    code = (
        "import sys; from edge_dfcil import Learner\n"
        "learner = Learner.load(sys.argv[1], 'cpu'); print('ready', flush=True)\n"
        "while True: learner.save(sys.argv[1])"
    )
    for delay in (0.0, 0.013, 0.027, 0.041):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        assert Learner.load(path, "cpu").classes == ()


def test_progress_is_quiet_when_nobody_watches(pictures, model):
    assert cli("learn", pictures[1], "--model", model).stderr == ""


def test_progress_is_shown_to_a_terminal(pictures, model):
    """On a pseudo-terminal: stage, epoch, losses, images a second."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*ENTRY, "learn", pictures[1], "--model", model],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "180"},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how a pseudo-terminal says that the other side is closed
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    process.communicate()
    assert process.returncode == 0
    for word in ("dream", "learn", "refine", "epoch 1/", "statistics", "images/s"):
        assert word in shown.decode()


def test_names_are_those_of_the_folders(pictures, model):
    assert NAMES[:2] == list(Learner.load(model).classes)
