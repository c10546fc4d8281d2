"""The parts of the README and of the pages in `docs/` that are made from results, between marks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import files, latency, memory, memory_tables, report, speed, tables, workshop, workshop_tables
from benchmarks.accuracy import ABLATIONS
from benchmarks.report import Results
from edge_dfcil.recipe import dotted

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "../../benchmarks/results"  # from a page in docs/benchmarks/
PICTURE = "docs/minutes.png"
SHOWN = "edge-5x4"  # the protocol of the table of methods
ALL_CLASSES = "edge-5x20"
MIRRORED = "augmentation.mirrored_answers"
PUBLISHED, PUBLISHED_HOURS = "43.9 ± 0.9", 78  # ABD, CIFAR-100, 5 tasks (Smith et al., 2021, table 1); hours by our estimate


def write(folder: Path, root: Path = ROOT) -> None:
    """Fills every page's marks, and draws the README's picture."""
    for page, marks in PAGES.items():
        for mark, made in marks.items():
            fill(root / page, mark, made(folder))
    report.plot_chosen(report.read(folder)[SHOWN], root / PICTURE)


def fill(page: Path, mark: str, content: str) -> None:
    """Replaces what stands between a page's marks `<!-- NAME: ... -->` and `<!-- /NAME -->`."""
    text = page.read_text()
    begin, end = text.index("-->", text.index(f"<!-- {mark}:")) + 3, text.index(f"<!-- /{mark} -->")
    page.write_text(f"{text[:begin]}\n{content}{text[end:]}")


def budgets(folder: Path) -> str:
    """What learning takes under a budget, and beside replay."""
    if (found := files.read(folder / memory.FILE)) is None:
        return ""
    picture = f"\n\n![memory by image size, at rest and while learning]({RESULTS}/memory.png)"
    return memory_tables.summary(found) + (picture if memory_tables.has_replay(found) else "") + "\n"


def smaller(folder: Path) -> str:
    """Compression, and what ships."""
    made, answers = files.read(folder / workshop.FULL.file), files.read(folder / latency.FILE)
    long = files.read(folder / workshop.LARGE.file)
    parts = [workshop_tables.describe(made, long, f"{RESULTS}/")] if made else []
    parts += [latency.summary(answers)] if answers else []
    return "\n\n".join(parts) + "\n" if parts else ""


def photographs(folder: Path) -> str:
    """Each method from scratch: what each method ends at, and what it keeps to get there."""
    found = report.read(folder)
    # Changed recipes have an equals sign in their names; ablations are of the published method.
    ablations = {name.replace(":", ".") for name in ABLATIONS}
    methods = {name: results for name, results in found[SHOWN].items() if name not in ablations and "=" not in name}
    head = ["method", "final accuracy, %", "seeds", "kept between tasks, MB", "more than the smallest model, MB"]
    rows = []
    model = min(mean(r["bytes_kept"] for r in results) for results in methods.values()) / 1e6
    for name, results in methods.items():
        kept = mean(r["bytes_kept"] for r in results) / 1e6
        more = f"{kept - model:.2f}" if kept - model > 0.005 else "0"
        rows.append([name, report.final(results), str(len(results)), f"{kept:.2f}", more])
    picture = f"![accuracy against minutes of learning]({RESULTS}/{SHOWN}-minutes.png)"
    note = "Minutes are of runs that may have shared their machine, on the CPUs that the result files name."
    parts = [tables.table(head, rows), picture, note, *_all_classes(found)]
    if timed := report.measured_all(folder, speed.FILE):
        parts.append(
            "A classifier step and a generator step of ABD, compared with the published ones of the same mathematics in "
            "[demos/abd_in_one_file.py](../../demos/abd_in_one_file.py) "
            f"({timed[0]['setting']['backbone']}): {'; '.join(map(_speed, timed))}."
        )
    return "\n\n".join(parts) + "\n"


def pretrained(folder: Path) -> str:
    """The table of pretrained backbones: the default beside heads on the backbone's last features."""
    found = report.read(folder)
    rows = []
    for name, text in PRETRAINED.items():
        if methods := _of_equal_seeds(found.get(name, {}), "abd"):
            minutes = mean(sum(r["seconds"]) for r in methods["abd"]) / 60
            rows.append([text, *_figures(methods), f"{minutes:.1f}"])
    return tables.table([*HEAD, "minutes for all tasks"], rows) + "\n" if rows else ""


def compared(folder: Path) -> str:
    """The README's table: the same baselines where we do well and where we do not, and what methods reach that keep images."""
    found = report.read(folder)
    rows = []
    for (name, ours), text in COMPARED.items():
        if methods := _of_equal_seeds(found.get(name, {}), ours):
            rows.append([text, *_figures(methods)])
    beside = [
        f"{text} {report.final(results)} % ({len(results)} seed{'s' if len(results) > 1 else ''})"
        for name, text in BESIDE.items()
        if (results := found.get(SHOWN, {}).get(name))
    ]
    note = f"\nFor comparison with the last row: {', '.join(beside)}.\n" if beside else ""
    return f"{tables.table(HEAD, rows)}\n{note}" if rows else ""


def _of_equal_seeds(methods: dict[str, Results], ours: str) -> dict[str, Results]:
    """Our runs and those of the baselines, of the seeds that all have; empty where there are none."""
    chosen = {method: methods.get(method, []) for method in (ours, *BASELINES)}
    seeds = set.intersection(*({r["seed"] for r in results} for results in chosen.values()))
    return {method: [r for r in results if r["seed"] in seeds] for method, results in chosen.items()} if seeds else {}


def _figures(methods: dict[str, Results]) -> list[str]:
    """The cells of `HEAD` after the first."""
    ours = next(iter(methods.values()))
    images = str(ours[0]["protocol"]["per_class"] or "all")
    return [images, ", ".join(sorted(str(r["seed"]) for r in ours)), *map(report.final, methods.values())]


BASELINES = {"frozen_lda": "LDA", "ridge": "ridge (RanPAC)", "fecam": "FeCAM"}
HEAD = ["final accuracy, %", "images per class", "seeds", "edge-dfcil", *BASELINES.values()]
PRETRAINED = {
    "pretrained-signs": "ten hand signs (nothing like them in ImageNet)",
    "pretrained-signs-20": "the same, few images",
    "pretrained-cifar": "20 classes of CIFAR-100, scaled up",
    "pretrained-tiny": "20 classes of Tiny-ImageNet (the backbone has seen them)",
}
COMPARED = {
    ("pretrained-signs", "abd"): "ten hand signs, pretrained backbone",
    ("pretrained-signs-20", "abd"): "the same, few images",
    ("pretrained-cifar", "abd"): "20 classes of CIFAR-100, pretrained backbone",
    ("pretrained-cifar-per_class=5", "abd"): "the same, very few images",
    ("edge-5x4", "abd.frozen"): "20 classes of CIFAR-100, from scratch",
}  # by protocol and our row in it
BESIDE = {
    "upper_bound": "all images together",
    "icarl-400": "iCaRL, which keeps 400 images,",
    "bic-400": "BiC, which keeps 400 images,",
    "abd": "ABD, trained at every task,",
    "finetune": "fine-tuning",
}


def _speed(timed: dict[str, Any]) -> str:
    machine = timed["machine"]
    where = tables.counted(machine["threads"], "CPU thread") if machine["device"] == "cpu" else f"an {machine['device']}"
    return f"{timed['classifier_step_ratio']:.1f} and {timed['generator_step_ratio']:.1f} times as fast on {where}"


def _all_classes(found: dict[str, dict[str, Results]]) -> list[str]:
    """The best run of ABD or of the default on all 100 classes, by the name of its row, beside what is published for ABD."""
    every = found.get(ALL_CLASSES, {})
    runs = {name: results for name, results in every.items() if name.partition("-")[0] in ("abd", "abd.frozen")}
    if not runs:
        return []
    name, results = next(iter(runs.items()))
    answered = ""
    if _settings(results).get(MIRRORED):
        # Better answers are not better learning, so the text says which part of the figure they may be.
        answered = " It answers by the mean over an image and its mirror image, with twice the work per answer"
        plainly = [report.final(other) for other in runs.values() if other is not results and _trained_alike(other, results)]
        answered += f"; with the image alone, another run of the same setting has {plainly[0]} %." if plainly else "."
    minutes = mean(sum(r["seconds"]) for r in results) / 60
    # Chosen by the accuracy that is shown, so the text says from how many.
    chosen = f", the best of {len(runs)} settings tried" if len(runs) > 1 else ""
    return [
        f"All 100 classes in five tasks of 20, `resnet32` (`{ALL_CLASSES}`, row `{name}`{chosen}): {report.final(results)} % "
        f"after {minutes:.0f} minutes on {tables.counted(results[0]['machine']['threads'], 'CPU thread')}.{answered} "
        f"{_baselines(every)}Published for ABD: {PUBLISHED} %, "
        f"for which the published code would take about {PUBLISHED_HOURS} hours on such a "
        f"machine.",
    ]


def _baselines(methods: dict[str, Results]) -> str:
    found = [f"{text} {report.final(methods[name])}" for name, text in BASELINES.items() if name in methods]
    return f"Other heads on a frozen backbone, over its last features, end at: {', '.join(found)} %. " if found else ""


def _trained_alike(one: Results, other: Results) -> bool:
    """Whether two recipes differ only in test-time augmentation, among the settings that both have; older ones have fewer."""
    a, b = _settings(one), _settings(other)
    return all(a[name] == b[name] for name in a.keys() & b.keys() if name != MIRRORED)


def _settings(results: Results) -> dict[str, Any]:
    """The recipe's settings by dotted name; older results have flat names."""
    return dotted({name: value for name, value in results[0]["recipe"].items() if name not in ("preset", "version")})


PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"compared": compared},
    "docs/benchmarks/accuracy.md": {"pretrained": pretrained, "photographs": photographs},
    "docs/benchmarks/memory.md": {"budgets": budgets},
    "docs/benchmarks/smaller.md": {"smaller": smaller},
}  # what each page is filled with, by mark
