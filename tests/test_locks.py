"""Two writers of one file: they take turns, the second sees that the file has changed, and a dead process keeps no lock."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_dfcil import ModelFileError
from edge_dfcil.model import file as storage
from edge_dfcil.model.locks import claim, lock

A, B = {"a": torch.zeros(3)}, {"a": torch.ones(3)}


def names(folder: Path) -> list[Any]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_has_changed_is_not_overwritten(tmp_path: Path) -> None:
    path = storage.write(tmp_path / "m", A, {})
    seen = storage.digest_of(path)
    assert seen == storage.digest(A, {})
    storage.write(path, B, {}, expected=seen)
    with pytest.raises(ModelFileError, match=r"changed by another process since it was read\. Nothing was written\. Load"):
        storage.write(path, A, {}, expected=seen)
    assert torch.equal(storage.read(path)[0]["a"], B["a"])
    storage.write(path, A, {}, expected=storage.digest_of(path))
    storage.write(path, B, {})
    assert torch.equal(storage.read(path)[0]["a"], B["a"])


def test_a_file_that_came_or_went_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m"
    assert storage.digest_of(path) is None
    storage.write(path, A, {}, expected=None)
    with pytest.raises(ModelFileError, match="has been created by another process"):
        storage.write(path, B, {}, expected=None)
    seen = storage.digest_of(path)
    path.unlink()
    with pytest.raises(ModelFileError, match="has been removed by another process"):
        storage.write(path, B, {}, expected=seen)
    assert not names(tmp_path)
    path.write_text("something else")
    with pytest.raises(ModelFileError, match="not an edge-dfcil model file"):
        storage.write(path, B, {}, expected=seen)
    assert path.read_text() == "something else"


def test_a_busy_file_names_its_holder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "m")
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    for hold in (lock, claim):
        with hold(tmp_path / "m", timeout=0):
            found: list[Any] = []

            def other(found: Any = found, hold: Any = hold) -> None:
                try:
                    with hold(tmp_path / "link", timeout=0.02):
                        found.append("held")
                except ModelFileError as error:
                    found.append(str(error))

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            assert f"in use by {holder}; wait" in found[0]
            with pytest.raises(ModelFileError, match="in use"), hold(tmp_path / "m", timeout=0.02):
                pass
        with hold(tmp_path / "m", timeout=0):
            pass
    assert names(tmp_path) == ["link"], "no lock file is left"


def test_a_claim_leaves_the_folder_alone_and_lets_others_write(tmp_path: Path) -> None:
    with claim(tmp_path / "m"):
        assert not names(tmp_path)
        storage.write(tmp_path / "m", A, {})
    assert names(tmp_path) == ["m"]


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    code = f"""
import os
from edge_dfcil.model.locks import claim, lock
with lock({str(path)!r}), claim({str(path)!r}):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with lock(path, timeout=0), claim(path, timeout=0):
        pass
    storage.write(path, A, {})
    assert names(tmp_path) == ["m"]


def test_without_a_place_for_locks_it_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def read_only(self: Any, *args: Any, **settings: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(filelock.FileLock, "acquire", read_only)
    seen = storage.digest_of(storage.write(tmp_path / "m", A, {}))
    with pytest.raises(ModelFileError, match="has been created"):
        storage.write(tmp_path / "m", B, {}, expected=None)
    storage.write(tmp_path / "m", B, {}, expected=seen)


def test_writers_in_threads_take_turns(tmp_path: Path) -> None:
    path = storage.write(tmp_path / "m", {"n": torch.zeros(1)}, {})
    lost = []

    def count() -> None:
        for _ in range(10):
            while True:
                seen = storage.digest_of(path)
                n = storage.read(path)[0]["n"]
                try:
                    storage.write(path, {"n": n + 1}, {}, expected=seen if storage.digest({"n": n}, {}) == seen else "")
                    break
                except ModelFileError:
                    lost.append(1)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read(path)[0]["n"].item() == 30, "no count is lost"
    assert names(tmp_path) == ["m"]
