"""Kills a process that learns, again and again: `python -m tests.kills --kills 100`.

A second task is taught by the command line and killed with SIGKILL at random moments. After each kill the model file must load
and answer as it was committed; the same command must go on; and the result must be the one of a run without kills, to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from edge_dfcil import Model
from edge_dfcil.demo import digits

RECIPE = "edge"  # trains in a second task; the default's is one pass
SETTINGS = {
    "schedule.min_steps": 300,
    "schedule.first_epochs": 1,
    "schedule.epochs": 1,
    "generator.steps": 20,
    "generator.width": 16,
    "generator.latent": 16,
    "remember.pool": 128,
    "refine.epochs": 1,
    "refine.min_steps": 40,
}


@dataclass
class Account:
    """What a run of kills came to."""

    kills: int = 0
    survived: int = 0  # runs that ended before they were to be killed
    resumed: int = 0  # kills that left a checkpoint to go on from
    same: bool = False


def learn(images: Path, model: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edge_dfcil", "learn", str(images), "--model", str(model), "--device", "cpu"]
    command += ["--precision", "float32"]  # what is measured to be faster may differ from run to run, and its bits with it
    if not model.exists():
        command += ["--backbone", "resnet8", "--image-size", "16", "--no-flip", "--recipe", RECIPE]
        command += [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Two folders of pictures, 40 of each of two digits."""
    train, _ = digits()
    for task in ((0, 1), (2, 3)):
        for digit in task:
            place = folder / "-".join(map(str, task)) / str(digit)
            place.mkdir(parents=True)
            for number, image in enumerate(train.images[train.targets == digit][:40]):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    return folder / "0-1", folder / "2-3"


def run(kills: int, folder: Path, seed: int = 0) -> Account:
    """Kills the second task `kills` times, then lets it end. Raises `AssertionError` when anything was lost."""
    first, second = write_digits(folder)
    model, whole = folder / "killed" / "m.safetensors", folder / "whole" / "m.safetensors"
    for place in (model, whole):
        place.parent.mkdir()
    finish(learn(first, model))
    shutil.copy(model, whole)
    begin = time.perf_counter()
    finish(learn(second, whole))
    seconds, committed = time.perf_counter() - begin, Model.load(model, "cpu").digest()
    draw, account = random.Random(seed), Account()
    while account.kills < kills:
        process = learn(second, model)
        try:
            process.wait(draw.uniform(0.1, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            account.kills += 1
            account.resumed += any(path.name.endswith(".checkpoint") for path in model.parent.iterdir())
        found = Model.load(model, "cpu")
        if process.returncode != 0 and found.digest() == committed:
            continue
        assert found.classes == ("0", "1", "2", "3"), "killed between two models"
        assert found.digest() == Model.load(whole, "cpu").digest(), "not the model of a run without kills"
        if any(path.name.endswith(".checkpoint") for path in model.parent.iterdir()):
            finish(learn(second, model))  # killed between the save and the end: the same command says so and clears up
        account.survived += 1
        assert sorted(path.name for path in model.parent.iterdir()) == [model.name], "something is left beside the model"
        if account.kills < kills:  # once more from the first task
            shutil.rmtree(model.parent)
            model.parent.mkdir()
            finish(learn(first, model))
    if Model.load(model, "cpu").digest() == committed:
        finish(learn(second, model))
    account.same = Model.load(model, "cpu").digest() == Model.load(whole, "cpu").digest()
    assert account.same, "not the model of a run without kills"
    return account


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(asdict(run(given.kills, Path(temporary), given.seed))))
