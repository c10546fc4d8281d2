"""Validated dataclasses of settings: a wrong value raises `SettingError`, which names the setting, the value and what is allowed.

A class of settings has two decorators, `@checked(prefix)` over `@validated(frozen=True, config=CONFIG)`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from numbers import Integral, Real
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as validated

from edge_dfcil.errors import SettingError

__all__ = [
    "CONFIG",
    "Count",
    "CountOrZero",
    "Positive",
    "Share",
    "ShareBelowOne",
    "ShareInside",
    "Weight",
    "checked",
    "did_you_mean",
    "validated",
]

Group = TypeVar("Group")


def _python_number(value: Any) -> Any:
    """A number of NumPy or a similar library as a Python number, so that settings are always JSON. Other values are unchanged."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


_Whole = Annotated[int, BeforeValidator(_python_number)]
_Number = Annotated[float, BeforeValidator(_python_number)]
MOST = 2**31 - 1  # the largest count
Count = Annotated[_Whole, Field(ge=1, le=MOST)]  # 1, 2, ...
CountOrZero = Annotated[_Whole, Field(ge=0, le=MOST)]
Weight = Annotated[_Number, Field(ge=0)]  # weight of a loss term; 0 switches it off
Positive = Annotated[_Number, Field(gt=0)]
Share = Annotated[_Number, Field(ge=0, le=1)]
ShareBelowOne = Annotated[_Number, Field(ge=0, lt=1)]
ShareInside = Annotated[_Number, Field(gt=0, lt=1)]

# A bool or a string is not accepted as a number, and numbers must be finite.
CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def checked(prefix: str) -> Callable[[type[Group]], type[Group]]:
    """Makes a validated dataclass raise `SettingError`. Messages name a setting as `prefix.name`."""

    def decorate(cls: type[Group]) -> type[Group]:
        init: Callable[..., None] = cls.__init__

        def __init__(self: Group, *args: Any, **settings: Any) -> None:  # noqa: N807
            try:
                init(self, *args, **settings)
            except ValidationError as error:
                raise SettingError("; ".join(_describe(prefix, cls, problem) for problem in error.errors())) from None

        cls.__init__ = __init__  # type: ignore[assignment]
        return cls

    return decorate


def did_you_mean(name: str, known: list[str], otherwise: str) -> str:
    """The end of a message about an unknown name: the nearest of the known ones, or else `otherwise`."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; {otherwise}"


def _describe(prefix: str, cls: type, problem: Any) -> str:
    if problem["type"] == "value_error":  # raised by a group's own check
        return str(problem["ctx"]["error"])
    name, *place = problem["loc"] or ("",)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if problem["type"] == "unexpected_keyword_argument":
        return f"{prefix} has no setting {name!r}" + did_you_mean(name, list(fields), f"it has {', '.join(fields)}")
    allowed = problem["msg"].replace("Input should", "it must", 1)
    for theirs, plain in _PLAIN.items():
        allowed = allowed.replace(theirs, plain)
    optional = " or None" if name in fields and "None" in str(fields[name].type) else ""
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return f"{prefix}.{name}{''.join(f'[{index}]' for index in place)} is {shown}; {allowed}{optional}"


_PLAIN = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "True or False",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
}
