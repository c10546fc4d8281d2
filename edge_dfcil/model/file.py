"""The model file: one safetensors file, whose metadata contains the settings as JSON, a schema version and a SHA-256.

It contains weights, BatchNorm and class statistics, class names and settings, and nothing that can run code. A file is a
"model", or the "checkpoint" of a task in progress; one is never read as the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edge_dfcil._version import __version__
from edge_dfcil.errors import ModelFileError
from edge_dfcil.model.locks import claim, lock
from exporters import files
from exporters.texts import MAX_TEXT, parse_json, shown

__all__ = ["ANY", "SCHEMA", "check_writable", "claim", "digest", "digest_of", "lock", "read", "write"]

SCHEMA = 2
MAX_HEADER = 3 * MAX_TEXT  # bytes: the settings, escaped, and the name and shape of each tensor
Kind = Literal["model", "checkpoint"]
# What safetensors, JSON, and look-ups in their results raise for a damaged or malicious header.
_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError)


class _Any(Enum):
    ANY = "any"


ANY = _Any.ANY  # `write` replaces any version of the file


def digest(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 over the settings and every tensor's name, dtype, shape and bytes, in order of name."""
    state = hashlib.sha256(_canonical(settings))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # NumPy has no bfloat16
    return state.hexdigest()


def digest_of(path: str | Path) -> str | None:
    """The SHA-256 that a file's header states; None if there is no file. Reads no tensor.

    Raises `ModelFileError` for a file that is damaged, of another program or from a later version.
    """
    if isinstance(path, (str, os.PathLike)) and not os.path.exists(path):
        return None
    _check_is_file(path)
    with _Reading(path) as file:
        sha256: str = file.about["sha256"]
        return sha256


def check_writable(path: str | Path, size: int | None = None) -> None:
    """Raises `ModelFileError` when `write` could not write `size` bytes to `path`; None takes the size of the existing file.

    Call it before hours of learning whose result is written there.
    """
    try:
        files.check_writable(path, size)
    except OSError as error:
        raise ModelFileError(f"{_shown(path)} cannot be written: {error.strerror or error}") from error


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    expected: str | Literal[_Any.ANY] | None = ANY,
    *,
    kind: Kind = "model",
) -> Path:
    """Writes a model file atomically, under its lock.

    Parameters
    ----------
    path
        The file. A symbolic link is kept, and the file that it points to is replaced.
    expected
        `digest_of` the file version that this model is based on, None if there was no file: a file that has changed since then
        is not overwritten. `ANY`, the default, always overwrites.
    kind
        "model" or "checkpoint".

    Raises
    ------
    ModelFileError
        When it cannot be written, when another process is writing it, or when it has changed. The existing file is then
        unchanged.
    """
    resolved(path)
    path = Path(path)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        about = {"schema": SCHEMA, "sha256": digest(plain, settings), "kind": kind}
        text = _canonical(settings).decode()
        if len(text) > MAX_TEXT:
            raise ValueError(f"they take {len(text)} characters; the limit is {MAX_TEXT}")
        content = save(plain, {"edge_dfcil": json.dumps(about), "settings": text})
    except UnicodeEncodeError as error:
        found = error.object[max(error.start - 20, 0) : error.end + 20]
        raise ModelFileError(f"a name cannot be stored as UTF-8: ...{found!r}...; rename that class") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"these settings cannot be stored as JSON: {error}") from error
    check_writable(path, len(content))
    with lock(path):
        if expected is not ANY:
            _check_unchanged(path, expected)
        try:
            files.replace_file(path, content)
        except OSError as error:
            raise ModelFileError(
                f"{_shown(path)} could not be written: {error.strerror or error}; the existing file is unchanged"
            ) from error
    return path


def _check_unchanged(path: Path, expected: str | None) -> None:
    found = digest_of(path)
    if found == expected:
        return
    what = "has been removed" if found is None else "has been created" if expected is None else "has been changed"
    raise ModelFileError(
        f"{_shown(path)} {what} by another process since it was read. Nothing was written. Load the file again and learn the "
        "task with that model, or save this one under another name"
    )


def read(path: str | Path, kind: Kind = "model") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the settings of a file of this kind, after its SHA-256 has been verified.

    Raises `ModelFileError` for a file that is missing, damaged, of another program, of another kind or from a later version.
    """
    _check_is_file(path)
    with _Reading(path) as file:
        found: Kind = file.about.get("kind", "model")
        if found != kind:
            raise ModelFileError(f"{_shown(path)} is a {found}, not a {kind}; {_ADVICE[kind]}")
        tensors, settings = file.tensors(), file.settings
        intact = digest(tensors, settings) == file.about["sha256"]
    if not intact:
        raise ModelFileError(f"{_shown(path)} is damaged: its SHA-256 does not match. Restore it from a copy")
    return tensors, settings


_ADVICE = {
    "model": "pass the model file; a checkpoint belongs to a task that has not ended, and `learn` continues from it",
    "checkpoint": "pass the checkpoint of the task that was stopped",
}


def resolved(path: Any) -> Path:
    """The absolute path, with links resolved. Raises `ModelFileError` for anything but a path."""
    try:
        return Path(path).resolve()
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        raise ModelFileError(f"path={path!a:.80} cannot be a file ({shown(error)[:200]}); pass the path of a file") from error


class _Reading:
    """An open file whose header has been checked. Any error that its content causes becomes a `ModelFileError`."""

    about: dict[str, Any]
    settings: dict[str, Any]

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> _Reading:
        try:
            self._check_length()
            with _utf8_name(self._path) as name:
                self._file = safe_open(name, "pt").__enter__()
            self._read_header()
        except ModelFileError:
            raise
        except _DAMAGE as error:
            raise self._damaged(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._file.__exit__(None, None, None)
        if isinstance(error, _DAMAGE) and not isinstance(error, ModelFileError):
            raise self._damaged(error) from error

    def tensors(self) -> dict[str, Tensor]:
        return {name: self._file.get_tensor(name) for name in self._file.keys()}  # noqa: SIM118  not a mapping

    def _check_length(self) -> None:
        """Limits the header, which takes several times its length in memory when it is read; a valid one is short."""
        with open(self._path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"its header would have {length} bytes")

    def _read_header(self) -> None:
        metadata = self._file.metadata() or {}
        if "edge_dfcil" not in metadata:
            raise ModelFileError(f"{_shown(self._path)} is a safetensors file, but edge-dfcil did not write it")
        self.about = parse_json(metadata["edge_dfcil"])
        schema = self.about["schema"]
        if type(schema) is int and schema > SCHEMA:
            raise self._too_new(schema, metadata)
        keys = {"schema", "sha256"} if schema == 1 else {"schema", "sha256", "kind"}
        if type(schema) is not int or schema < 1 or set(self.about) != keys or self.about.get("kind", "model") not in _ADVICE:
            raise ModelFileError(f"{_shown(self._path)} is damaged: its header states {shown(self.about)[:200]}")
        self.settings = parse_json(metadata["settings"])
        if not isinstance(self.settings, dict):
            raise TypeError("its settings are not a JSON object")

    def _too_new(self, schema: int, metadata: dict[str, str]) -> ModelFileError:
        try:
            version = shown(parse_json(metadata["settings"])["version"])[:40]
        except _DAMAGE:
            version = "a later version"
        return ModelFileError(
            f"{_shown(self._path)} has schema {schema}, written by edge-dfcil {version}; this is edge-dfcil {__version__}, "
            f"which reads up to schema {SCHEMA}. Upgrade edge-dfcil"
        )

    def _damaged(self, error: BaseException) -> ModelFileError:
        reason = shown(" ".join(str(error).split()))[:200]
        return ModelFileError(f"{_shown(self._path)} is not an edge-dfcil model file, or it is damaged ({reason})")


def _check_is_file(path: str | Path) -> None:
    try:
        found = not isinstance(path, int) and os.path.isfile(path)
    except (TypeError, ValueError):  # not a path, or one with a null character
        found = False
    if not found or isinstance(path, bytes):
        raise ModelFileError(f"{_shown(path)} is not a file; `learner.save` or `edge-dfcil learn` writes one")


@contextlib.contextmanager
def _utf8_name(path: str | Path) -> Iterator[str]:
    """A name of the file that safetensors accepts. File names that are not UTF-8, as on old media, are opened by descriptor."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield f"/dev/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield name


def _shown(path: str | Path) -> str:
    """A path as a string that any terminal or log can encode."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else f"path={path!a:.80}"
    return text.encode("utf-8", "backslashreplace").decode()


def _canonical(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
