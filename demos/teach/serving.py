"""Runs the server on 127.0.0.1: until it is interrupted, or in the background of a test or of the screenshots."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from demos.teach.app import RUNTIME, create_app
from demos.teach.teacher import Teacher

HOST = "127.0.0.1"  # not reachable from other machines


def _server(lesson: Teacher, runtime: Path = RUNTIME) -> uvicorn.Server:
    # An open event stream never ends by itself, so the server ends it one second after the signal.
    app = create_app(lesson, runtime)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=1))


def _listening(port: int) -> socket.socket:
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((HOST, port))
    return found


def _url(listening: socket.socket) -> str:
    return f"http://{HOST}:{listening.getsockname()[1]}"


def serve(lesson: Teacher, port: int) -> None:
    """Serves until Ctrl-C; port 0 takes a free one. Raises `OSError` when the port is in use."""
    with _listening(port) as listening:
        print(f"Open {_url(listening)}/ in a browser. Press Ctrl-C to stop the server.", flush=True)
        _server(lesson).run(sockets=[listening])


@contextlib.contextmanager
def in_background(lesson: Teacher, runtime: Path = RUNTIME) -> Iterator[str]:
    """Serves in a thread, and gives the address without a trailing slash."""
    server = _server(lesson, runtime)
    with _listening(0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield _url(listening)
        finally:
            server.should_exit = True
            thread.join(10)
