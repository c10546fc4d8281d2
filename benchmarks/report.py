"""Tables and plots from result files, never by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks import embedding, latency, memory, memory_tables, speed, tables, workshop
from benchmarks.accuracy import omega

Results = list[dict[str, Any]]  # one a seed


def read(folder: Path) -> dict[str, dict[str, Results]]:
    """Finished runs by protocol and by method, with what was changed of its recipe; best last accuracy first."""
    found: dict[str, dict[str, Results]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*-seed*.json")):
        result = json.loads(path.read_text())
        name = result["protocol"]["name"]
        if len(result["matrix"]) == result["protocol"]["tasks"]:
            found[name][path.stem.rsplit("-seed", 1)[0].removeprefix(name + "-")].append(result)
    return {name: dict(sorted(methods.items(), key=lambda item: -last(item[1]))) for name, methods in sorted(found.items())}


def last(results: Results) -> float:
    """Mean final accuracy, %."""
    return 100 * mean(r["final_accuracy"] for r in results)


def final(results: Results) -> str:
    """The same with its standard deviation over seeds."""
    spread = f" ± {100 * stdev(r['final_accuracy'] for r in results):.1f}" if len(results) > 1 else ""
    return f"{last(results):.1f}{spread}"


def write(folder: Path) -> str:
    """README.md and the pictures of a folder of results; returns the text."""
    parts = ["# Results", "Made by `python -m benchmarks report` from the JSON files here. No figure is typed in."]
    for protocol, methods in read(folder).items():
        parts += [f"## {protocol}", describe(next(iter(methods.values()))[0]), table(folder, methods)]
        plot(methods, folder / f"{protocol}.png")
        parts += [f"![accuracy after each task]({protocol}.png)"]
        if keeps_differ(methods):
            plot_bytes(methods, folder / f"{protocol}-bytes.png")
            parts += [f"![accuracy against bytes kept]({protocol}-bytes.png)"]
        parts += _embeddings(folder, protocol, methods)
    if (timed := _measured(folder / speed.FILE)) is not None:
        parts += ["## Speed", speed.describe(timed)]
    if (held := _measured(folder / memory.FILE)) is not None:
        parts += ["## Memory", memory_tables.describe(held)]
        if memory_tables.has_replay(held):
            figure = _empty(width=9)
            memory_tables.plot(held, figure)
            figure.savefig(folder / "memory.png", dpi=150)
            parts += ["![memory by image size, at rest and while learning](memory.png)"]
    if (made := _measured(folder / workshop.FILE)) is not None:
        parts += ["## Workshop", workshop.describe(made)]
    if (answers := _measured(folder / latency.FILE)) is not None:
        parts += ["## Latency", latency.describe(answers)]
    text = "\n\n".join(parts) + "\n"
    (folder / "README.md").write_text(text)
    return text


README = Path(__file__).resolve().parent.parent / "README.md"
SHOWN = "edge-5x4"  # the protocol of the README's table
ALL_CLASSES = "edge-5x20"
PUBLISHED, PUBLISHED_HOURS = "43.9 ± 0.9", 78  # ABD, CIFAR-100, 5 tasks (Smith et al., 2021, table 1); hours by our reckoning


def write_readme(folder: Path, readme: Path = README) -> None:
    """Replaces what stands between the README's marks."""
    text = readme.read_text()
    for mark, shown in SUMMARIES.items():
        begin, end = text.index("-->", text.index(f"<!-- {mark}:")) + 3, text.index(f"<!-- /{mark} -->")
        text = text[:begin] + "\n" + shown(folder) + text[end:]
    readme.write_text(text)


def budgets(folder: Path) -> str:
    """The README's account of memory."""
    if (found := _measured(folder / memory.FILE)) is None:
        return ""
    picture = "\n\n![memory by image size, at rest and while learning](benchmarks/results/memory.png)"
    return memory_tables.summary(found) + (picture if memory_tables.has_replay(found) else "") + "\n"


def smaller(folder: Path) -> str:
    """The README's account of compression and of what ships."""
    made, answers = _measured(folder / workshop.FILE), _measured(folder / latency.FILE)
    parts = [workshop.summary(made)] if made else []
    if (folder / workshop.PAGE).exists():
        parts += ["Real photographs beside dreams of the same classes:"]
        parts += [f"![real and dreamt](benchmarks/results/{workshop.PAGE})"]
    parts += [latency.summary(answers)] if answers else []
    return "\n\n".join(parts) + "\n" if parts else ""


def summary(folder: Path) -> str:
    """The README's table: what each method ends at, and what it keeps to get there."""
    found = read(folder)
    # Ablations have a dot in their names, changed recipes an equals sign.
    methods = {name: results for name, results in found[SHOWN].items() if "." not in name and "=" not in name}
    head = ["method", "final accuracy, %", "seeds", "kept between tasks, MB", "of that images or a generator, MB"]
    rows = []
    model = min(mean(r["bytes_kept"] for r in results) for results in methods.values()) / 1e6
    for name, results in methods.items():
        kept = mean(r["bytes_kept"] for r in results) / 1e6
        more = f"{kept - model:.2f}" if kept - model > 0.005 else "0"
        rows.append([name, final(results), str(len(results)), f"{kept:.2f}", more])
    parts = [tables.table(head, rows), *_all_classes(found)]
    if (timed := _measured(folder / speed.FILE)) is not None:
        parts += [
            f"At equal mathematics a classifier step of ABD is {timed['classifier_step_ratio']:.1f} times as fast as a plain "
            f"transcription of the published one, and a generator step {timed['generator_step_ratio']:.1f} times "
            f"({timed['setting']['backbone']}, {timed['machine']['threads']} CPU threads).",
        ]
    return "\n\n".join(parts) + "\n"


def _measured(path: Path) -> dict[str, Any] | None:
    """What was measured apart from the protocols, if it has been."""
    return json.loads(path.read_text()) if path.exists() else None


def _all_classes(found: dict[str, dict[str, Results]]) -> list[str]:
    """The best run of ABD on all 100 classes, by the name of its row, beside what is published for it."""
    runs = {name: results for name, results in found.get(ALL_CLASSES, {}).items() if name.partition("-")[0] == "abd"}
    if not runs:
        return []
    name, results = next(iter(runs.items()))
    minutes = mean(sum(r["seconds"]) for r in results) / 60
    # Chosen by the very accuracy that is shown, so the reader is told from how many.
    chosen = f", the best of {len(runs)} settings tried" if len(runs) > 1 else ""
    return [
        f"All 100 classes in five tasks of 20, `resnet32` (`{ALL_CLASSES}`, row `{name}`{chosen}): {final(results)} % after "
        f"{minutes:.0f} minutes on {results[0]['machine']['threads']} CPU threads. Published for ABD: {PUBLISHED} %, "
        f"for which the published code would take about {PUBLISHED_HOURS} hours on such a machine.",
    ]


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
    """Markdown, a row a method."""
    head = ["method", "seeds", "after each task, %", "final, %", "average, %", "forgetting, %", "Omega"]
    head += ["kept, MB", "process peak, MB", "minutes"]
    rows = []
    for method, results in methods.items():
        each = " / ".join(f"{value:.1f}" for value in by_task(results))
        rows.append([
            method,
            ", ".join(str(r["seed"]) for r in results),
            each,
            final(results),
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
    return f"{machine['processor']}, {machine['threads']} threads{kept}"


def _mean(values: Sequence[float | None], form: str = "1f") -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.{form}}" if known else ""


def by_task(results: Results) -> list[float]:
    """Accuracy after each task, %, mean over seeds."""
    return [100 * mean(column) for column in zip(*(r["accuracy"] for r in results), strict=True)]


def plot(methods: dict[str, Results], path: Path) -> None:
    """Accuracy by classes seen, a line a method."""
    figure, axes = _figure()
    for number, (method, results) in enumerate(methods.items()):
        accuracy = by_task(results)
        size = results[0]["protocol"]["classes"] // len(accuracy)
        style = "-" if number < 10 else "--"
        axes.plot([size * (task + 1) for task in range(len(accuracy))], accuracy, style, marker="o", markersize=3, label=method)
    axes.set(xlabel="classes learnt", ylabel="accuracy on all of them, %", ylim=(0, 100))
    figure.legend(loc="outside lower center", fontsize="x-small", ncols=1 if len(methods) < 4 else 3)
    figure.savefig(path, dpi=150)


def keeps_differ(methods: dict[str, Results]) -> bool:
    """Whether some methods keep more than others, beyond a hundredth: else a picture of it would say nothing."""
    kept = [mean(r["bytes_kept"] for r in results) for results in methods.values()]
    return max(kept) > 1.01 * min(kept)


def plot_bytes(methods: dict[str, Results], path: Path) -> None:
    """Final accuracy by bytes kept between tasks, model included, a point a method."""
    figure, axes = _figure()
    for method, results in methods.items():
        x, y = mean(r["bytes_kept"] for r in results) / 1e6, last(results)
        axes.plot(x, y, "o")
        axes.annotate(method, (x, y), xytext=(4, 2), textcoords="offset points", fontsize="x-small")
    axes.set(
        xlabel="kept between tasks, MB (model included)", ylabel="final accuracy, %", xscale="log", xlim=(0.5, 200), ylim=(0, 100)
    )
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
        "over tasks and seeds. Above 1 in the last column, the features tell real from dreamt before old from new.",
        tables.table(head, rows),
    ]
    files = {method: folder / f"{protocol}-{method}-seed0-features.npz" for method in ("deep_inversion", "abd")}
    if all(file.exists() for file in files.values()):
        embedding.draw(files, folder / f"{protocol}-embedding.png")
        parts.append(f"![features after the second task, in two principal components]({protocol}-embedding.png)")
    return parts


SUMMARIES = {"photographs": summary, "budgets": budgets, "smaller": smaller}  # by mark in the README
