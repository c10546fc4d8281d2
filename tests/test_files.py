"""Replacing a file: it has the old content or the new, at the place that the path resolves to, with its permissions kept."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_dfcil import ModelFileError
from edge_dfcil.model import file as storage
from exporters.files import check_writable, replace_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuses(code: int) -> Any:
    def rename(source: Any, target: Any, **_: Any) -> None:
        raise OSError(code, os.strerror(code), str(target))

    return rename


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.none() | st.binary(max_size=300), content=st.binary(max_size=300), renames=st.booleans())
def test_any_content_replaces_any_other(tmp_path: Path, before: Any, content: Any, renames: bool) -> None:
    path = tmp_path / "m"
    path.unlink(missing_ok=True)
    if before is not None:
        path.write_bytes(before)
    with pytest.MonkeyPatch.context() as patch:
        if not renames:
            patch.setattr(os, "replace", refuses(errno.EXDEV))
        replace_file(path, content)
    assert path.read_bytes() == content
    assert names(tmp_path) == ["m"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    target, inner, link = tmp_path / "volume" / "m", tmp_path / "inner", tmp_path / "link"
    target.write_bytes(b"old")
    inner.symlink_to(target)
    link.symlink_to("inner")
    replace_file(link, b"new")
    assert link.is_symlink() and inner.is_symlink()
    assert target.read_bytes() == b"new"
    assert names(tmp_path / "volume") == ["m"]


def test_a_link_to_nothing_yet_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "m")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "m").read_bytes() == b"new"


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(tmp_path / "loop", b"new")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        server.bind("socket")
        for name, message in [
            ("pipe", "pipe"),
            ("link", "pipe"),
            ("folder", "folder"),
            ("socket", "socket"),
            ("/dev/null", "device"),
        ]:
            mode = os.stat(name).st_mode
            for function in (lambda path: replace_file(path, b"new"), check_writable):
                with pytest.raises(OSError, match=message):
                    function(tmp_path / name)
            with pytest.raises(ModelFileError, match=message):
                storage.write(tmp_path / name, {}, {})
            assert os.stat(name).st_mode == mode
    assert names(tmp_path) == ["folder", "link", "pipe", "socket"]


def test_a_name_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    check_writable(path)
    replace_file(path, b"new")
    storage.write(path, {"a": torch.zeros(2)}, {})
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("name", "message"),
    [("x" * 256, "too long"), ("no/m", "make it first"), ("a\0b", "null"), ("\ud800", "encode")],
    ids=["long", "folder", "null", "surrogate"],
)
def test_a_name_that_cannot_be_is_known_before(tmp_path: Path, name: Any, message: str) -> None:
    with pytest.raises(OSError, match=message):
        check_writable(tmp_path / name)
    with pytest.raises(ModelFileError, match=message) as caught:
        storage.check_writable(tmp_path / name)
    str(caught.value).encode()  # any terminal can show it
    with pytest.raises(ModelFileError, match=message):
        storage.write(tmp_path / name, {}, {})
    assert not names(tmp_path)


def test_a_disk_without_room_is_known_before(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"old")
    check_writable(tmp_path / "m", 3)
    with pytest.raises(OSError, match="the disk has") as caught:
        check_writable(tmp_path / "m", 10**18)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["m"]


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
@pytest.mark.parametrize("renames", [True, False])
def test_the_mode_of_the_replaced_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, renames: bool) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old")
    path.chmod(mode)
    if not renames:
        monkeypatch.setattr(os, "replace", refuses(errno.EBUSY))
        if not os.access(path, os.W_OK):
            pytest.skip("it can be neither renamed nor written to")
    replace_file(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_a_new_file_follows_the_umask_which_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask is shared by all threads"))
        replace_file(tmp_path / "m", b"new")
    finally:
        monkeypatch.undo()
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o640


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES])
def test_where_no_rename_can_be_it_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: Any) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old and longer than the new one")
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "replace", refuses(code))
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_ino == inode
    assert names(tmp_path) == ["m"]


def test_a_failure_in_place_restores_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old " * 100)
    monkeypatch.setattr(os, "replace", refuses(errno.EBUSY))
    calls, sync = [], os.fsync

    def fails_after_the_write(descriptor: Any) -> None:
        calls.append(descriptor)
        if len(calls) == 2:  # the first is for the hidden file in the same folder
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fails_after_the_write)
    with pytest.raises(OSError, match="Input/output"):
        replace_file(path, b"new " * 500)
    assert path.read_bytes() == b"old " * 100
    assert names(tmp_path) == ["m"]


@pytest.mark.parametrize("renames", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, renames: bool, there: bool) -> None:
    """A real process whose files may not grow past 1,000 bytes, as on a full disk."""
    path = tmp_path / "m"
    if there:
        path.write_bytes(b"old" * 100)
    code = f"""
        import errno, os, resource, signal
        from exporters.files import replace_file
        def busy(source, target): raise OSError(errno.EBUSY, "busy")
        if not {renames}: os.replace = busy
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            replace_file({str(path)!r}, b"new" * 1000)
        except OSError as error:
            print(error.errno == errno.EFBIG)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert names(tmp_path) == (["m"] if there else [])
    assert not there or path.read_bytes() == b"old" * 100


def test_parts_of_killed_writers_are_removed_after_an_hour(tmp_path: Path) -> None:
    path = tmp_path / "m"
    killed = f"""
import os
from exporters.files import replace_file
os.replace = lambda part, target: os._exit(9)
replace_file({str(path)!r}, b"killed")
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == 9
    (part,) = tmp_path.iterdir()
    replace_file(path, b"new")
    assert part.exists(), "its writer may still be running"
    stranger = tmp_path / ".12345678-abcdef.part"
    stranger.write_bytes(b"of another file")
    for old in (part, stranger):
        os.utime(old, (0, 0))
    replace_file(path, b"new")
    assert names(tmp_path) == [stranger.name, "m"]
