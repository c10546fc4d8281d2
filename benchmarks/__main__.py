"""`python -m benchmarks accuracy --data PATH` runs; `python -m benchmarks report` draws what was run."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks import (
    accuracy,
    audits,
    datasets,
    files,
    latent,
    memory_tables,
    pages,
    runners,
    steps,
    trials,
    trust,
    workshop_tables,
)
from benchmarks import formats as forms
from benchmarks import images as photographs
from benchmarks import int8 as int8s
from benchmarks import latency as latencies
from benchmarks import memory as memories
from benchmarks import precision as precisions
from benchmarks import rejection as rejections
from benchmarks import report as reports
from benchmarks import speed as speeds
from benchmarks import workshop as workshops
from edge_dfcil.errors import EdgeDfcilError

RESULTS = click.option(
    "--out", default=accuracy.RESULTS, type=click.Path(file_okay=False, path_type=Path), help="Folder of result files."
)
DATA = click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="An .npz, a folder that holds it, or train/ and test/.",
)
DEVICE = click.option("--device", default="auto", show_default=True)
CHANGES = click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a number of the recipe; kept in the result."
)


class ReportsErrors(click.Group):
    """Ends with the message of an error that the package raises on purpose, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeDfcilError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=ReportsErrors, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Accuracy, speed and memory of the package and of baselines, and the tables of results."""


@main.command("accuracy")
@DATA
@click.option("--preset", default="edge-5x4", show_default=True, help=f"With commas between: {', '.join(accuracy.PRESETS)}.")
@click.option(
    "--methods",
    default="finetune,deep_inversion,abd",
    show_default=True,
    help="Names with commas between: a method, a yardstick with its coreset (bic-400, bic-1MB), a head on a frozen backbone "
    f"({', '.join(runners.names())}), or ablations.",
)
@click.option("--seeds", default="0", show_default=True, help="Numbers, with commas between; the class order follows them.")
@click.option("--dataset", type=click.Choice(datasets.DATASETS), help="Other than the preset's.")
@click.option("--classes", type=int, help="How many, from the start of the order.")
@click.option("--tasks", type=int)
@click.option("--backbone")
@click.option("--recipe")
@click.option("--image-size", type=int)
@click.option("--batch-size", type=int)
@click.option("--per-class", type=int, help="Training images of a class; the preset's, or all.")
@click.option("--imbalance", type=float, help="Images of the largest class over those of the smallest; accuracy is as before.")
@click.option("--multiscale/--no-multiscale", default=None, help="Whether features are of several scales.")
@CHANGES
@click.option("--minutes", type=float, help="Begin no task that would not end in this time.")
@RESULTS
@DEVICE
def run_accuracy(
    data: Path,
    preset: str,
    methods: str,
    seeds: str,
    changes: tuple[str, ...],
    minutes: float | None,
    out: Path,
    device: str,
    **other: Any,
) -> None:
    """Accuracy after each task. Run again, a stopped run continues from the last finished task."""
    given = {name: value for name, value in other.items() if value is not None}
    protocols = [accuracy.changed(accuracy.find_preset(name), given) for name in preset.split(",")]
    numbers = _numbers(changes)
    out.mkdir(parents=True, exist_ok=True)
    in_time = _deadline(minutes)
    try:
        for protocol in protocols:
            loaded = datasets.load(data, protocol.dataset, protocol.image_size)
            for seed in map(int, seeds.split(",")):
                for method in accuracy.expand(methods):
                    result = runners.run(protocol, method, seed, loaded, out, device, numbers, in_time)
                    each = " ".join(f"{100 * value:.1f}" for value in result["accuracy"])
                    click.echo(f"{protocol.name} {method} seed {seed}: {each} %, {sum(result['seconds']) / 60:.1f} minutes")
    except accuracy.Stopped:
        click.echo("stopped, because the next task would not end in time; run the same command again to continue")
    else:
        click.echo("all of it has been run")


def _known(option: str, names: str, known: Collection[str]) -> list[str]:
    """The names that an option gives, with commas between."""
    given = names.split(",")
    if unknown := set(given) - set(known):
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint=option)
    return given


def _deadline(minutes: float | None) -> Callable[[float], bool]:
    """Whether a task as long as the longest so far would end in time."""
    end, longest = time.monotonic() + 60 * (minutes or float("inf")), 0.0

    def in_time(seconds: float) -> bool:
        nonlocal longest
        longest = max(longest, seconds)
        return time.monotonic() + 1.1 * longest < end

    return in_time


def _numbers(changes: Sequence[str]) -> dict[str, Any]:
    return {name: _value(value) for name, _, value in (change.partition("=") for change in changes)}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@main.command("pack")
@DATA
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--limit", default=60.0, show_default=True, help="MiB.")
def run_pack(data: Path, out: Path, limit: float) -> None:
    """Packs CIFAR-100 into a smaller file, for a machine that accepts no larger one; results say how."""
    click.echo(f"{out}: {datasets.pack(datasets.load(data), out, int(limit * 2**20))}")


@main.command("speed")
@click.option("--json", "as_json", is_flag=True, help="Print figures for machines.")
@click.option("--quick", is_flag=True, help="A tiny network: whether it runs, not how fast.")
@RESULTS
@DEVICE
def run_speed(as_json: bool, quick: bool, out: Path, device: str) -> None:
    """Our steps against the published ones, in turns and in one run, and where the time goes."""
    found = speeds.run(device, steps.QUICK if quick else steps.FULL, lambda line: click.echo(line, err=True))
    if not quick:
        files.write(out / speeds.file(device), found)
    click.echo(json.dumps(found) if as_json else speeds.describe(found))


@main.command("precision")
@DATA
@click.option("--quick", is_flag=True, help="A tiny network: whether it runs, not how fast.")
@click.option("--remark", help="What else ran on the machine at that time; kept in the result.")
@click.option("--name", default=precisions.FILE, show_default=True, help="Of the result's file.")
@RESULTS
def run_precision(data: Path, quick: bool, remark: str | None, name: str, out: Path) -> None:
    """Steps in float32 and bf16, in both memory orders and with fewer threads, in turns; and whether bf16 costs accuracy."""
    setting = precisions.QUICK if quick else precisions.FULL
    found = precisions.run(datasets.load(data), setting, lambda line: click.echo(line, err=True), remark)
    if not quick:
        files.write(out / name, found)
    click.echo(precisions.describe(found))


@main.command("memory")
@DATA
@click.option("--kinds", default=",".join(memories.KINDS), show_default=True, help="What to run; those done already are kept.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Of the kinds that have more than one.")
@RESULTS
def run_memory(data: Path, kinds: str, seeds: str, out: Path) -> None:
    """Plans against peaks under budgets, bytes kept against replay, and whether memory grows; resumable at any run."""
    wanted = set(map(int, seeds.split(",")))
    chosen = [cell for cell in memories.cells(kinds.split(",")) if cell.seed in wanted]
    click.echo(memory_tables.describe(memories.run(chosen, data, out, lambda line: click.echo(line, err=True))))


@main.command("workshop")
@DATA
@click.option("--parts", default=",".join(workshops.PARTS), show_default=True, help="What to run; steps done already are kept.")
@click.option(
    "--models", type=click.Path(file_okay=False, path_type=Path), default="edge-dfcil-workshop", help="Folder of models."
)
@click.option("--large", "setting", flag_value="large", help="More dreams, and seeds: for an accelerator.")
@click.option("--quick", "setting", flag_value="quick", help="Tiny: whether it runs, not how well.")
@click.option(
    "--table",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Latencies of the device to prune for; without it they are measured on this one.",
)
@RESULTS
@DEVICE
def run_workshop(data: Path, parts: str, models: Path, setting: str | None, table: Path | None, out: Path, device: str) -> None:
    """Distillation, pruning, INT8 and adoption through dreams; resumable at any step."""
    models.mkdir(parents=True, exist_ok=True)
    chosen = workshops.SETTINGS[setting or "full"]
    shop = workshops.Workshop(datasets.load(data), out, models, chosen, device, table)
    found = shop.run(["teacher", *parts.split(",")], lambda line: click.echo(line, err=True))
    click.echo(workshop_tables.describe(found))


@main.command("rejection")
@DATA
@click.option("--preset", default=rejections.PRESETS, show_default=True, help="With commas between; their tasks and data.")
@click.option("--seeds", default="0", show_default=True, help="Numbers, with commas between; the class order follows them.")
@click.option("--per-class", type=int, help="Training images of a class; the preset's, or all.")
@RESULTS
@DEVICE
def run_rejection(data: Path, preset: str, seeds: str, per_class: int | None, out: Path, device: str) -> None:
    """Rejection of classes that were not learnt, and calibration; results done already are kept."""
    given = {} if per_class is None else {"per_class": per_class}
    protocols = [accuracy.changed(accuracy.find_preset(name), given) for name in preset.split(",")]
    chosen = [int(seed) for seed in seeds.split(",")]
    rejections.run_all(protocols, chosen, lambda p: datasets.load(data, p.dataset, p.image_size), out, device, click.echo)
    click.echo(rejections.describe(out))


@main.command("audit")
@DATA
@click.option("--preset", default="edge-5x4", show_default=True, help="With commas between; their tasks and data.")
@click.option("--recipes", default=audits.RECIPES, show_default=True, help="With commas between.")
@click.option("--seeds", default="0", show_default=True, help="Numbers, with commas between; the class order follows them.")
@CHANGES
@RESULTS
@DEVICE
def run_audit(data: Path, preset: str, recipes: str, seeds: str, changes: tuple[str, ...], out: Path, device: str) -> None:
    """What models reveal of their training images; results done already are kept."""
    protocols = [accuracy.find_preset(name) for name in preset.split(",")]
    chosen = [int(seed) for seed in seeds.split(",")]

    def load(protocol: accuracy.Protocol) -> datasets.Data:
        return datasets.load(data, protocol.dataset, protocol.image_size)

    audits.run_all(protocols, recipes.split(","), chosen, load, out, device, click.echo, _numbers(changes))
    click.echo(audits.describe(out))


@main.command("latency")
@click.option("--model", required=True, type=click.Path(exists=True, path_type=Path), help="A model file.")
@click.option("--pruned", type=click.Path(exists=True, path_type=Path), help="The same model, pruned.")
@click.option("--distilled", type=click.Path(exists=True, path_type=Path), help="A student of it.")
@click.option("--json", "as_json", is_flag=True, help="Print figures for machines.")
@click.option("--quick", is_flag=True, help="A few rounds, without torch.compile: whether it runs, not how fast.")
@RESULTS
def run_latency(model: Path, as_json: bool, quick: bool, out: Path, **others: Path | None) -> None:
    """How fast a model answers in every form that it is shipped in, and how soon after its process starts."""
    given = {name: path for name, path in others.items() if path is not None}
    rounds = 3 if quick else 30
    found = latencies.run(model, given, lambda line: click.echo(line, err=True), rounds=rounds, compiled=not quick)
    if not quick:
        files.write(out / latencies.FILE, found)
    click.echo(json.dumps(found) if as_json else latencies.describe(found))


@main.command("images")
@DATA
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A model file of these classes; else one is learnt.")
@click.option("--quick", is_flag=True, help="Three sizes: whether it runs.")
@RESULTS
def run_images(data: Path, model: Path | None, quick: bool, out: Path) -> None:
    """What the exported file, and apps that scale by themselves, answer to photographs of 30 sizes, beside the learner."""
    sizes = photographs.SIZES[::10] if quick else photographs.SIZES
    found = photographs.run(data, model, lambda line: click.echo(line, err=True), sizes)
    if not quick:
        files.write(out / photographs.FILE, found)
    click.echo(photographs.describe(found))


@main.command("int8")
@DATA
@click.option("--models", type=click.Path(file_okay=False, path_type=Path), default="edge-dfcil-int8", help="Folder of models.")
@click.option("--backbones", default=",".join(int8s.BACKBONES), show_default=True, help="Names with commas between.")
@RESULTS
def run_int8(data: Path, models: Path, backbones: str, out: Path) -> None:
    """Each way to quantize mobile networks, which are trained first where MODELS does not hold them."""
    models.mkdir(parents=True, exist_ok=True)
    found = int8s.run(datasets.load(data), models, lambda line: click.echo(line, err=True), backbones.split(","))
    files.write(out / int8s.FILE, found)
    click.echo(int8s.describe(found))


@main.command("formats")
@DATA
@click.option(
    "--model", required=True, type=click.Path(exists=True, path_type=Path), help="A model file of ten of these classes."
)
@RESULTS
def run_formats(data: Path, model: Path, out: Path) -> None:
    """Size, latency and answers of a model in every format whose extra is installed."""
    found = forms.run(datasets.load(data), model, lambda line: click.echo(line, err=True))
    files.write(out / forms.FILE, found)
    click.echo(forms.describe(found))


@main.command("trials")
@DATA
@click.option("--presets", default=",".join(trials.SETTINGS), show_default=True, help="Names with commas between.")
@click.option("--seeds", default="0", show_default=True, help="Numbers, with commas between; the class order follows them.")
@click.option("--parts", default=",".join(trials.TRIALS), help="Names with commas between; all of them by default.")
@RESULTS
def run_trials(data: Path, presets: str, seeds: str, parts: str, out: Path) -> None:
    """ABD with one part of another method each; a stopped run continues from the last finished trial."""
    chosen = _known("--presets", presets, trials.SETTINGS), _known("--parts", parts, trials.TRIALS)
    for setting in map(trials.SETTINGS.__getitem__, chosen[0]):
        loaded = datasets.load(data, setting.protocol.dataset, setting.protocol.image_size)
        for seed in map(int, seeds.split(",")):
            trials.run(setting, loaded, seed, out, click.echo, chosen[1])
    click.echo(trials.describe(out))


@main.command("latent")
@DATA
@click.option("--presets", default=",".join(latent.BUDGETS), show_default=True, help="Names with commas between.")
@click.option("--seeds", default="0", show_default=True, help="Numbers, with commas between; the class order follows them.")
@click.option("--variants", default=",".join(latent.VARIANTS), show_default=True, help="Names with commas between.")
@RESULTS
def run_latent(data: Path, presets: str, seeds: str, variants: str, out: Path) -> None:
    """Upper blocks trained on generated feature maps; a stopped run continues from the last finished variant."""
    chosen = _known("--presets", presets, latent.BUDGETS), _known("--variants", variants, latent.VARIANTS)
    for protocol in map(accuracy.find_preset, chosen[0]):
        loaded = datasets.load(data, protocol.dataset, protocol.image_size)
        for seed in map(int, seeds.split(",")):
            latent.run(protocol, loaded, seed, out, click.echo, chosen[1])
    click.echo(latent.describe(out))


@main.command("trust")
@click.option("--checks", default=",".join(trust.CHECKS), show_default=True, help="Names with commas between.")
@click.option("--share", type=float, default=1.0, show_default=True, help="Of the trials of each.")
@RESULTS
def run_trust(checks: str, share: float, out: Path) -> None:
    """Kills, damaged files and rubbish input by the thousand; a stopped run continues from the last finished piece."""
    names = checks.split(",")
    if unknown := set(names) - set(trust.CHECKS):
        raise click.BadParameter(f"unknown checks: {', '.join(sorted(unknown))}", param_hint="--checks")
    click.echo(trust.describe(trust.run(names, out, lambda line: click.echo(line, err=True), share)))


@main.command("report")
@RESULTS
def run_report(out: Path) -> None:
    """Writes README.md and the plots of every protocol into the folder of results, and the tables of the project's pages."""
    click.echo(reports.write(out))
    if out.resolve() == accuracy.RESULTS:
        pages.write(out)


if __name__ == "__main__":
    main()
