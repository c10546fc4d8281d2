"""The output of every command: answers, notes, errors and warnings, whatever the streams can encode."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import click

from edge_dfcil.errors import EdgeDfcilError


class Commands(click.Group):
    """A group of commands that end with a one-line error message instead of a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        with _writable_streams():
            try:
                return super().main(*args, **kwargs)
            except OSError as error:  # such as a full disk under stdout, while click shows its help
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    _discard(stream)
                note(f"error: {error}")
                sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _warnings_as_lines():
                return super().invoke(ctx)
        except EdgeDfcilError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("cancelled: the model is unchanged")
        except MemoryError:
            note("error: out of memory; the model is unchanged. Try a smaller --batch-size or a --memory-budget")
        except OSError as error:
            if error.errno != errno.EPIPE:  # the reader of the answer has closed its end, so there is nothing to report
                note(f"error: {error}")
        return ctx.exit(1)


def answer(value: Any, as_json: bool, lines: Sequence[str]) -> None:
    """Writes a command's answer on stdout: one line of strict JSON in ASCII, or lines of text."""
    if as_json:
        _write(sys.stdout, json.dumps(_strict(value), allow_nan=False))
    elif lines:
        _write(sys.stdout, "\n".join(lines))


def note(line: str) -> None:
    """Writes a line on stderr. A stderr that is closed or missing is not an error."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr, line)


def _write(stream: TextIO | None, text: str) -> None:
    if stream is None:  # closed before the start, or a program without a console
        return
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError:
        _discard(stream)
        raise


def _discard(stream: TextIO) -> None:
    """Discards what is left in a stream's buffer, so that the interpreter does not fail on it at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _strict(value: Any) -> Any:
    """The same without NaN and infinities, for which JSON has no number: they become null."""
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _writable_streams() -> Iterator[None]:
    """Inside, stdout and stderr write the code of a character that their encoding lacks, instead of failing."""
    before = []
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            before.append((reconfigure, stream.errors))
            reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for reconfigure, errors in before:
            with contextlib.suppress(OSError, ValueError):
                reconfigure(errors=errors)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Shows warnings as one line on stderr, without the line of code, which a user of a command cannot change."""

    def show(message: Warning | str, *place: Any, **streams: Any) -> None:
        note(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
