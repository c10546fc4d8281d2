"""Answers under load, and long learning: `python -m tests.load --calls 100000`, `python -m tests.load --tasks 50`.

Eight threads call a learner while it learns task after task. After each commit its file is replaced, and the workers of two real
servers (uvicorn) read it again: workers that were forked after the model had been loaded, and spawned ones. Every answer must be
exactly that of one version, which must not be older than the one committed, or saved, before the call began.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_dfcil import Commit, Learner, Model
from edge_dfcil.demo import NAMES, Batches, digits
from edge_dfcil.training.callbacks import Callback
from tests.conftest import quick_learner

THREADS, WORKERS, CLIENTS = 8, 2, 2  # that call in this process; of each server; that call it, for each worker
SHARES = {"threads": 0.6, "forked": 0.2, "spawned": 0.2}  # of the calls
CHUNKS, IMAGES = 24, 2  # different calls; images of each
COMMITS = 3  # versions, the first included; calls are made at least until there are so many
RECONNECT = 25  # calls until a connection, which stays with its worker, is renewed
MODEL = "EDGE_DFCIL_TESTS_MODEL"  # the environment variable that names a worker's model file
MARGIN = 4 * 2**20  # bytes that a process may grow by between the first and the last tasks of a soak test

Answer = tuple[tuple[Any, ...], ...]


@dataclass
class Account:
    """The results of a run.

    Attributes
    ----------
    calls
        Number of calls, by what answered them.
    versions
        Number of versions of the model, the first included.
    answered
        Number of versions that have answered, by what answered.
    resident
        Resident bytes of the process after each task of a soak test.
    grown
        Bytes by which the process and its model have grown between the tasks that are compared.
    """

    calls: dict[str, int] = field(default_factory=dict)
    versions: int = 0
    answered: dict[str, int] = field(default_factory=dict)
    tasks: int = 0
    resident: list[int] = field(default_factory=list)
    grown: tuple[int, int] = (0, 0)
    seconds: float = 0.0


def chunks() -> list[Tensor]:
    """The images of each call."""
    return list(digits()[1].images[: CHUNKS * IMAGES].split(IMAGES))


def answer_of(model: Any, images: Tensor) -> Answer:
    """The names and scores of each image's top three, as floats that survive JSON."""
    return tuple(tuple((name, float(score)) for name, score in one.top) for one in model.predict(images, 3))


# The server


class Served:
    """The model in a file, read again when the file has been replaced."""

    def __init__(self, path: str) -> None:
        self._path, self._read, self._model = path, (0, 0, 0), None

    def model(self) -> Model:
        about = os.stat(self._path)
        found = (about.st_ino, about.st_mtime_ns, about.st_size)
        if self._model is None or found != self._read:
            self._model, self._read = Model.load(self._path, "cpu"), found  # type: ignore[assignment]
        return self._model  # type: ignore[return-value]


_served: Served | None = None
_chunks: list[Tensor] = []


def prepare() -> Served:
    global _served
    if _served is None:
        _served, _chunks[:] = Served(os.environ[MODEL]), chunks()
    return _served


async def app(scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """GET /CHUNK: the answer as JSON, and the process that gave it."""
    model = prepare().model()
    body = json.dumps({"answer": answer_of(model, _chunks[int(scope["path"][1:])]), "process": os.getpid()}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve(kind: str) -> None:
    """Serves until SIGTERM, and prints the port first."""
    import uvicorn
    from uvicorn.supervisors import Multiprocess

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    settings: Any = {"log_level": "error", "lifespan": "off", "access_log": False}
    if kind == "spawned":
        # A worker imports torch; by default it is ended after 5 seconds without a sign of life.
        config = uvicorn.Config("tests.load:app", workers=WORKERS, timeout_worker_healthcheck=120, **settings)
        print(listening.getsockname()[1], flush=True)
        Multiprocess(config, [listening]).run()
        return
    answer_of(prepare().model(), _chunks[0])  # the model is loaded, and has answered, before the fork
    children = []
    for _ in range(WORKERS):
        child = os.fork()
        if not child:
            uvicorn.Server(uvicorn.Config(app, **settings)).run(sockets=[listening])
            os._exit(0)
        children.append(child)

    def end(*_: object) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    print(listening.getsockname()[1], flush=True)
    for child in children:
        os.waitpid(child, 0)


@contextlib.contextmanager
def server(kind: str, path: Path) -> Iterator[int]:
    """Runs a server in a child process; gives its port."""
    command = [sys.executable, "-m", "tests.load", "--serve", kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", MODEL: str(path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()}"
        with Connection(int(line)) as first:
            first(0)  # waits until a worker answers
        yield int(line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


# Clients


class Calls:
    """The calls of one kind: `number` of them, and more while `more()` is true.

    `seen` has, for each different answer, the newest version that was known before a call with that answer.
    """

    def __init__(self, number: int, more: Callable[[], bool] = lambda: False) -> None:
        self.made, self._number, self._more, self._lock = 0, number, more, threading.Lock()
        self.seen: dict[tuple[int, Answer], int] = {}
        self.failed: list[str] = []

    def take(self) -> int | None:
        """The number of the chunk of the next call; None when no call is left."""
        with self._lock:
            if self.failed or (self.made >= self._number and not self._more()):
                return None
            self.made += 1
            return self.made % CHUNKS

    def note(self, chunk: int, answer: Answer, known: int) -> None:
        with self._lock:
            self.seen[chunk, answer] = max(known, self.seen.get((chunk, answer), 0))

    def ask(self, how: Callable[[int], Answer], known: Callable[[], int]) -> None:
        """Makes calls until none is left."""
        try:
            while (chunk := self.take()) is not None:
                before = known()
                self.note(chunk, how(chunk), before)
        except Exception as error:
            self.failed.append(repr(error))

    def check(self, kind: str, right: list[list[Answer]]) -> int:
        """Raises `AssertionError` unless every answer is right: `right` has those of each version. Returns how many versions have
        answered."""
        assert not self.failed, f"{kind}: {self.failed[0]}"
        answered = set()
        for (chunk, answer), known in self.seen.items():
            versions = [number for number, answers in enumerate(right) if answers[chunk] == answer]
            assert versions, f"{kind}: an answer to call {chunk} is of no version: {answer}"
            assert versions[-1] >= known, f"{kind}: version {versions[-1]} answered after version {known} was committed"
            answered.add(versions[-1])
        return len(answered)


class Connection:
    """Calls a server over HTTP; the connection is renewed after `RECONNECT` calls."""

    def __init__(self, port: int) -> None:
        self._made, self._http = 0, http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def __call__(self, chunk: int) -> Answer:
        self._made += 1
        if self._made % RECONNECT == 0:
            self._http.close()  # the next call opens it again
        self._http.request("GET", f"/{chunk}")
        response = self._http.getresponse()
        body = response.read()
        assert response.status == 200, f"the server answered {response.status}: {body!r}"
        return tuple(tuple((name, score) for name, score in one) for one in json.loads(body)["answer"])


class Versions(Callback):
    """Every model that was committed, in order; the file is replaced after each commit."""

    def __init__(self, learner: Learner, path: Path) -> None:
        self._learner, self._path = learner, path
        self.models, self.saved = [learner.model], 0

    def on_commit(self, commit: Commit) -> None:
        self.models.append(self._learner.model)
        self._learner.save(self._path)
        self.saved = len(self.models) - 1


def tasks(train: Batches) -> Iterator[Batches]:
    """Tasks without end, of two digits each and few images."""
    while True:
        for begin in range(0, len(NAMES), 2):
            yield few_of(train, NAMES[begin : begin + 2], 40)


def few_of(train: Batches, names: tuple[str, ...], number: int) -> Batches:
    found = train.of(names)
    return Batches(found.images[:number], found.targets[:number])


def run(calls: int, folder: Path) -> Account:
    """Learns while `calls` answers are given. Raises `AssertionError` for an answer that is wrong, mixed, late or missing."""
    begin, path, train = time.perf_counter(), folder / "model.safetensors", digits()[0]
    learner, todo = quick_learner(precision="float32"), tasks(train)
    learner.learn_task(next(todo), NAMES, progress=False)
    learner.save(path)
    versions, images = Versions(learner, path), chunks()
    kinds = {kind: Calls(round(share * calls), lambda: len(versions.models) < COMMITS) for kind, share in SHARES.items()}
    with contextlib.ExitStack() as stack:
        threads = []

        def start(kind: str, how: Callable[[int], Answer], known: Callable[[], int]) -> None:
            threads.append(threading.Thread(target=kinds[kind].ask, args=(how, known)))

        for _ in range(THREADS):
            start("threads", lambda chunk: answer_of(learner, images[chunk]), lambda: len(versions.models) - 1)
        for kind in ("forked", "spawned"):
            port = stack.enter_context(server(kind, path))
            for _ in range(CLIENTS * WORKERS):
                start(kind, stack.enter_context(Connection(port)), lambda: versions.saved)
        for thread in threads:
            thread.start()
        account = Account(tasks=1)
        while any(thread.is_alive() for thread in threads) or account.tasks < 3:
            learner.learn_task(next(todo), NAMES, relearn=True, callbacks=[versions], progress=False)
            account.tasks += 1
        for thread in threads:
            thread.join()
    right = [[answer_of(model, chunk) for chunk in images] for model in versions.models]
    account.calls = {kind: asked.made for kind, asked in kinds.items()}
    account.versions = len(right)
    account.answered = {kind: asked.check(kind, right) for kind, asked in kinds.items()}
    account.seconds = time.perf_counter() - begin
    for kind, share in SHARES.items():
        assert account.calls[kind] >= round(share * calls) and account.answered[kind] > 1, f"{kind} did not see a new version"
    return account


# The soak test


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(number: int, folder: Path) -> Account:
    """Learns `number` tasks: every fifth adds a digit until all are known, the others refresh known ones.

    Raises `AssertionError` when, from the second fifth of the tasks to the last, the process grows by more than `MARGIN` plus
    four times the growth of its model.
    """
    begin, train, learner, account = time.perf_counter(), digits()[0], quick_learner(precision="float32"), Account()
    sizes, known = list[int](), list[str]()
    for task in range(number):
        if task % 5 == 0 and len(known) < len(NAMES):
            known.append(NAMES[len(known)])
        name = known[-1] if task % 5 == 0 else known[task % len(known)]
        learner.learn_task(few_of(train, (name,), 24), NAMES, relearn=True, progress=False)
        learner.save(folder / "soak.safetensors")
        account.resident.append(resident())
        sizes.append((folder / "soak.safetensors").stat().st_size)
    fifth = number // 5

    def growth(values: list[int]) -> int:
        return int(statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth]))

    account.tasks, account.seconds, account.grown = number, time.perf_counter() - begin, (growth(account.resident), growth(sizes))
    assert account.grown[0] <= 4 * max(0, account.grown[1]) + MARGIN, (
        f"the process grew by {account.grown[0]} bytes, its model by {account.grown[1]}"
    )
    return account


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=0)
    parser.add_argument("--serve", choices=("forked", "spawned"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.serve:
        serve(given.serve)
    with tempfile.TemporaryDirectory() as temporary:
        if given.calls:
            print(json.dumps(asdict(run(given.calls, Path(temporary)))))
        if given.tasks:
            print(json.dumps(asdict(soak(given.tasks, Path(temporary)))))
