"""`python -m benchmarks accuracy --data PATH` runs; `python -m benchmarks report` draws what was run."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks import accuracy, datasets
from benchmarks import report as reports


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Is it as good as we say."""


@main.command("accuracy")
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path), help="cifar100.npz, or its folder.")
@click.option("--protocol", default="edge-5x4", show_default=True, type=click.Choice(list(accuracy.PROTOCOLS)))
@click.option("--methods", default="finetune,deep_inversion,abd", show_default=True, help="Names, with commas between.")
@click.option("--seeds", default="0", show_default=True, help="Numbers, with commas between.")
@click.option("--out", default=accuracy.RESULTS, type=click.Path(file_okay=False, path_type=Path), help="Folder of result files.")
@click.option("--device", default="auto", show_default=True)
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change a number of the recipe; kept in the result.")
def run_accuracy(data: Path, protocol: str, methods: str, seeds: str, out: Path, device: str, changes: tuple[str, ...]) -> None:
    """Accuracy after each task. Stopped, it goes on from the last finished task when run again."""
    import ast

    loaded = datasets.load(data)
    out.mkdir(parents=True, exist_ok=True)
    changed = {name: ast.literal_eval(value) for name, _, value in (change.partition("=") for change in changes)}
    for method in methods.split(","):
        for seed in map(int, seeds.split(",")):
            result = accuracy.run(accuracy.PROTOCOLS[protocol], method, seed, loaded, out, device, changed)
            each = " ".join(f"{100 * value:.1f}" for value in result["accuracy"])
            click.echo(f"{protocol} {method} seed {seed}: {each} %, {sum(result['seconds']) / 60:.1f} minutes")


@main.command("report")
@click.option("--out", default=accuracy.RESULTS, type=click.Path(file_okay=False, path_type=Path), help="Folder of result files.")
def run_report(out: Path) -> None:
    """Writes README.md and a plot a protocol into the folder of results."""
    (out / "README.md").write_text(
        "# Results\n\nMade by `python -m benchmarks report` from the JSON files here.\n\n" + reports.table(out)
    )
    for protocol in {name for name, _ in reports.read(out)}:
        reports.plot(out, protocol, out / f"{protocol}.png")
    click.echo((out / "README.md").read_text())


if __name__ == "__main__":
    main()
