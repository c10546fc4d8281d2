"""Replaces a file so that its path has the old content or the new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from pathlib import Path

# Errors of the kernel when a file cannot be created next to the target, or renamed over it, although the target itself may be
# writable: a single file that a container mounts, a folder of a read-only image.
_NO_RENAME = {errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}
_STALE_SECONDS = 3600.0
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def replace_file(path: str | Path, content: bytes) -> None:
    """Gives a file new content, all or nothing.

    The content is written to a hidden file in the same folder, flushed to the disk and renamed. A symbolic link stays a link:
    the file it points to is replaced. A file that is replaced keeps its mode, and its owner where that is allowed; a new one
    gets the mode that the umask gives it. Where a rename is impossible (a single file mounted into a container, a folder that
    cannot be written to), the file is overwritten in place, and its old content is restored if that fails; only a process
    that is killed in the middle of that can leave a damaged file.

    Raises `OSError` when the path is not a regular file or cannot be written. The file is then unchanged, and no other file is
    left.
    """
    target = resolve(path)
    try:
        _replace(target, content)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        _write_in_place(target, content)


def resolve(path: str | Path) -> Path:
    """The regular file, which may not exist yet, that a path leads to through symbolic links.

    Raises `OSError` for a path that is too long, that the file system cannot encode, or that leads to anything other than a
    regular file.
    """
    try:
        os.fsencode(path)
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    except UnicodeEncodeError as error:
        raise OSError(errno.EILSEQ, "the file system cannot encode this name") from error
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, f"this is not a file name ({error})") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file in it", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(stat.S_IFMT(mode), 'special')}, not a regular file", str(path))
    return Path(os.path.realpath(path))


def check_writable(path: str | Path, size: int | None = None) -> None:
    """Checks that `replace_file` can write `size` bytes to a path; None takes the size of the existing file.

    Call it before long work whose result is written there. It creates and removes an empty hidden file.
    Raises an `OSError` that says what prevents it.
    """
    target = resolve(path)
    folder = target.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is not a folder; make it first", str(path))
    exists = target.exists()  # also finds that the name is too long
    try:
        part, descriptor = _create_part(target)
        os.close(descriptor)
        os.unlink(part)
    except OSError as error:
        if error.errno not in _NO_RENAME or not (exists and os.access(target, os.W_OK)):
            raise
    needed = size if size is not None else target.stat().st_size if exists else 0
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes are needed in its folder, and the disk has {free} left", str(path))


def hidden_name(path: Path, ending: str) -> str:
    """A short hidden name that belongs to a file: never too long, however long the file's own name is."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}{ending}"


def _replace(target: Path, content: bytes) -> None:
    part, descriptor = _create_part(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            _keep_owner_and_mode(file.fileno(), target)
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    _sync_folder(target.parent)


def _create_part(target: Path) -> tuple[Path, int]:
    """A new file next to the target, open for writing, that no other user can read who cannot read the target."""
    _remove_stale_parts(target)
    part = target.with_name(hidden_name(target, f"-{secrets.token_hex(3)}.part"))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    mode = _mode_of(target)
    # The kernel applies the umask. Reading the umask would mean setting it, for all threads of the process.
    return part, os.open(part, flags, 0o666 if mode is None else mode & 0o666)


def _remove_stale_parts(target: Path) -> None:
    """Removes the hidden files of writers of the same file that were killed before they had finished."""
    with contextlib.suppress(OSError):
        for part in target.parent.glob(hidden_name(target, "-??????.part")):
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                part.unlink()


def _mode_of(path: Path) -> int | None:
    """The permission bits of a file; None if it does not exist."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


def _keep_owner_and_mode(descriptor: int, target: Path) -> None:
    try:
        before = os.stat(target)
    except FileNotFoundError:
        return
    if hasattr(os, "fchown"):
        mine = os.fstat(descriptor)
        if (mine.st_uid, mine.st_gid) != (before.st_uid, before.st_gid):
            with contextlib.suppress(OSError):  # only root may change the owner of a file
                os.fchown(descriptor, before.st_uid, before.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def _write_in_place(target: Path, content: bytes) -> None:
    """Writes without a rename. The old content is kept in memory until the new one is on the disk."""
    if not target.exists():
        try:
            with open(target, "xb") as file:
                _rewrite(file.fileno(), content)
        except FileExistsError:
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(target)
            raise
        return
    with open(target, "r+b") as file:
        before = file.read()
        try:
            _reserve(file.fileno(), len(content))
            _rewrite(file.fileno(), content)
        except BaseException:
            _rewrite(file.fileno(), before)
            raise


def _reserve(descriptor: int, size: int) -> None:
    """Reserves the space on the disk before any old byte is lost, where the file system can."""
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _rewrite(descriptor: int, content: bytes) -> None:
    os.lseek(descriptor, 0, os.SEEK_SET)
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.ftruncate(descriptor, len(content))
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the system can (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
