"""Locks that keep two processes from writing one model file, and name their holder.

Two kinds, both released by the kernel when their process dies:

- `lock` is held during a write. Its file is hidden next to the model, so that containers and machines that share the folder
  see it, and is removed on release.
- `claim` is held for a whole run. Its file is in the system's temporary folder, so that a killed run leaves nothing next to
  the model; only processes of one user on one machine see it.

If neither place is writable, there is no lock, but `write(..., expected=...)` still refuses a file that has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from edge_dfcil.errors import ModelFileError
from exporters.files import hidden_name, resolve

WRITE_SECONDS = 60.0  # that a write waits for another one: a large model on a slow memory card takes that long

logger = logging.getLogger("edge_dfcil")


@contextlib.contextmanager
def lock(path: str | Path, timeout: float = WRITE_SECONDS) -> Iterator[None]:
    """Holds the lock of a model file while it is written.

    Parameters
    ----------
    path
        The model file, which need not exist; a symbolic link and its target share one lock.
    timeout
        Seconds to wait for another process or thread that holds the lock.

    Raises `ModelFileError` that names the holder if the lock is still held after that.
    """
    target = _target(path)
    with _held([target.with_name(hidden_name(target, ".lock")), _temporary(target, "write")], path, timeout):
        yield


@contextlib.contextmanager
def claim(path: str | Path, timeout: float = 0.0) -> Iterator[None]:
    """Claims a model file for a long run, so that a second run on it is refused at its start and not at its end.

    Raises `ModelFileError` that names the holder if another run has claimed the file. Writing needs no claim, and `lock`
    ignores claims.
    """
    with _held([_temporary(_target(path), "run")], path, timeout):
        yield


@contextlib.contextmanager
def _held(places: list[Path | None], path: str | Path, timeout: float) -> Iterator[None]:
    """Holds the first lock file that can be created; none if none can."""
    for place in places:
        found = place and FileLock(place, poll_interval=0.01, fallback_to_soft=False)
        if not found or not place:
            continue
        try:
            found.acquire(timeout=timeout)
        except Timeout as error:
            raise _busy(path, place) from error
        except (OSError, NotImplementedError) as error:  # the folder is read-only, or its file system has no locks
            logger.debug("no lock file at %s: %s", place, error)
            continue
        except RuntimeError as error:  # held by this thread
            raise _busy(path, place) from error
        try:
            _note_holder(place)
            yield
        finally:
            # Before the release: a waiting process checks whether its file still exists, and creates a new one.
            with contextlib.suppress(OSError):
                place.unlink()
            found.release()
        return
    logger.debug("%s is written without a lock", path)
    yield


def _target(path: str | Path) -> Path:
    try:
        return resolve(path)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be locked: {error.strerror or error}") from error


def _temporary(target: Path, purpose: str) -> Path | None:
    """The lock file in the temporary folder, in a subfolder that only this user can write to."""
    try:
        folder = Path(tempfile.gettempdir()) / f"edge-dfcil-{os.getuid() if hasattr(os, 'getuid') else 'locks'}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
            return None  # another user's, who could put anything there
    except OSError:
        return None
    return folder / f"{hashlib.sha256(os.fsencode(target)).hexdigest()[:32]}.{purpose}.lock"


def _note_holder(place: Path) -> None:
    with contextlib.suppress(OSError):  # Windows forbids it while the lock is held
        place.write_text(f"process {os.getpid()} on {socket.gethostname()}")


def _busy(path: str | Path, place: Path) -> ModelFileError:
    holder = "another process"
    with contextlib.suppress(OSError, ValueError):
        holder = place.read_text().strip() or holder
    return ModelFileError(f"{path} is in use by {holder}; wait until it has ended, or stop it. Nothing was written")
