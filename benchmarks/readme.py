"""The parts of the project's README that are made from results, between marks."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import latency, memory, memory_tables, report, speed, tables, workshop, workshop_tables
from benchmarks.accuracy import ABLATIONS
from benchmarks.report import Results
from edge_dfcil.recipe import dotted

README = Path(__file__).resolve().parent.parent / "README.md"
SHOWN = "edge-5x4"  # the protocol of the README's table
ALL_CLASSES = "edge-5x20"
MIRRORED = "augmentation.mirrored_answers"
PUBLISHED, PUBLISHED_HOURS = "43.9 ± 0.9", 78  # ABD, CIFAR-100, 5 tasks (Smith et al., 2021, table 1); hours by our estimate


def write(folder: Path, readme: Path = README) -> None:
    """Replaces what stands between the README's marks."""
    text = readme.read_text()
    for mark, shown in SUMMARIES.items():
        begin, end = text.index("-->", text.index(f"<!-- {mark}:")) + 3, text.index(f"<!-- /{mark} -->")
        text = text[:begin] + "\n" + shown(folder) + text[end:]
    readme.write_text(text)


def budgets(folder: Path) -> str:
    """The README's account of memory."""
    if (found := report.measured(folder / memory.FILE)) is None:
        return ""
    picture = "\n\n![memory by image size, at rest and while learning](benchmarks/results/memory.png)"
    return memory_tables.summary(found) + (picture if memory_tables.has_replay(found) else "") + "\n"


def smaller(folder: Path) -> str:
    """The README's account of compression and of what ships."""
    made, answers = report.measured(folder / workshop.FULL.file), report.measured(folder / latency.FILE)
    long = report.measured(folder / workshop.LARGE.file)
    parts = [workshop_tables.describe(made, long, "benchmarks/results/")] if made else []
    parts += [latency.summary(answers)] if answers else []
    return "\n\n".join(parts) + "\n" if parts else ""


def photographs(folder: Path) -> str:
    """The README's table: what each method ends at, and what it keeps to get there."""
    found = report.read(folder)
    # Changed recipes have an equals sign in their names; ablations are of the published method.
    ablations = {name.replace(":", ".") for name in ABLATIONS}
    methods = {name: results for name, results in found[SHOWN].items() if name not in ablations and "=" not in name}
    head = ["method", "final accuracy, %", "seeds", "kept between tasks, MB", "of that beside the smallest model, MB"]
    rows = []
    model = min(mean(r["bytes_kept"] for r in results) for results in methods.values()) / 1e6
    for name, results in methods.items():
        kept = mean(r["bytes_kept"] for r in results) / 1e6
        more = f"{kept - model:.2f}" if kept - model > 0.005 else "0"
        rows.append([name, report.final(results), str(len(results)), f"{kept:.2f}", more])
    picture = f"![accuracy against minutes of learning](benchmarks/results/{SHOWN}-minutes.png)"
    note = "Minutes are of runs that may have shared their machine, on the CPUs that the result files name."
    parts = [tables.table(head, rows), picture, note, *_all_classes(found)]
    if timed := report.measured_all(folder, speed.FILE):
        parts.append(
            "At equal mathematics, a classifier step of ABD and a generator step beside the published ones, which are those of "
            "[demos/abd_in_one_file.py](demos/abd_in_one_file.py) "
            f"({timed[0]['setting']['backbone']}): {'; '.join(map(_speed, timed))}."
        )
    return "\n\n".join(parts) + "\n"


def pretrained(folder: Path) -> str:
    """The README's table of pretrained backbones: the default beside heads on the backbone's last features."""
    found = report.read(folder)
    rows = []
    for name, text in PRETRAINED.items():
        methods = {method: found.get(name, {}).get(method, []) for method in ("abd", *RIVALS)}
        seeds = set.intersection(*({r["seed"] for r in results} for results in methods.values()))  # compare equal seeds
        if seeds:
            same = {method: [r for r in results if r["seed"] in seeds] for method, results in methods.items()}
            ours = same["abd"]
            minutes = mean(sum(r["seconds"]) for r in ours) / 60
            images, shown = str(ours[0]["protocol"]["per_class"]), ", ".join(map(str, sorted(seeds)))
            rows.append([text, images, shown, *map(report.final, same.values()), f"{minutes:.1f}"])
    head = ["final accuracy, %", "images a class", "seeds", "edge-dfcil", *RIVALS.values(), "minutes for all tasks"]
    return tables.table(head, rows) + "\n" if rows else ""


RIVALS = {"frozen_lda": "LDA", "ridge": "ridge (RanPAC)", "fecam": "FeCAM"}
PRETRAINED = {
    "pretrained-signs": "ten hand signs (nothing like them in ImageNet)",
    "pretrained-signs-20": "the same, few images",
    "pretrained-cifar": "20 classes of CIFAR-100, scaled up",
    "pretrained-tiny": "20 classes of Tiny-ImageNet (the backbone has seen them)",
}


def _speed(timed: dict[str, Any]) -> str:
    machine = timed["machine"]
    where = f"{machine['threads']} CPU threads" if machine["device"] == "cpu" else f"an {machine['device']}"
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
        answered = " It answers by the mean over an image and its mirror image, at twice the work an answer"
        plainly = [report.final(other) for other in runs.values() if other is not results and _trained_alike(other, results)]
        answered += f"; answered by the image alone, another run of the same setting has {plainly[0]} %." if plainly else "."
    minutes = mean(sum(r["seconds"]) for r in results) / 60
    # Chosen by the accuracy that is shown, so the text says from how many.
    chosen = f", the best of {len(runs)} settings tried" if len(runs) > 1 else ""
    return [
        f"All 100 classes in five tasks of 20, `resnet32` (`{ALL_CLASSES}`, row `{name}`{chosen}): {report.final(results)} % "
        f"after {minutes:.0f} minutes on {results[0]['machine']['threads']} CPU threads.{answered} "
        f"Published for ABD: {PUBLISHED} %, for which the published code would take about {PUBLISHED_HOURS} hours on such a "
        f"machine.",
    ]


def _trained_alike(one: Results, other: Results) -> bool:
    """Whether two recipes differ only in test-time augmentation, among the settings that both have; older ones have fewer."""
    a, b = _settings(one), _settings(other)
    return all(a[name] == b[name] for name in a.keys() & b.keys() if name != MIRRORED)


def _settings(results: Results) -> dict[str, Any]:
    """The recipe's settings by dotted name; older results have flat names."""
    return dotted({name: value for name, value in results[0]["recipe"].items() if name not in ("preset", "version")})


SUMMARIES = {
    "pretrained": pretrained,
    "photographs": photographs,
    "budgets": budgets,
    "smaller": smaller,
}  # by mark in the README
