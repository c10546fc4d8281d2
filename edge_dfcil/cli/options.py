"""Options that several commands share, and what is made from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_dfcil.cli.console import note
from edge_dfcil.errors import BackboneError, SettingError
from edge_dfcil.recipe import RECIPES, Recipe, find_recipe, read_recipe

if TYPE_CHECKING:
    from torch import nn

    from edge_dfcil.learner import Learner
    from edge_dfcil.model.pictures import PictureFolder

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

MODEL = click.argument("model", type=PATH)
JSON = click.option("--json", "as_json", is_flag=True, help="Answer as JSON.")
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
MEMORY = click.option("--memory-budget", metavar="SIZE", help="The most memory that this may add, for example 128MB.")
PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of training; auto takes the device's default, or in a long task on a CPU the one that is measured to be faster.",
)
STRICT = click.option("--strict", is_flag=True, help="Refuse a folder with a damaged picture instead of skipping it.")
EVALUATION = click.option("--eval", "evaluation", type=PATH, metavar="IMAGES", help="Measure before and after on these pictures.")
MODULE = click.option(
    "--module",
    metavar="PACKAGE.MODULE:CALLABLE",
    help="For a model with your own backbone (an adopted one): the function that builds it, called without arguments.",
)
QUALITY = click.option(
    "--quality", type=click.Choice(["fast", "best"]), default="fast", show_default=True, help="best optimises every pixel."
)


def recipe_options(command: Command) -> Command:
    """`--recipe` and `--set`: see `chosen_recipe`."""
    command = click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="GROUP.NAME=VALUE",
        callback=_parse_changes,
        help="Change a setting of the recipe, for example schedule.epochs=3. Repeatable.",
    )(command)
    return click.option(
        "--recipe", metavar="NAME|FILE.json", help=f"{', '.join(RECIPES)}, or a file of settings; the model's own by default."
    )(command)


def _parse_changes(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    changes = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise click.BadParameter(f"{text!r} is not GROUP.NAME=VALUE, such as schedule.epochs=3", ctx, parameter)
        changes[name.strip()] = value.strip()
    return changes


def chosen_recipe(default: Recipe, recipe: str | None, changes: dict[str, str]) -> Recipe:
    """The recipe that `--recipe` names, else the default, with the changes of `--set`.

    Raises `SettingError` for a recipe or a setting that does not exist or is out of range.
    """
    base = default if recipe is None else _named_recipe(recipe)
    return base.changed(changes) if changes else base


def _named_recipe(recipe: str) -> Recipe:
    if recipe not in RECIPES and (recipe.lower().endswith(".json") or os.path.isfile(recipe)):
        return read_recipe(Path(recipe))
    return find_recipe(recipe)


def load_learner(
    model: Path,
    device: str,
    module: str | None = None,
    recipe: str | None = None,
    changes: dict[str, str] | None = None,
    **settings: Any,
) -> Learner:
    """The learner in a model file, with its backbone built by `--module`, and its recipe as asked for."""
    from edge_dfcil.errors import ModelFileError
    from edge_dfcil.learner import Learner

    backbone = None if module is None else build_module(module)
    try:
        learner = Learner.load(model, device, backbone=backbone, **settings)
    except ModelFileError as error:
        if module is None and "backbone=" in str(error):
            raise ModelFileError(f"{error}. On the command line: --module package.module:callable") from error
        raise
    chosen = chosen_recipe(learner.recipe, recipe, changes or {})
    if chosen != learner.recipe:
        learner.recipe = chosen
    return learner


def build_module(name: str) -> nn.Module:
    """The network that `--module` names: `package.module:callable`, or what it returns. Raises `BackboneError`."""
    from edge_dfcil.model.adoption import load_callable

    try:
        return load_callable(name)
    except BackboneError as error:
        raise BackboneError(f"--module {error}") from error


def open_pictures(images: Path, learner: Learner, strict: bool, batch_size: int = 64) -> PictureFolder:
    """A folder of pictures, with a note on stderr for each that is skipped."""
    from edge_dfcil.model.pictures import open_folder

    folder = open_folder(images, learner.image_size, batch_size=batch_size, strict=strict)
    for path in folder.skipped:
        reason = folder.reasons[path]
        note(f"skipped {reason if reason.startswith(path) else f'{path}: {reason}'}")
    if folder.skipped:
        note(f"skipped {len(folder.skipped)} of {len(folder.skipped) + len(folder.loader.dataset)} pictures")  # type: ignore[arg-type]
    return folder


def loader_of(images: Path | None, learner: Learner, strict: bool) -> Any | None:
    """The loader of an optional folder of pictures."""
    return None if images is None else open_pictures(images, learner, strict).loader


def smaller_model(model: Path, word: str, out: Path | None) -> Path:
    """The path for a model that is made from another: `out`, or a file next to MODEL with `word` in its name."""
    out = out or model.with_name(f"{model.stem}-{word}{model.suffix}")
    check_out(out, model)
    return out


def check_out(out: Path, model: Path) -> None:
    """Raises `SettingError` if a result cannot be written there, or would replace MODEL. To be called before the work."""
    from exporters.files import check_writable

    if out.exists() and model.exists() and out.samefile(model):
        raise SettingError(f"{out} is the model itself, which stays as it is; name another file")
    try:
        check_writable(out, 0)
    except OSError as error:
        raise SettingError(f"{out} cannot be written: {error.strerror or error}") from error
