"""The model card that the Hub shows: what a classifier knows, how good it is, how it was made, what it keeps, and its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edge_dfcil.hub import client
from edge_dfcil.model.model import Model
from edge_dfcil.privacy import summary
from edge_dfcil.privacy.account import COUNTER, account
from edge_dfcil.results import Evaluation

if TYPE_CHECKING:
    from exporters import ExportReport

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&~$])")  # characters with a meaning in a Markdown table cell


def model_card(
    model: Model,
    name: str,
    *,
    evaluation: Evaluation | None = None,
    exported: ExportReport | None = None,
    description: str | None = None,
    license: str | None = None,
) -> str:
    """Markdown with the Hub's metadata as YAML. `name` is what `from_pretrained` takes; `description` is Markdown by the user.

    Raises `SettingError` without `huggingface_hub`.
    """
    client()  # raises an error that says what to install
    from huggingface_hub import ModelCardData

    about = ModelCardData(
        library_name="edge-dfcil",
        license=license,
        pipeline_tag="image-classification",
        tags=["continual-learning", "class-incremental-learning", "on-device", *(["onnx"] if exported else [])],
        metrics=["accuracy"] if evaluation else None,
    )
    sections = [
        [f"# {_shown(name)}", "", *([description, ""] if description else []), _what(model)],
        ["## Classes", "", *_classes(model, evaluation)],
        ["## How to use it", "", *_use(model, name, exported)],
        ["## How it was made", "", *(f"- {line}" for line in _made(model))],
        ["## What it keeps", "", *_kept(model)],
        ["## Limits", "", *(f"- {line}" for line in _limits(model))],
    ]
    return f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join("\n".join(section) for section in sections) + "\n"


def _what(model: Model) -> str:
    return (
        f"An image classifier of {len(model.classes)} classes, learnt in {_count(len(model.tasks), 'task')} by "
        "`edge-dfcil`, which keeps no image of a task to remember its classes."
    )


def _classes(model: Model, evaluation: Evaluation | None) -> Iterator[str]:
    if evaluation is None:
        yield "Its accuracy was not measured for this card."
    else:
        yield f"{_sentence(str(evaluation).splitlines()[0])}.\n"
        yield "It was measured by the author of this card, on images that are not in this repository."
    yield from _table(["class", "task", "accuracy, %"], _rows(model, evaluation))


def _rows(model: Model, evaluation: Evaluation | None) -> Iterator[Sequence[str]]:
    task_of = {name: number for number, task in reversed([*enumerate(model.tasks, 1)]) for name in task}
    per_class = evaluation.per_class if evaluation else {}
    for name in model.classes:
        yield _shown(name), f"{task_of[name]}", f"{100 * per_class[name]:.1f}" if name in per_class else "-"


def _use(model: Model, name: str, exported: ExportReport | None) -> Iterator[str]:
    own = model.backbone is None
    argument = json.dumps(name) + (", backbone=module" if own else "")
    if own:
        yield f"Its backbone has no registered name: `module` is a newly built {_shown(model.architecture)}.\n"
    yield from (
        "```python",
        "from edge_dfcil import Model",
        "",
        f"model = Model.from_pretrained({argument})",
        'print(model.predict("photo.jpg", top_k=3))',
        "```",
        "",
        f"`Learner.from_pretrained({argument})` gives a learner, which learns more classes with `learn_task(loader)`.",
    )
    if exported is not None:
        assert exported.max_difference is not None  # an ONNX file is always compared
        sizes = "images of every size" if exported.input == "any" else f"squares of {exported.image_size} pixels"
        yield from (
            "",
            f"`model.onnx` is the same classifier with its preprocessing, from {sizes} (uint8) to probabilities. When",
            f"it was written, all of its probabilities were within {exported.max_difference:.1g} of the model's.",
        )


def _made(model: Model) -> Iterator[str]:
    settings = model.settings()
    trained = "trained before its first task" if model.pretrained else "trained in its first task"
    scales = ", features of several scales" if settings["scales"] else ""
    yield f"Backbone: {_shown(model.architecture)} at {model.image_size} x {model.image_size} pixels, {trained}{scales}."
    if "method" in settings:
        yield f"Method: {_shown(settings['method'])}, seed {settings['seed']}."
        yield _shown(f"{_sentence(summary.recipe_line(settings['recipe']))}.")
    if settings["calibration"]:
        yield f"{_sentence(summary.calibration_line(settings['calibration']))}."
    yield f"Written by edge-dfcil {settings['version']}."


def _kept(model: Model) -> Iterator[str]:
    kept = account(model.tensors(), model.settings())
    yield "The model file contains no image, no feature of an image, no generator and no generated image. In addition to"
    yield "names and settings, it contains these tensors:"
    yield from _table(
        ["kept", "tensors", "bytes", "derived from images"],
        (
            (kind.replace("_", " "), f"{sum(one.kind == kind for one in kept)}", f"{count}", "no" if kind == COUNTER else "yes")
            for kind, count in summary.bytes_by_kind(kept).items()
        ),
    )
    yield from ("", f"SHA-256 of the model: `{model.digest()}`")


def _limits(model: Model) -> Iterator[str]:
    yield (
        "Weights and statistics are derived from the images that it learnt from. Anyone who has the model can generate similar "
        "images. No differential privacy is claimed."
    )
    if model.thresholds:
        yield "It names one of its classes for every image; `predict(images, reject=True)` answers None if none of them fits."
    else:
        yield "It names one of its classes for every image, even of something else: it has no thresholds for rejection."
    yield "Its accuracy may be lower with other cameras, light or places than in its images; measure it on your own images."


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield ""
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def _shown(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", text)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
