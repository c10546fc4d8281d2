"""Checks of arguments: whole numbers, and names from a fixed set."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

from exporters.errors import SettingError


def whole_number(name: str, value: Any) -> int:
    """A whole number, 1 or more, of Python or NumPy. Raises `SettingError`, which calls it `name`, for anything else."""
    try:
        found = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = 0
    if found < 1:
        raise SettingError(f"{name}={value!a:.80}; it must be a whole number, 1 or more")
    return found


def is_one_of(value: Any, names: Container[str]) -> bool:
    """Whether a value is a string among these names; also for values that cannot be hashed or compared, such as arrays."""
    return isinstance(value, str) and value in names
