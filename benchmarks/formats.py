"""Every export format that is installed here: size, latency in turns, and answers on real images beside the model's."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.datasets import Data, class_order
from benchmarks.tables import percent, table
from edge_dfcil import Learner
from edge_dfcil.errors import ExportError
from exporters import list_exporters
from exporters.checks import Run
from exporters.formats import coreml
from exporters.timing import in_turns, session

FILE = "formats.json"
CLASSES = 10  # of the class order that the model was learnt with
# Of formats beside ONNX: the module that reads a file, as `run` of `exporters.formats` takes it.
READERS = {"coreml": "coremltools", "executorch": "executorch.runtime", "litert": "ai_edge_litert.interpreter"}


def run(data: Data, model: Path, say: Callable[[str], None], rounds: int = 40) -> dict[str, Any]:
    """Exports a model file in every format, and asks each for the answers to all test images. The process keeps to one core."""
    learner, made = Learner.load(model, "cpu"), machine.provenance(torch.device("cpu"))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    images = learner.network.pixels(data.part("test", class_order(len(data.names), 0)[:CLASSES], 250).images)
    pixels = (255 * images).round().to(torch.uint8).numpy()
    expected = learner.probabilities(torch.from_numpy(pixels)).numpy()
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for name in list_exporters():
        say(name)
        try:
            found[name], answer = _exported(learner, name)
        except ExportError as error:
            found[name] = {"refused": str(error)}
            continue
        if answer is None:
            continue
        answers = np.concatenate([answer(pixels[index : index + 1]) for index in range(len(pixels))])
        found[name]["agreement"] = float((answers.argmax(1) == expected.argmax(1)).mean())
        found[name]["difference"] = float(np.abs(answers - expected).max())
        calls[name] = lambda answer=answer: answer(pixels[:1])  # type: ignore[misc]
    for name, seconds in in_turns(calls, rounds, clock=time.process_time).items():
        found[name]["milliseconds"] = 1000 * seconds
    return {"backbone": learner.backbone, "image_size": learner.image_size, "images": len(pixels), "formats": found, **made}


def _exported(learner: Learner, name: str) -> tuple[dict[str, Any], Run | None]:
    """Size and seconds of a file in this format, and what answers from it; None for a format that cannot be read here."""
    unchecked = name == coreml.NAME and not coreml.runs_here()
    with tempfile.TemporaryDirectory() as folder:
        report = learner.export(Path(folder) / "model", format=name, unchecked=unchecked, progress=False)
        content = Path(report.path).read_bytes()
    return {"bytes": report.bytes, "seconds": report.seconds}, None if unchecked else _answer(content, name)


def _answer(content: bytes, name: str) -> Run:
    if name == "onnx":
        graph = session(content, 1)
        return lambda images: graph.run(["probabilities"], {"images": images})[0]
    made: Run = importlib.import_module(f"exporters.formats.{name}").run(content, importlib.import_module(READERS[name]))
    return made


def describe(found: dict[str, Any]) -> str:
    """The findings as Markdown."""
    rows = []
    for name, row in found["formats"].items():
        if "refused" in row:
            rows.append([name, row["refused"]])
            continue
        size, seconds = f"{row['bytes'] / 1e6:.2f}", f"{row['seconds']:.0f}"
        if "agreement" not in row:
            rows.append([name, size, "", "not compared: the machine cannot read it", "", seconds])
            continue
        rows.append([name, size, f"{row['milliseconds']:.2f}", percent(row["agreement"]), f"{row['difference']:.1g}", seconds])
    text = (
        f"{found['backbone']} at {found['image_size']} pixels, floats, {found['images']} test images beside torch "
        f"{found['versions']['torch']}, {found['machine']['processor']}. Latency: one image, seconds of the process on one core, "
        "median, in turns."
    )
    head = ["format", "MB", "latency, ms", "agreement, %", "largest difference of a probability", "seconds to export"]
    return f"{text}\n\n{table(head, rows)}"
