"""Strings from untrusted sources: JSON in bounded memory, and strings for messages."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from typing import Any

MAX_TEXT = 8_000_000  # characters of JSON; parsed, any of them take less than 500 MB
MAX_DIGITS = 400  # of a whole number: the time to convert one grows with the square of the digits, and no float has more

_JOINERS = {"\u200c", "\u200d"}  # they belong to Persian and Indian words, and to composed emoji
BLANKS = {"\u034f", "\u115f", "\u1160", "\u17b4", "\u17b5", "\u2800", "\u3164", "\uffa0"}  # letters and marks that are invisible


def parse_json(text: str | bytes, most: int = MAX_TEXT) -> Any:
    """The value of a JSON text. Raises `ValueError` if it is not JSON, is too long or too deep, or gives a name twice."""
    if len(text) > most:
        raise ValueError(f"its JSON has {len(text)} characters; at most {most} are read")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"its JSON gives {twice[:80]!r} twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"its JSON has a number of {len(digits)} digits")
    return int(digits)


def shown(text: object) -> str:
    """A string or path for a message: characters that cannot be printed or encoded are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def problem(name: str, place: int) -> str | None:
    """What is wrong with the character of a class name at an index; None if it can be seen, printed and stored."""
    character = name[place]
    category = unicodedata.category(character)
    if category == "Cs":
        return "half a surrogate pair (the text was not valid UTF-8)"
    if category in ("Cc", "Zl", "Zp"):
        return "a control character"
    if character in _JOINERS:
        inside = 0 < place < len(name) - 1 and not name[place - 1].isascii() and not name[place + 1].isascii()
        return None if inside else "a character that has no width"
    if category == "Cf" or character in BLANKS:
        return "a character that cannot be seen"
    return None
