"""Tables and plots, made from result files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from benchmarks import (
    audits,
    candidates,
    embedding,
    files,
    formats,
    images,
    int8,
    latency,
    latent,
    memory,
    memory_tables,
    precision,
    rejection,
    speed,
    tables,
    trials,
    trust,
    workshop,
    workshop_tables,
)
from benchmarks.accuracy import PRESETS, VARIANTS, omega
from edge_dfcil.recipe import RECIPES

Results = list[dict[str, Any]]  # one a seed
FEW = "-per_class="  # in the name of a protocol: a preset with another number of images
UNEVEN = "imbalance="  # the same, of which classes have very different numbers


def read(folder: Path) -> dict[str, dict[str, Results]]:
    """Finished runs by protocol and by method, with what was changed of its recipe; best last accuracy first."""
    found: dict[str, dict[str, Results]] = defaultdict(lambda: defaultdict(list))
    for file, result in files.read_all(folder, "*-seed*.json").items():
        name = result["protocol"]["name"]
        if len(result["matrix"]) == result["protocol"]["tasks"]:
            found[name][file.rsplit("-seed", 1)[0].removeprefix(name + "-")].append(result)
    apart = {name: _versions_apart(methods) for name, methods in sorted(found.items())}
    return {name: dict(sorted(methods.items(), key=lambda item: -last(item[1]))) for name, methods in apart.items()}


def _versions_apart(methods: dict[str, Results]) -> dict[str, Results]:
    """Runs with an older version of their recipe as a method of their own, where there are newer ones: no mean is of both."""
    apart: dict[str, Results] = {}
    for name, results in methods.items():
        newer, older = ([r for r in results if is_older(r) == kind] for kind in (False, True))
        apart |= {name: newer, f"{name}, older": older} if newer and older else {name: results}
    return apart


def has_section(protocol: str) -> bool:
    """Whether a protocol has a section of its own; one with other numbers of images is a row of a table."""
    return few_of(protocol) is None and UNEVEN not in protocol


def last(results: Results) -> float:
    """Mean final accuracy, %."""
    return 100 * mean(r["final_accuracy"] for r in results)


def final(results: Results) -> str:
    """The same with its standard deviation over seeds."""
    return tables.over_seeds([r["final_accuracy"] for r in results], times=100)


def marked(results: Results) -> str:
    """The same, with a star where the recipe is not that of today."""
    return final(results) + (r" \*" if any(map(is_older, results)) else "")


def is_older(result: dict[str, Any]) -> bool:
    """Whether a run of ours was made before the preset, or what a variant changes of it, became what it is now."""
    if result["method"].partition(":")[0] != "abd":
        return False
    recipe, variant = result["recipe"], VARIANTS.get(result["method"], {})
    named = RECIPES.get(recipe.get("preset", ""))
    settings = {
        f"{group}.{name}": value for group, held in recipe.items() if isinstance(held, dict) for name, value in held.items()
    }
    changed = any(settings.get(name) != value for name, value in variant.items()) if settings else False
    return changed or (named is not None and recipe["version"] < named.version)


def write(folder: Path) -> str:
    """README.md and the pictures of a folder of results; returns the text."""
    parts = [
        "# Results",
        "Made by `python -m benchmarks report` from the JSON files here. No figure is entered by hand. A star marks runs with an "
        "older version of their recipe.",
    ]
    found = read(folder)
    for protocol, methods in found.items():
        if not has_section(protocol):
            continue
        parts += [f"## {protocol}", describe(next(iter(methods.values()))[0]), table(folder, methods)]
        if len(methods) > 1:
            plot(methods, folder / f"{protocol}.png")
            parts += [f"![accuracy after each task]({protocol}.png)"]
        if keeps_differ(methods):
            plot_bytes(methods, folder / f"{protocol}-bytes.png")
            parts += [f"![accuracy against bytes kept]({protocol}-bytes.png)"]
        if len(methods) > 2:
            plot_minutes(methods, folder / f"{protocol}-minutes.png")
            parts += [f"![accuracy against minutes]({protocol}-minutes.png)"]
        parts += _embeddings(folder, protocol, methods)
    if fewer := few_images(found):
        parts += ["## Few images", fewer]
    if uneven := imbalanced(found):
        parts += ["## Imbalance", uneven]
    if both := candidates.describe(found):
        parts += ["## Instant and adapted", both]
    if parts_tried := trials.describe(folder):
        parts += ["## Parts of other methods", parts_tried]
    if on_maps := latent.describe(folder):
        parts += ["## Latent inversion", on_maps]
    if timed := measured_all(folder, speed.FILE):
        parts += ["## Speed", *map(speed.describe, timed)]
    if (steps := files.read(folder / precision.FILE)) is not None:
        parts += ["## Precision", precision.describe(steps)]
    if (held := files.read(folder / memory.FILE)) is not None:
        parts += ["## Memory", memory_tables.describe(held)]
        if memory_tables.has_replay(held):
            figure = _empty(width=9)
            memory_tables.plot(held, figure)
            figure.savefig(folder / "memory.png", dpi=150)
            parts += ["![memory by image size, at rest and while learning](memory.png)"]
    if (made := files.read(folder / workshop.FULL.file)) is not None:
        parts += ["## Workshop", workshop_tables.describe(made, files.read(folder / workshop.LARGE.file))]
    if known := rejection.describe(folder):
        parts += ["## Rejection and calibration", known]
    if revealed := audits.describe(folder):
        parts += ["## What models reveal", revealed]
    if tried := trust.read(folder):
        parts += ["## Trust", trust.describe(tried)]
    if (answers := files.read(folder / latency.FILE)) is not None:
        parts += ["## Latency", latency.describe(answers)]
    if (shipped := files.read(folder / formats.FILE)) is not None:
        parts += ["## Formats", formats.describe(shipped)]
    if (quantized := files.read(folder / int8.FILE)) is not None:
        parts += ["## INT8 of mobile networks", int8.describe(quantized)]
    if (photographs := files.read(folder / images.FILE)) is not None:
        parts += ["## Images of any size", images.describe(photographs)]
    text = "\n\n".join(parts) + "\n"
    (folder / "README.md").write_text(text)
    return text


def few_of(protocol: str) -> tuple[str, int] | None:
    """The preset and the number of images per class of a protocol that differs from a preset in that number only."""
    preset, _, number = protocol.partition(FEW)
    return (preset, int(number)) if preset in PRESETS and number.isdigit() else None


def few_images(found: dict[str, dict[str, Results]]) -> str:
    """Final accuracy by the number of training images of a class, for the presets that were run with several; else empty."""
    presets: dict[str, dict[int, dict[str, Results]]] = defaultdict(dict)
    for name, methods in found.items():
        if (few := few_of(name)) is not None:
            preset, number = few
            presets[preset][number] = methods
            presets[preset][PRESETS[preset].per_class or 0] = found.get(preset, {})  # 0: all images, which have no column
    numbers = sorted({number for runs in presets.values() for number in runs if number})
    rows = []
    for preset, runs in presets.items():
        own = PRESETS[preset].per_class or 0
        for method in dict.fromkeys(method for number in sorted(runs) for method in runs[number] if number != own):
            cells = [runs.get(number, {}).get(method) for number in numbers]
            rows.append([preset, method, *(marked(results) if results else "" for results in cells)])
    head = ["final accuracy, %, by images per class", "method", *map(str, numbers)]
    seeds = sorted({r["seed"] for runs in presets.values() for methods in runs.values() for rs in methods.values() for r in rs})
    note = (
        f"Mean over seeds {', '.join(map(str, seeds))}, ± standard deviation. The baselines keep the mean of every class. "
        "Ours keeps no mean of fewer than ten images; such a class has its row of the head alone."
    )
    return f"{tables.table(head, rows)}\n\n{note}" if rows else ""


def imbalanced(found: dict[str, dict[str, Results]]) -> str:
    """Accuracy where the largest class has many times the images of the smallest; else empty."""
    rows = []
    for name, methods in found.items():
        preset = name.partition("-" + UNEVEN)[0].partition(FEW)[0]
        for method, results in methods.items() if UNEVEN in name else ():
            seeds = ", ".join(str(r["seed"]) for r in results)
            each = " / ".join(f"{value:.1f}" for value in by_task(results))
            rows.append([preset, _images(results[0]), method, seeds, each, marked(results)])
    head = ["preset", "images per class", "method", "seeds", "after each task, %", "final, %"]
    note = "Every class has the same number of test images. Training sets shrink geometrically, in an order drawn by the seed."
    return f"{tables.table(head, rows)}\n\n{note}" if rows else ""


def _images(result: dict[str, Any]) -> str:
    protocol = result["protocol"]
    most = protocol["per_class"] or (500 if protocol["dataset"] == "cifar100" else None)
    return f"{most} to {round(most / protocol['imbalance'])}" if most else f"all to 1/{protocol['imbalance']:g} of them"


def measured_all(folder: Path, file: str) -> list[dict[str, Any]]:
    """The same of a CPU and of accelerators: speed.json, speed-cuda.json."""
    paths = [folder / file, *sorted(folder.glob(file.replace(".", "-*.")))]
    return [found for path in paths if (found := files.read(path)) is not None]


def describe(result: dict[str, Any]) -> str:
    """The protocol in a sentence."""
    p = result["protocol"]
    data = p.get("dataset", "cifar100") + (f" ({result['packed']})" if result.get("packed") else "")
    changes = "".join(f", {name} {value}" for name, value in p.get("changes", {}).items())
    return (
        f"{data}, {p['classes']} classes in {p['tasks']} tasks, {p['backbone']}, recipe `{p['recipe']}`{changes}, batches of "
        f"{p['batch_size']}; accuracy on the test images of all classes seen, mean over seeds, ± standard deviation."
    )


def table(folder: Path, methods: dict[str, Results]) -> str:
    """Markdown with a row for each method."""
    head = ["method", "seeds", "after each task, %", "final, %", "average, %", "forgetting, %", "Omega"]
    head += ["kept, MB", "process peak, MB", "minutes"]
    rows = []
    for method, results in methods.items():
        each = " / ".join(f"{value:.1f}" for value in by_task(results))
        rows.append([
            method,
            ", ".join(str(r["seed"]) for r in results),
            each,
            marked(results),
            tables.percent(mean(r["average_incremental_accuracy"] for r in results)),
            tables.percent(mean(r["forgetting"] for r in results)),
            _mean([omega(r, folder) for r in results]),
            f"{mean(r['bytes_kept'] for r in results) / 1e6:.2f}",
            _mean([max(r["peak_bytes"]) / 1e6 if r.get("peak_bytes") else None for r in results], "0f"),
            f"{mean(sum(r['seconds']) for r in results) / 60:.1f}",
        ])  # fmt: skip
    machines = {_machine(r["machine"]) for results in methods.values() for r in results}
    note = "Minutes are of runs that may have shared their machine; compare speeds by the speed table only."
    return f"{tables.table(head, rows)}\n\nRun on {'; '.join(sorted(machines))}. {note}"


def _machine(machine: dict[str, Any]) -> str:
    kept = ", freed memory kept by the allocator" if machine.get("allocator") else ""
    return f"{tables.processor(machine)}{kept}"


def _mean(values: Sequence[float | None], form: str = "1f") -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.{form}}" if known else ""


def by_task(results: Results) -> list[float]:
    """Accuracy after each task, %, mean over seeds."""
    return [100 * mean(column) for column in zip(*(r["accuracy"] for r in results), strict=True)]


def plot(methods: dict[str, Results], path: Path) -> None:
    """Accuracy by classes seen, a line for each method."""
    figure, axes = _figure()
    for number, (method, results) in enumerate(methods.items()):
        accuracy = by_task(results)
        size = results[0]["protocol"]["classes"] // len(accuracy)
        style = "-" if number < 10 else "--"
        axes.plot([size * (task + 1) for task in range(len(accuracy))], accuracy, style, marker="o", markersize=3, label=method)
    axes.set(xlabel="classes learnt", ylabel="accuracy on all of them, %", ylim=(0, 100))
    # Names of changed recipes are long: a column takes the longest, and the picture holds about 120 letters.
    figure.legend(loc="outside lower center", fontsize="x-small", ncols=max(1, min(3, 120 // max(map(len, methods)))))
    figure.savefig(path, dpi=150)


def keeps_differ(methods: dict[str, Results]) -> bool:
    """Whether some methods keep more than others, beyond a hundredth: else a plot of it would show nothing."""
    kept = [mean(r["bytes_kept"] for r in results) for results in methods.values()]
    return max(kept) > 1.01 * min(kept)


def plot_bytes(methods: dict[str, Results], path: Path) -> None:
    """Final accuracy by bytes kept between tasks, model included, a point for each method."""
    kept = {method: mean(r["bytes_kept"] for r in results) / 1e6 for method, results in methods.items()}
    _plot_points(methods, kept, "kept between tasks, MB (model included)", path)


def plot_minutes(methods: dict[str, Results], path: Path) -> None:
    """Final accuracy by minutes of learning for all tasks, a point for each method."""
    taken = {method: mean(sum(r["seconds"]) for r in results) / 60 for method, results in methods.items()}
    _plot_points(methods, taken, "minutes for all tasks", path)


def plot_chosen(methods: dict[str, Results], path: Path) -> None:
    """The same of a few methods, by plain names and by what they keep; the upper bound is a line."""
    figure, axes = _figure()
    for kind, (colour, names) in CHOSEN.items():
        for method, name in names.items():
            if method in methods:
                results = methods[method]
                x, y = mean(sum(r["seconds"]) for r in results) / 60, last(results)
                axes.plot(x, y, "o", color=colour, label=kind if method == next(iter(names)) else None)
                offset, side = BESIDE.get(method, ((6, 3), "left"))
                axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize="small", ha=side)
    if "upper_bound" in methods:
        axes.axhline(last(methods["upper_bound"]), linestyle="--", color="grey", label="trained on all images together")
    axes.set(xlabel="minutes of learning for all five tasks", ylabel="accuracy on all 20 classes, %", ylim=(0, 100))
    axes.set_xlim(0, 1.25 * axes.get_xlim()[1])  # names stand to the right of their points
    axes.grid(color="0.92")
    axes.legend(loc="upper left", fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)


CHOSEN = {
    "edge-dfcil: keeps no image": (
        "tab:blue",
        {
            "abd.frozen": "frozen (default)",
            "abd.rotations_mirrored": "frozen, rotations, mirrored",
            "abd.strict": "strict",
            "abd": "ABD, every task",
        },
    ),
    "other methods that keep no image": (
        "tab:green",
        {
            "lwf_mc": "LwF.MC",
            "frozen_lda": "LDA",
            "ridge": "ridge",
            "fecam": "FeCAM",
            "deep_inversion": "DeepInversion",
            "finetune": "fine-tuning",
        },
    ),
    "methods that keep 400 images": (
        "tab:orange",
        {"icarl-400": "iCaRL", "bic-400": "BiC", "e2e-400": "EEIL", "rehearsal-400": "rehearsal"},
    ),
}
# Where a name stands that would cover another one: the offset in points, and which end of it is there.
BESIDE: dict[str, tuple[tuple[int, int], Literal["left", "right"]]] = {
    "lwf_mc": ((-6, -6), "right"),
    "rehearsal-400": ((-6, 0), "right"),
    "e2e-400": ((-6, 0), "right"),
    "frozen_lda": ((6, 0), "left"),
    "fecam": ((6, -8), "left"),
}


def _plot_points(methods: dict[str, Results], costs: dict[str, float], label: str, path: Path) -> None:
    figure, axes = _figure()
    for method, results in methods.items():
        x, y = costs[method], last(results)
        axes.plot(x, y, "o")
        axes.annotate(method, (x, y), xytext=(4, 2), textcoords="offset points", fontsize="x-small")
    axes.set(xlabel=label, ylabel="final accuracy, %", xscale="log", ylim=(0, 100))
    axes.set_xlim(min(costs.values()) / 1.5, 3 * max(costs.values()))  # names stand to the right of their points
    axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=150)


def _figure() -> Any:
    figure = _empty()
    return figure, figure.subplots()


def _empty(width: float = 7) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 4), layout="constrained")


def _embeddings(folder: Path, protocol: str, methods: dict[str, Results]) -> list[str]:
    """The MID table of a protocol, and the picture of the embedding where a run has left features."""
    rows = []
    for method, results in methods.items():
        found = [one for r in results for one in r.get("mid", [])]
        if found:
            new, synthetic = mean(one["to_new_real"] for one in found), mean(one["to_old_synthetic"] for one in found)
            rows.append([method, f"{new:.2f}", f"{synthetic:.2f}", f"{synthetic / new:.2f}"])
    if not rows:
        return []
    head = ["method", "old real to new real", "old real to old synthetic", "second over first"]
    parts = [
        "MID, the distance of mean features over the standard deviation of old real images' features (ABD, section 4), mean "
        "over tasks and seeds. Above 1 in the last column, the features separate real from generated before old from new.",
        tables.table(head, rows),
    ]
    files = {method: folder / f"{protocol}-{method}-seed0-features.npz" for method in ("deep_inversion", "abd")}
    if all(file.exists() for file in files.values()):
        embedding.draw(files, folder / f"{protocol}-embedding.png")
        parts.append(f"![features after the second task, in two principal components]({protocol}-embedding.png)")
    return parts
