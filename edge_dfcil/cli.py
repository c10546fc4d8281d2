"""The command line: each command a few lines over the public API. Answers on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from edge_dfcil._version import __version__
from edge_dfcil.errors import EdgeDfcilError, SettingError

if TYPE_CHECKING:
    from edge_dfcil.learner import Learner
    from edge_dfcil.model.pictures import PictureFolder

Command = TypeVar("Command", bound=Callable[..., Any])


class Told(click.Group):
    """Exit 0: done. 1: an error that was told, and nothing was changed. 2: wrong usage."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeDfcilError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("cancelled: the model is the one from before", err=True)
            ctx.exit(1)


@click.group(cls=Told, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edge-dfcil")
def main() -> None:
    """Teach an image classifier new classes without keeping a sample, and ship it."""


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Answer as JSON.")(command)


def device_option(command: Command) -> Command:
    return click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")(command)


def strict_option(command: Command) -> Command:
    return click.option("--strict", is_flag=True, help="Refuse a folder with a damaged picture instead of skipping it.")(command)


MODEL = click.argument("model", type=click.Path(path_type=Path))
EVALUATION = click.option(
    "--eval", "evaluation", type=click.Path(path_type=Path), metavar="IMAGES", help="Measure before and after on these pictures."
)


@main.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--model", required=True, type=click.Path(path_type=Path), help="The model file; extended if it is there, else made."
)
@click.option("--backbone", help="For a new model: resnet32 (default), mobilenet_v3_small, ...")
@click.option("--image-size", type=click.IntRange(min=8), help="For a new model: side in pixels, 32 by default.")
@click.option("--method", help="For a new model: abd (default), or a baseline.")
@click.option("--recipe", help="For a new model: edge (default) or paper.")
@click.option("--weights", help="For a new model: torchvision's pretrained weights, for example DEFAULT.")
@click.option("--seed", type=int, help="For a new model: 0 by default.")
@click.option("--no-flip", is_flag=True, help="For a new model: do not mirror pictures (letters, digits, signs).")
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=2), help="Pictures a step.")
@click.option("--memory-budget", metavar="SIZE", help="The most that learning may add to memory, for example 128MB.")
@click.option("--dry-run", is_flag=True, help="Only measure and show what memory learning would take; nothing is learnt.")
@click.option("--relearn", is_flag=True, help="Refresh classes that are known already instead of refusing them.")
@strict_option
@device_option
@json_option
def learn(
    images: Path,
    model: Path,
    batch_size: int,
    memory_budget: str | None,
    dry_run: bool,
    relearn: bool,
    strict: bool,
    device: str,
    as_json: bool,
    **new: Any,
) -> None:
    """Learn the classes in IMAGES, which holds a folder of pictures a class; makes MODEL or extends it."""
    learner = _learner_for(model, device, memory_budget, new)
    folder = _folder(images, learner, strict, batch_size)
    if dry_run:
        plan = learner.plan(folder.loader, relearn=relearn)
        _answer(plan.to_dict(), as_json, [str(plan)])
        return
    report = learner.learn_task(folder.loader, relearn=relearn)
    learner.save(model)
    answer = {**report.to_dict(), "model": str(model), "skipped": list(folder.skipped)}
    learnt = ", ".join(report.new_classes + report.relearned_classes)
    known = len(report.classes)
    lines = [f"learnt {learnt} from {report.images} pictures in {report.seconds:.0f} s", f"{model} knows {known} classes"]
    if report.plan is not None:
        lines.append(
            f"took {report.peak_bytes / 1e6:.1f} MB of memory at most, {report.plan.peak_bytes / 1e6:.1f} MB were planned"
        )
    _answer(answer, as_json, lines)


@main.command()
@MODEL
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path))
@click.option("--top-k", default=1, show_default=True, type=click.IntRange(min=1), help="How many names an image.")
@device_option
@json_option
def predict(model: Path, images: Sequence[Path], top_k: int, device: str, as_json: bool) -> None:
    """Name the pictures IMAGE..."""
    from edge_dfcil.learner import Learner
    from edge_dfcil.model.pictures import read_pictures

    learner = Learner.load(model, device)
    predictions = learner.predict(read_pictures(images, learner.image_size), top_k)
    lines = [
        f"{path}\t" + "\t".join(f"{name} {score:.3f}" for name, score in prediction.top)
        for path, prediction in zip(images, predictions, strict=True)
    ]
    _answer([{"image": str(p), **a.to_dict()} for p, a in zip(images, predictions, strict=True)], as_json, lines)


@main.command()
@MODEL
@click.argument("images", type=click.Path(path_type=Path))
@strict_option
@device_option
@json_option
def evaluate(model: Path, images: Path, strict: bool, device: str, as_json: bool) -> None:
    """Measure accuracy on IMAGES, which holds a folder of pictures a class."""
    from edge_dfcil.learner import Learner

    learner = Learner.load(model, device)
    folder = _folder(images, learner, strict, batch_size=64)
    evaluation = learner.evaluate(folder.loader)
    lines = [f"accuracy {evaluation.accuracy:.1%} on {evaluation.n} pictures"]
    lines += [f"  {name}\t{accuracy:.1%}" for name, accuracy in evaluation.per_class.items()]
    _answer({**evaluation.to_dict(), "skipped": list(folder.skipped)}, as_json, lines)


@main.command()
@MODEL
@json_option
def inspect(model: Path, as_json: bool) -> None:
    """Show what MODEL knows and every kind of thing it keeps."""
    from edge_dfcil.model import file as storage
    from edge_dfcil.privacy import account as privacy

    tensors, settings = storage.read(model)
    kept = privacy.account(tensors, settings)
    by_kind = {kind: sum(k.bytes for k in kept if k.kind == kind) for kind in dict.fromkeys(k.kind for k in kept)}
    answer = {**settings, "bytes": model.stat().st_size, "sha256": storage.digest(tensors, settings), "kept": by_kind}
    name = settings["backbone"] or settings["architecture"]
    lines = [f"{name} at {settings['image_size']} px, {settings['method']}, {answer['bytes']} bytes"]
    lines += [f"task {number}: {', '.join(task)}" for number, task in enumerate(settings["tasks"], start=1)]
    lines += [f"keeps {size} bytes of {kind}s" for kind, size in by_kind.items()]
    _answer(answer, as_json, [*lines, "keeps no picture, no feature of one, no generator and no dream"])


@main.command()
@MODEL
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.png")
@click.option("--per-class", default=8, show_default=True, type=click.IntRange(min=1), help="Dreams a class.")
@click.option(
    "--quality", type=click.Choice(["fast", "best"]), default="fast", show_default=True, help="best optimises every pixel."
)
@device_option
@json_option
def dream(model: Path, out: Path, per_class: int, quality: Literal["fast", "best"], device: str, as_json: bool) -> None:
    """Draw what MODEL remembers: a contact sheet, a row of dreams a class."""
    from edge_dfcil.dreaming.sheet import check_drawable, contact_sheet
    from edge_dfcil.learner import Learner

    check_drawable(out)
    learner = Learner.load(model, device)
    images = learner.dream(per_class * len(learner.classes), quality=quality)
    labels = [prediction.label for prediction in learner.predict(images)]
    contact_sheet(images, labels, learner.classes, per_class).save(out)
    counts = {name: labels.count(name) for name in learner.classes}
    _answer({"image": str(out), "dreams": counts}, as_json, [f"{out} shows {len(labels)} dreams"])


@main.command()
@MODEL
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.onnx")
@click.option("--quantize", type=click.Choice(["int8"]), help="A quarter of the size, calibrated on dreams.")
@click.option("--calibration", type=click.Path(path_type=Path), metavar="IMAGES", help="For int8: calibrate on these pictures.")
@EVALUATION
@strict_option
@device_option
@json_option
def export(
    model: Path,
    out: Path,
    quantize: str | None,
    calibration: Path | None,
    evaluation: Path | None,
    strict: bool,
    device: str,
    as_json: bool,
) -> None:
    """Write MODEL as ONNX, pixels in and probabilities out, checked against the model."""
    from edge_dfcil.learner import Learner

    learner = Learner.load(model, device)
    report = learner.export(
        out,
        quantize,
        calibration=_pictures(calibration, learner, strict),
        evaluation=_pictures(evaluation, learner, strict),
    )
    lines = [
        f"{out}: {report.classes} classes, {report.bytes} bytes, probabilities within {report.max_difference:.1g} of the model's"
    ]
    if report.speedup is not None:
        lines.append(f"{report.bytes / report.float_bytes:.0%} of the float file's size, {report.speedup:.1f} times as fast")
        lines += [f"answers as the model does for {share:.1%} of the {name}" for name, share in report.agreement.items()]
        lines += [f"accuracy on the {n}: {before:.1%} as float, {after:.1%}" for n, (before, after) in report.accuracy.items()]
    _answer(report.to_dict(), as_json, lines)


@main.command("distill")
@MODEL
@click.option("--to", required=True, metavar="BACKBONE", help="The student's: resnet20, mobilenet_v3_small, ...")
@click.option("--out", type=click.Path(path_type=Path), help="The student's file; MODEL with the backbone's name by default.")
@click.option("--rounds", type=click.IntRange(min=1), help="Of dreaming and learning; more is slower and better.")
@click.option(
    "--quality", type=click.Choice(["fast", "best"]), default="fast", show_default=True, help="best optimises every pixel."
)
@EVALUATION
@strict_option
@device_option
@json_option
def distill_command(
    model: Path,
    to: str,
    out: Path | None,
    rounds: int | None,
    quality: Literal["fast", "best"],
    evaluation: Path | None,
    strict: bool,
    device: str,
    as_json: bool,
) -> None:
    """Teach another BACKBONE what MODEL knows, from dreams alone."""
    from edge_dfcil.compression import Distillation, distill
    from edge_dfcil.learner import Learner

    out = _beside(model, to, out)
    learner = Learner.load(model, device)
    settings = Distillation(quality=quality, rounds=Distillation.rounds if rounds is None else rounds)
    student, report = distill(learner, to, settings=settings, evaluation=_pictures(evaluation, learner, strict))
    student.save(out)
    before, after = report.parameters
    lines = [f"{out}: {report.student}, {after} parameters instead of {report.teacher}'s {before}"]
    lines.append(f"answers as its teacher for {report.agreement:.1%} of fresh dreams; {report.seconds:.0f} s")
    if report.accuracy is not None:
        lines.append("accuracy {:.1%} as teacher, {:.1%} as student".format(*report.accuracy))
    _answer({**report.to_dict(), "model": str(out)}, as_json, lines)


@main.command("prune")
@MODEL
@click.option("--ratio", type=float, help="Share of filters to take away, for example 0.2.")
@click.option("--target-flops", "flops", type=float, help="Share of floating-point operations to keep.")
@click.option("--target-latency", "latency", type=float, help="Share of the latency to keep, by a table measured here.")
@click.option("--group", type=click.IntRange(min=1), default=8, show_default=True, help="Channels leave so many at a time.")
@click.option("--no-repair", is_flag=True, help="Do not learn from the original afterwards.")
@click.option("--out", type=click.Path(path_type=Path), help="The pruned model's file; MODEL-pruned by default.")
@EVALUATION
@strict_option
@device_option
@json_option
def prune_command(
    model: Path,
    no_repair: bool,
    out: Path | None,
    evaluation: Path | None,
    strict: bool,
    device: str,
    as_json: bool,
    **target: Any,
) -> None:
    """Take channels out of MODEL that matter little, and repair the rest, without data. Give one target."""
    from dataclasses import replace

    from edge_dfcil.compression import Pruning, prune
    from edge_dfcil.learner import Learner

    out = _beside(model, "pruned", out)
    settings = Pruning(**target)
    settings = replace(settings, repair=None) if no_repair else settings
    learner = Learner.load(model, device)
    smaller, report = prune(learner, settings, evaluation=_pictures(evaluation, learner, strict))
    smaller.save(out)
    lines = [
        f"{out}: {report.filters[1]} of {report.filters[0]} filters, {report.parameters[1]} of {report.parameters[0]} parameters"
    ]
    lines.append("{:.2f} ms an image before, {:.2f} ms after (ONNX Runtime, one thread)".format(*report.milliseconds))
    if report.accuracy is not None:
        lines.append("accuracy {:.1%} before, {:.1%} pruned, {:.1%} repaired".format(*report.accuracy))
    _answer({**report.to_dict(), "model": str(out)}, as_json, lines)


def _beside(model: Path, word: str, out: Path | None) -> Path:
    """Where a smaller model goes: what was asked for, or beside the whole one. Told before anything is trained."""
    out = out or model.with_name(f"{model.stem}-{word}{model.suffix}")
    if not out.parent.is_dir():
        raise SettingError(f"{out.parent} is not a folder; make it first")
    if out.exists() and model.exists() and out.samefile(model):
        raise SettingError(f"{out} is the model itself, which stays as it is; name another file")
    return out


def _pictures(path: Path | None, learner: Learner, strict: bool) -> Any | None:
    return None if path is None else _folder(path, learner, strict, batch_size=64).loader


@main.command()
@click.option(
    "--out", default="edge-dfcil-demo", show_default=True, type=click.Path(path_type=Path), help="Folder for what it makes."
)
@device_option
@json_option
def demo(out: Path, device: str, as_json: bool) -> None:
    """Learn real handwritten digits, two classes a task, beside fine-tuning and training on everything."""
    from edge_dfcil.demo import run

    answer = run(out, device=device, say=lambda line: click.echo(line, err=as_json))
    _answer(answer, as_json, [])


def _learner_for(model: Path, device: str, memory_budget: str | None, new: dict[str, Any]) -> Learner:
    """The learner in a model file, or a new one with the settings given."""

    from edge_dfcil.learner import Learner
    from edge_dfcil.recipe import find_recipe

    no_flip = new.pop("no_flip")
    given = {name: value for name, value in new.items() if value is not None}
    if model.exists():
        if given or no_flip:
            names = ", ".join("--" + name.replace("_", "-") for name in [*given, *(["no_flip"] if no_flip else [])])
            raise SettingError(f"{model} is there already and keeps its settings; leave out {names}, or name a new file")
        return Learner.load(model, device, memory_budget=memory_budget)
    if not model.parent.is_dir():
        raise SettingError(f"{model.parent} is not a folder; make it first")
    recipe = find_recipe(given.pop("recipe", "edge"))
    recipe = recipe.changed({"augmentation.flip": recipe.augmentation.flip and not no_flip})
    backbone = given.pop("backbone", "resnet32")
    return Learner(backbone, device=device, recipe=recipe, memory_budget=memory_budget, **given)


def _folder(images: Path, learner: Learner, strict: bool, batch_size: int) -> PictureFolder:
    from edge_dfcil.model.pictures import open_folder

    folder = open_folder(images, learner.image_size, batch_size=batch_size, strict=strict)
    for path in folder.skipped:
        click.echo(f"skipped {path}: it is not a picture that can be read", err=True)
    if folder.skipped:
        click.echo(f"skipped {len(folder.skipped)} of {len(folder.skipped) + len(folder.loader.dataset)} pictures", err=True)  # type: ignore[arg-type]
    return folder


def _answer(answer: Any, as_json: bool, lines: Sequence[str]) -> None:
    click.echo(json.dumps(answer) if as_json else "\n".join(lines), nl=as_json or bool(lines), file=sys.stdout)


if __name__ == "__main__":
    main()
