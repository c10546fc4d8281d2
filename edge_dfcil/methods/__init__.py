"""The methods: one short file each, found by its name. Adding a method means adding its file."""

from __future__ import annotations

import importlib
import pkgutil

from edge_dfcil.errors import SettingError
from edge_dfcil.methods.base import Method
from exporters.values import is_one_of

_NO_METHODS = {"base", "task"}  # files here that are not methods, in addition to those that begin with an underscore


def names() -> list[str]:
    """The names of the methods that come with the package."""
    return sorted(
        module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_" and module.name not in _NO_METHODS
    )


def find_method(method: str | Method) -> Method:
    """A method by name, or the one given. Raises `SettingError` for an unknown name."""
    if isinstance(method, Method):
        return method
    if not is_one_of(method, names()):
        raise SettingError(f"no method is called {method!a:.80}; choose one of {', '.join(names())}, or pass a Method")
    module = importlib.import_module(f"{__name__}.{method}")
    (found,) = (
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method) and c.__dict__.get("name") == method
    )
    return found()


__all__ = ["Method", "find_method", "names"]
