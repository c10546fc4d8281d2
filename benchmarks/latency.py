"""How fast a classifier answers, in every form in which it is shipped; ratios of times that are measured in turns in one run."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.tables import counted, table
from edge_dfcil import Learner
from exporters.timing import in_turns, session

FILE = "latency.json"
BASE = "torch eager"
STARTS = {
    "onnx": "import numpy; from exporters import OnnxClassifier; "
    "OnnxClassifier({onnx!r}).predict(numpy.zeros((1, 3, {size}, {size}), 'uint8'))",
    "torch": "import torch; from edge_dfcil import Learner; "
    "Learner.load({model!r}, 'cpu').predict(torch.zeros(1, 3, {size}, {size}, dtype=torch.uint8))",
}


def run(
    model: Path, others: dict[str, Path], say: Callable[[str], None], rounds: int = 30, compiled: bool = True
) -> dict[str, Any]:
    """Latencies of a model file and of smaller ones made of it, batches of 1 and 32, one thread and two.

    Parameters
    ----------
    others
        Model files by a word for what they are ("pruned", "distilled").
    compiled
        Whether torch.compile is among them; it needs a compiler and takes a minute.
    """
    learner = Learner.load(model, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        graphs = _graphs(learner, others, Path(folder), say)
        found: dict[str, Any] = {"sizes": {name: len(graph) for name, graph in graphs.items()}, "seconds": {}}
        found["sizes"][BASE] = model.stat().st_size
        for threads in (1, 2):
            for batch in (1, 32):
                column = f"{counted(batch, 'image')}, {counted(threads, 'thread')}"
                say(column)
                found["seconds"][column] = _timed(learner, graphs, batch, threads, rounds, compiled)
        say("cold starts")
        path = Path(folder) / "start.onnx"
        path.write_bytes(graphs["onnx float"])
        found["start"] = _starts(str(path), str(model), learner.image_size)
    return {
        **found,
        "backbone": learner.backbone,
        **machine.provenance(torch.device("cpu")),
    }


def _graphs(learner: Learner, others: dict[str, Path], folder: Path, say: Callable[[str], None]) -> dict[str, bytes]:
    say("exports")
    graphs = {}
    for name, one, quantize in (
        ("onnx float", learner, None),
        ("onnx int8", learner, "int8"),
        *((f"onnx float, {word}", Learner.load(path, "cpu"), None) for word, path in others.items()),
    ):
        report = one.export(folder / "graph.onnx", quantize, force=quantize is not None, progress=False)
        graphs[name] = Path(report.path).read_bytes()
    return graphs


def _timed(learner: Learner, graphs: dict[str, bytes], batch: int, threads: int, rounds: int, compiled: bool) -> dict[str, float]:
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, learner.image_size, learner.image_size)).astype(np.uint8)
    tensor, before = torch.from_numpy(images), torch.get_num_threads()
    calls: dict[str, Callable[[], Any]] = {}

    def eager(network: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return network(tensor).softmax(1)

        return call

    def graph(content: bytes) -> Callable[[], Any]:
        one = session(content, threads)
        return lambda: one.run(["probabilities"], {"images": images})

    torch.set_num_threads(threads)
    try:
        calls[BASE] = eager(learner.network)
        if compiled:
            calls["torch.compile"] = eager(torch.compile(learner.network))
        calls |= {name: graph(content) for name, content in graphs.items()}
        return in_turns(calls, rounds)
    finally:
        torch.set_num_threads(before)


def _starts(onnx: str, model: str, size: int, rounds: int = 5) -> dict[str, float]:
    """Median seconds from the start of a process to its first answer, in turns."""

    def start(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code.format(onnx=onnx, model=model, size=size)], check=True)

    return in_turns({name: start(code) for name, code in STARTS.items()}, rounds, warm_up=1)


def describe(found: dict[str, Any]) -> str:
    """The findings as Markdown: how many times as fast as torch eager."""
    columns = list(found["seconds"])
    base = [f"{1000 * found['seconds'][column][BASE]:.2f} ms for {column}" for column in columns]
    text = (
        f"{found['backbone']}, {found['machine']['processor']}, torch {found['versions']['torch']}: times as fast as {BASE}, "
        f"which takes {', '.join(base)}; medians, in turns."
    )
    ratios = {column: _ratios(found, column) for column in columns}
    rows = []
    for name in ratios[columns[0]]:
        size = found["sizes"].get(name)
        shown = [f"{ratios[column][name]:.2f}" for column in columns]
        rows.append([name, "" if size is None else f"{size / 1e3:.0f}", *shown])
    return "\n\n".join([text, table(["form", "size, kB", *columns], rows), _start(found)])


def summary(found: dict[str, Any]) -> str:
    """The findings in short, for the page on smaller models."""
    column = next(iter(found["seconds"]))
    forms = ", ".join(f"{name} {ratio:.1f}" for name, ratio in _ratios(found, column).items() if name.startswith("onnx"))
    return f"Times as fast as {BASE} ({found['backbone']}, {column}): {forms}. {_start(found)}"


def _ratios(found: dict[str, Any], column: str) -> dict[str, float]:
    """How many times as fast as torch eager each form is."""
    seconds = found["seconds"][column]
    return {name: seconds[BASE] / value for name, value in seconds.items()}


def _start(found: dict[str, Any]) -> str:
    onnx, torch_too = found["start"]["onnx"], found["start"]["torch"]
    return (
        f"From the start of a process to its first answer: {onnx:.2f} s with ONNX Runtime alone, {torch_too:.2f} s with torch, "
        f"{torch_too / onnx:.1f} times as long."
    )
