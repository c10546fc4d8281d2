"""`edge-dfcil learn`: makes a model, or extends it by a task."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_dfcil.cli.console import answer, note
from edge_dfcil.cli.options import (
    DEVICE,
    JSON,
    MEMORY,
    MODULE,
    PATH,
    PRECISION,
    STRICT,
    build_module,
    chosen_recipe,
    load_learner,
    open_pictures,
    recipe_options,
)
from edge_dfcil.errors import ModelFileError, SettingError
from edge_dfcil.recipe import DEFAULT, RECIPES

if TYPE_CHECKING:
    from edge_dfcil.learner import Learner
    from edge_dfcil.results import TaskReport
    from edge_dfcil.training.session import Session


@click.command("learn")
@click.argument("images", type=PATH)
@click.option("--model", required=True, type=PATH, help="The model file; extended if it exists, else created.")
@click.option("--backbone", help="For a new model: resnet32 (default), mobilenet_v3_small, ...")
@click.option("--image-size", type=click.IntRange(min=8), help="For a new model: side in pixels, 32 by default.")
@click.option("--method", help="For a new model: abd (default), or a baseline.")
@click.option("--weights", help="For a new model: torchvision's pretrained weights, for example DEFAULT.")
@click.option(
    "--multiscale/--no-multiscale",
    default=None,
    help="For a new model: whether features come from several scales; by default only if the head is closed-form.",
)
@click.option("--seed", type=int, help="For a new model: 0 by default.")
@click.option("--no-flip", is_flag=True, help="For a new model: do not mirror pictures (letters, digits, signs).")
@recipe_options
@MODULE
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=2), help="Pictures per step.")
@MEMORY
@PRECISION
@click.option("--time-budget", metavar="TIME", help="The longest that learning may take, for example 10min.")
@click.option(
    "--checkpoint",
    metavar="PATH|none",
    help="A stopped task continues from this file when the command is repeated; a hidden file beside MODEL by default.",
)
@click.option("--dry-run", is_flag=True, help="Only measure and show what memory learning would take; nothing is learnt.")
@click.option("--no-core-dumps", is_flag=True, help="A crash leaves no core dump, which would contain pictures (Linux).")
@click.option("--relearn", is_flag=True, help="Refresh classes that are known already instead of refusing them.")
@STRICT
@DEVICE
@JSON
def command(
    images: Path,
    model: Path,
    recipe: str | None,
    changes: dict[str, str],
    module: str | None,
    batch_size: int,
    memory_budget: str | None,
    precision: str,
    time_budget: str | None,
    checkpoint: str | None,
    dry_run: bool,
    no_core_dumps: bool,
    relearn: bool,
    strict: bool,
    device: str,
    as_json: bool,
    **new: Any,
) -> None:
    """Learn the classes in IMAGES, which has one folder of pictures per class; creates MODEL or extends it.

    A recipe that is given for an existing model replaces the model's own, for this task and those after it.
    """
    from edge_dfcil.model.file import check_writable, claim
    from edge_dfcil.privacy import traces

    if not dry_run:
        check_writable(model)
    with contextlib.ExitStack() as stack:
        if no_core_dumps:
            stack.enter_context(traces.no_core_dumps())
        if not dry_run:  # a second process that changes the same file is refused now, not after all is learnt
            stack.enter_context(claim(model))
        limits = {"memory_budget": memory_budget, "precision": precision}
        learner = _learner_for(model, device, limits, module, recipe, changes, new)
        folder = open_pictures(images, learner, strict, batch_size)
        if dry_run:
            plan = learner.plan(folder.loader, relearn=relearn)
            answer(plan.to_dict(), as_json, [str(plan)])
            return
        place = _checkpoint(model, checkpoint)
        if place is not None and _has_ended(learner, place, folder.loader.dataset.classes):  # type: ignore[attr-defined]
            classes = list(learner.classes)
            line = f"{model} had learnt this when the last run was stopped; it knows {len(classes)} classes"
            answer({"new_classes": [], "classes": classes, "model": str(model)}, as_json, [line])
            return
        # MODEL is written once, at the end: an instant model is useful only if the time may run out before.
        settings: Any = {"instant": time_budget is not None, "time_budget": time_budget, "checkpoint": place}
        session = learner.session(folder.loader, relearn=relearn, **settings)
        report = _learn_and_save(session, learner, model)
    answer({**report.to_dict(), "model": str(model), "skipped": list(folder.skipped)}, as_json, _lines(report, model))


def _learner_for(
    model: Path,
    device: str,
    limits: dict[str, Any],
    module: str | None,
    recipe: str | None,
    changes: dict[str, str],
    new: dict[str, Any],
) -> Learner:
    """The learner in a model file, or a new one with the settings given."""
    from edge_dfcil.learner import Learner

    no_flip = new.pop("no_flip")
    given = {name: value for name, value in new.items() if value is not None}
    if model.exists():
        if given or no_flip:
            names = ", ".join("--" + name.replace("_", "-") for name in [*given, *(["no_flip"] if no_flip else [])])
            raise SettingError(f"{model} exists already and keeps its settings; leave out {names}, or name a new file")
        return load_learner(model, device, module, recipe, changes, **limits)
    if module is not None and "backbone" in given:
        raise SettingError("--backbone and --module both name the new model's backbone; give one of them")
    chosen = chosen_recipe(RECIPES[DEFAULT], recipe, {**({"augmentation.flip": "false"} if no_flip else {}), **changes})
    named = given.pop("backbone", "resnet32")
    backbone = named if module is None else build_module(module)
    return Learner(backbone, device=device, recipe=chosen, **limits, **given)


def _checkpoint(model: Path, given: str | None) -> Path | None:
    """The path of the checkpoint: hidden next to MODEL, with a short name that is valid wherever MODEL's is."""
    from exporters.files import hidden_name, resolve

    if given is not None:
        return None if given == "none" else Path(given)
    target = resolve(model)
    return target.with_name(hidden_name(target, ".checkpoint"))


def _has_ended(learner: Learner, checkpoint: Path, classes: list[str]) -> bool:
    """Whether these classes are those of a checkpoint whose task the model has learnt: its process was stopped after it had
    saved the model and before it removed the checkpoint. A checkpoint of any task that the model has learnt is removed here."""
    from edge_dfcil.learning import task_id
    from edge_dfcil.model import file

    try:
        fingerprint = file.read(checkpoint, "checkpoint")[1]["fingerprint"]
        names = {*fingerprint["new classes"], *fingerprint["refreshed classes"]}
    except (ModelFileError, KeyError, TypeError):  # there is none, or not one of ours: the session handles it
        return False
    if task_id(fingerprint) != learner.model.learning.get("last_task"):
        return False
    checkpoint.unlink(missing_ok=True)
    return names == set(classes)


def _learn_and_save(session: Session[TaskReport], learner: Learner, model: Path) -> TaskReport:
    """Learns and saves. The checkpoint is removed after the model is on the disk, so that a kill in between loses nothing."""
    report: TaskReport | None = None
    try:
        while report is None:  # None: paused
            report = session.run()
    except KeyboardInterrupt:
        if session.checkpoint is not None and session.checkpoint.exists():
            note("the same command continues from here")
        raise
    try:
        learner.save(model)
    except ModelFileError as error:
        if not _is_full(error) or session.checkpoint is None or not session.checkpoint.exists():
            raise
        _save_in_its_place(learner, model, session.checkpoint)
    session.clear_checkpoint()
    return report


def _is_full(error: ModelFileError) -> bool:
    """Whether a file could not be written because the disk is full."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)


def _save_in_its_place(learner: Learner, model: Path, checkpoint: Path) -> None:
    """Saves in the disk space of the checkpoint, which is written again if that space is not enough."""
    from exporters.files import replace_file

    content = checkpoint.read_bytes()
    checkpoint.unlink()
    try:
        learner.save(model)
    except BaseException:
        replace_file(checkpoint, content)
        raise


def _lines(report: TaskReport, model: Path) -> list[str]:
    learnt = ", ".join(report.new_classes + report.relearned_classes)
    lines = [f"learnt {learnt} from {report.images} pictures in {report.seconds:.0f} s"]
    lines.append(f"{model} knows {len(report.classes)} classes")
    if report.plan is not None:
        lines.append(
            f"took {report.peak_bytes / 1e6:.1f} MB of memory at most, {report.plan.peak_bytes / 1e6:.1f} MB were planned"
        )
    if report.computing is not None and report.computing.measured:
        lines.append(f"computed in {report.computing}, the fastest setting measured here")
    return lines
