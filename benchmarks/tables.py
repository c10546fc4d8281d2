"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; short rows are filled up with empty cells. Empty if there is no row."""
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (head, *filled)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) if rows else ""


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal, without the sign; empty for None."""
    return "" if share is None else f"{100 * share:.1f}"


def over_seeds(values: Sequence[float], times: float = 1) -> str:
    """The mean with one decimal, and the standard deviation if several values differ; both multiplied by `times`."""
    spread = f"{times * stdev(values):.1f}" if len(values) > 1 else "0.0"
    return f"{times * mean(values):.1f}{f' ± {spread}' if spread != '0.0' else ''}"


def megabytes(size: float) -> str:
    """Bytes as whole megabytes, without the unit."""
    return f"{size / 1e6:.0f}"


def processor(machine: Mapping[str, Any]) -> str:
    """A result file's "machine" in words."""
    return f"{machine['processor']}, {counted(machine['threads'], 'thread')}"


def counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
