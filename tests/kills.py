"""Kills processes while they learn: `python -m tests.kills --kills 100`.

Each round begins with a model of one task and ends with a model of three. The command line learns two tasks in child processes,
which are killed with SIGKILL at a random moment, or while a file beside the model is being written. The tasks are learnt one
after the other or, in every second round, both at the same time. After each kill the model file must load and answer as last
committed, and the task of a command that has reported success must never be lost. Tasks that were learnt one after the other
must end in the model of a run without kills, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from PIL import Image

from edge_dfcil import Model
from edge_dfcil.demo import digits

TASKS = ("0-1", "2-3", "4-5")
RECIPE = "edge"  # trains in later tasks, too; with the default recipe they are one pass
SETTINGS = {
    "schedule.min_steps": 20,
    "schedule.first_epochs": 1,
    "schedule.epochs": 1,
    "generator.steps": 8,
    "generator.batch": 32,
    "generator.width": 16,
    "generator.latent": 16,
    "remember.pool": 64,
    "refine.epochs": 1,
    "refine.min_steps": 5,
}
BUSY = "in use by"  # the message of a command whose model another one is teaching
# Processes are forked from one that has loaded the package and has done nothing else, which saves some seconds for each.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["edge_dfcil.cli", "edge_dfcil.learner", "edge_dfcil.methods", "edge_dfcil.model.pictures"])


@dataclass
class Account:
    """The results of a run."""

    kills: int = 0
    while_writing: int = 0  # kills while a hidden file, a part or a checkpoint, was being written
    while_competing: int = 0  # kills while two processes taught one file
    resumed: int = 0  # kills that left a checkpoint to resume from
    refused: int = 0  # commands that ended because another one was teaching the model
    rounds: int = 0  # times that all tasks were learnt
    same: int = 0  # rounds without competition, each of which ended in the model of a run without kills


class Command:
    """`edge-dfcil learn` on one folder of pictures, in a child process."""

    def __init__(self, images: Path, model: Path) -> None:
        self.images, self.model = images, model
        self.log = model.parent.parent / f"{images.name}.log"
        self.process: BaseProcess = _PROCESSES.Process(target=_command, args=(_arguments(images, model), str(self.log)))
        self.process.start()

    def kill_at(self, moment: float, writing: bool) -> bool:
        """Waits for `moment` seconds, or until a hidden file is being written, and kills. False if it had ended by itself."""
        end = time.monotonic() + moment
        while self.process.is_alive() and time.monotonic() < end:
            if writing and _is_written(self.model.parent):
                break
            self.process.join(0.0005 if writing else max(0.0, end - time.monotonic()))
        self.process.kill()
        return self.end() < 0

    def end(self) -> int:
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        return code

    def finish(self) -> None:
        assert self.end() == 0, self.log.read_text()

    def is_refused(self) -> bool:
        """Whether it has ended because another process teaches the model."""
        return self.end() == 1 and BUSY in self.log.read_text()


def _arguments(images: Path, model: Path) -> list[str]:
    command = ["learn", str(images), "--model", str(model), "--device", "cpu"]
    # The precision that is measured to be faster may differ from run to run, and the bits with it.
    command += ["--batch-size", "16", "--precision", "float32"]
    if not model.exists():
        command += ["--backbone", "resnet8", "--image-size", "16", "--no-flip", "--recipe", RECIPE]
        command += [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    return command


def _command(arguments: Sequence[str], log: str) -> None:
    """Runs the command line with these arguments and ends the process with its exit status."""
    from edge_dfcil.cli import main

    with open(log, "w") as sys.stdout:  # kept from the terminal
        sys.stderr = sys.stdout
        main(list(arguments), prog_name="edge-dfcil")


def _is_written(folder: Path) -> bool:
    return any(path.name.endswith(".part") for path in folder.iterdir())


def learn(images: Path, model: Path) -> None:
    Command(images, model).finish()


def write_digits(folder: Path) -> list[Path]:
    """A folder of pictures for each task, 20 of each of two digits."""
    train, _ = digits()
    for task in TASKS:
        for digit in task.split("-"):
            place = folder / task / digit
            place.mkdir(parents=True)
            for number, image in enumerate(train.images[train.targets == int(digit)][:20]):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    return [folder / task for task in TASKS]


def run(kills: int, folder: Path, seed: int = 0) -> Account:
    """Kills `kills` times, in at least two rounds, and lets the last end. Raises `AssertionError` when anything was lost."""
    tasks = write_digits(folder)
    taught, seconds = [], 0.0  # the models of a run without kills, after each task
    whole = folder / "whole" / "m.safetensors"
    whole.parent.mkdir()
    for images in tasks:
        begin = time.monotonic()
        learn(images, whole)
        seconds = time.monotonic() - begin
        taught.append(shutil.copy(whole, folder / f"{images.name}.safetensors"))
    expected = [Model.load(path, "cpu").digest() for path in taught]
    draw, account = random.Random(seed), Account()
    while account.kills < kills or account.rounds < 2:
        model = folder / f"round{account.rounds}" / "m.safetensors"
        model.parent.mkdir()
        shutil.copy(taught[0], model)
        if account.rounds % 2:
            _compete(tasks[1:], model, kills, seconds, draw, account)
        else:
            for images, before, after in zip(tasks[1:], expected[:-1], expected[1:], strict=True):
                _one(images, model, (before, after), kills, seconds, draw, account)
            account.same += 1
        account.rounds += 1
        left = sorted(path.name for path in model.parent.iterdir() if not path.name.endswith(".part"))
        assert left == [model.name], f"left beside the model: {left}"
        shutil.rmtree(model.parent)
    return account


def _one(
    images: Path, model: Path, digests: tuple[str, str], kills: int, seconds: float, draw: random.Random, account: Account
) -> None:
    """Teaches one task to its end, with kills: before the commit the file is the old model, and after it the expected one."""
    before, after = digests
    while True:
        command, writing = Command(images, model), draw.random() < 0.3
        if account.kills < kills and command.kill_at(draw.uniform(0.0, 1.1) * seconds, writing):
            _count(account, model, writing=writing)
        elif command.end() == 0:
            break
        else:
            raise AssertionError(command.log.read_text())
        found = Model.load(model, "cpu").digest()
        assert found in (before, after), "neither the model before the task nor the one after it"
        if found == after and not _has_checkpoint(model):  # killed when there was nothing left to do
            break
    assert Model.load(model, "cpu").digest() == after, "not the model of a run without kills"


def _compete(tasks: Sequence[Path], model: Path, kills: int, seconds: float, draw: random.Random, account: Account) -> None:
    """Two processes teach one file, each a task of its own, and are killed, until both have reported success."""
    done: set[str] = set()
    while len(done) < len(tasks):
        commands = [Command(images, model) for images in draw.sample(tasks, len(tasks)) if images.name not in done]
        for command in commands:
            writing = draw.random() < 0.3
            if account.kills < kills and command.kill_at(draw.uniform(0.0, 1.1) * seconds, writing):
                _count(account, model, writing=writing, competing=len(commands) > 1)
                if set(command.images.name.split("-")) <= set(Model.load(model, "cpu").classes) and not _has_checkpoint(model):
                    done.add(command.images.name)  # killed when there was nothing left to do
            elif command.is_refused():
                account.refused += 1
            else:
                command.finish()
                done.add(command.images.name)
            # The other command may commit at any moment: what has been reported is there in any case.
            found = Model.load(model, "cpu").classes
            assert set("01").union(*(name.split("-") for name in done)) <= set(found), f"{done} was reported, {found} is there"
    assert Model.load(model, "cpu").classes in (tuple("012345"), tuple("014523"))


def _count(account: Account, model: Path, writing: bool, competing: bool = False) -> None:
    account.kills += 1
    account.while_writing += writing and _is_written(model.parent)
    account.while_competing += competing
    account.resumed += _has_checkpoint(model)


def _has_checkpoint(model: Path) -> bool:
    return any(path.name.endswith(".checkpoint") for path in model.parent.iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(asdict(run(given.kills, Path(temporary), given.seed))))
