"""What the workshop found, as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.tables import over_seeds, percent, table

PAGE = "workshop-dreams.png"
SEED = ", seed "  # in the names of steps that are run with several
Figure = float | int | str | tuple[float, ...] | None

MEANINGS = {  # explanations of words in the names of students
    "by the pixel": "Dreams by the pixel are DeepInversion's own, adaptive ones Adaptive DeepInversion's; the others are a "
    "generator's.",
    "from nothing": "A student from nothing does not begin with the layers that it shares with its teacher; one of "
    "another family shares none.",
}


def describe(found: dict[str, Any], long: dict[str, Any] | None = None, folder: str = "") -> str:
    """The findings as Markdown, with those of the large setting; `folder` is the folder of the page of dreams, relative to the
    text, with a slash."""
    text = f"A teacher of {percent(found['teacher']['accuracy'])} % on its classes, trained here."
    if "mirrored answers" in found:
        text += f" With `mirrored_answers` it has {percent(found['mirrored answers']['accuracy'])} %."
    text += " Of one seed, a point more or less is chance."
    parts = [text, _students(found)]
    if long is not None:
        parts += [_taught_for_longer(long), _students(long)]
    parts += [_pruned(found), _quantised(found), _adopted(found)]
    if "dreams" in found:
        parts += ["Real photographs and dreams of the same classes:", f"![real and generated]({folder}{PAGE})"]
    return "\n\n".join(part for part in parts if part)


def _taught_for_longer(found: dict[str, Any]) -> str:
    """Where the rows of the large setting were made; its students are trained from scratch."""
    at_once = f", {found['at_once']} rows at a time" if "at_once" in found else ""
    text = f"Students trained from scratch for longer (on {found['machine']['device']}{at_once})."
    if "competition tried" in found:
        weights = [
            f"with {tried['with']}, " + ", ".join(f"{weight}: {percent(share)}" for weight, share in tried["accuracy"].items())
            for tried in found["competition tried"]
        ]
        text += f" Weights of the competition tried in shorter runs (weight: accuracy, %): {'; '.join(weights)}."
    return text


def _rows(
    found: dict[str, Any], part: str, figures: Callable[[dict[str, Any]], list[Figure]], several: bool = False
) -> list[list[str]]:
    """A row for each step of a part, seeds together: the rest of its name, the number of seeds if there may be several,
    and its figures or why it was refused."""
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, row in found.items():
        if name.startswith(part):
            steps[name.removeprefix(part).partition(SEED)[0]].append(row)
    rows = []
    for name, seeds in steps.items():
        refused = [row["refused"] for row in seeds if "refused" in row]
        columns = zip(*map(figures, seeds), strict=True) if not refused else ()
        rows.append([name, *refused[:1], *map(_cell, columns)])
        if several:
            rows[-1].insert(1, str(len(seeds)))
    return rows


def _cell(values: Sequence[Figure]) -> str:
    """One figure of all seeds: their mean, with the standard deviation if there are several."""
    first = values[0]
    if isinstance(first, tuple):
        return " / ".join(map(_cell, zip(*values, strict=True)))
    if not isinstance(first, float):
        return "" if first is None else str(first)
    return over_seeds(values)  # type: ignore[arg-type]


def _students(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[Figure]:
        before, after = row["accuracy"]
        shares = [100 * share for share in (after, after / before, row["agreement"])]
        return [row["parameters"][1], row["dreams"], f"{100 * before:.1f}", *shares, row["minutes"]]

    head = [
        "student, learnt from",
        "seeds",
        "parameters",
        "dreams",
        "teacher, %",
        "student, %",
        "of the teacher's, %",
        "agreement, %",
        "minutes",
    ]
    rows = _rows(found, "distill ", figures, several=True)
    text = [meaning for words, meaning in MEANINGS.items() if any(words in name for name, *_ in rows)]
    if len({row["accuracy"][0] for name, row in found.items() if name.startswith("distill ")}) > 1:
        text.append("Teachers that differ were trained in the same way, in other runs; compare minutes within a teacher.")
    return "\n\n".join([table(head, rows), " ".join(text)]) if text else table(head, rows)


def _pruned(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[Figure]:
        left = [100 * row[key][1] / row[key][0] for key in ("filters", "flops", "milliseconds")]
        return [*left, tuple(100 * share for share in row["accuracy"])]

    head = ["pruned", "seeds", "filters left, %", "work left, %", "latency left, %", "accuracy before, unrepaired, repaired, %"]
    return table(head, [[f"prune {name}", *cells] for name, *cells in _rows(found, "prune ", figures, several=True)])


def _quantised(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[Figure]:
        accuracy = tuple(100 * share for share in row["accuracy"]["pictures"])
        size, agreement = 100 * row["bytes"] / row["float_bytes"], 100 * row["agreement"]["pictures"]
        return [size, f"{row['speedup']:.2f}", accuracy, agreement]

    head = ["INT8", "size of float, %", "times as fast", "accuracy as float, as INT8, %", "agreement on pictures, %"]
    return table(head, _rows(found, "int8 ", figures))


def _adopted(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[Figure]:
        return [percent(row.get(key)) for key in ("old", "new", "combined")]

    rows = _rows(found, "adopt ", figures)
    before = percent(found.get("adopted", {}).get("accuracy"))
    text = f"A classifier trained elsewhere, {before} % on its classes, learns new ones:"
    head = ["method", "old classes, %", "new classes, %", "combined, %"]
    return f"{text}\n\n{table(head, rows)}" if rows else ""
