"""What runs a method in a protocol: a learner (`accuracy.run`), unless a file here runs it. Adding a kind of runner means
adding its file, with `names()`, the methods that it runs, and `run`, which takes and returns what `accuracy.run` does."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

from benchmarks import accuracy


class Runner(Protocol):
    """A module of this package."""

    def names(self) -> list[str]: ...

    run: Callable[..., dict[str, Any]]


def names() -> list[str]:
    """The methods that are run by a file here."""
    return [name for runner in _runners() for name in runner.names()]


def run(protocol: accuracy.Protocol, method: str, *arguments: Any, **settings: Any) -> dict[str, Any]:
    """Runs a protocol with a method, by the file that runs it; arguments and result are those of `accuracy.run`."""
    runner = next((runner for runner in _runners() if method in runner.names()), accuracy)
    return runner.run(protocol, method, *arguments, **settings)


def _runners() -> Iterator[Runner]:
    for module in pkgutil.iter_modules(__path__):
        yield cast(Runner, importlib.import_module(f"{__name__}.{module.name}"))
