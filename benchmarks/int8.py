"""INT8 of trained mobile networks: size, speed and answers of each way to quantize, beside floats."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import exporters
from benchmarks import machine
from benchmarks.datasets import Data, Part, class_order
from benchmarks.tables import percent, table
from edge_dfcil import Learner
from edge_dfcil.exporting import Merged, Pictures
from edge_dfcil.recipe import RECIPES
from exporters import ExportError, ExportReport, Int8
from exporters import int8 as ways

FILE = "int8.json"
BACKBONES = {"mobilenet_v3_small": (6, 500), "efficientnet_b0": (12, 500)}  # epochs, and training images a class
CLASSES, IMAGE_SIZE, CALIBRATION = 10, 64, 60  # CALIBRATION: training images a class


def run(data: Data, models: Path, say: Callable[[str], None], backbones: Sequence[str]) -> dict[str, Any]:
    """Every way of `exporters.int8.ATTEMPTS` for each backbone, learnt on some classes or read from MODELS/NAME.safetensors.

    Each is calibrated on training images and checked on all test images. The last row of a backbone is the export
    of a learner without images, which calibrates on generated ones.
    """
    made = machine.provenance(torch.device("cpu"))
    order = class_order(len(data.names), 0)[:CLASSES]
    test, train = data.part("test", order, 250), data.part("train", order, 32)
    found = []
    for name in backbones:
        say(name)
        path = models / f"{name}.safetensors"
        if not path.exists():
            _trained(name, train, data).save(path)
        learner = Learner.load(path, "cpu")
        few, outputs = train.few(CALIBRATION, 1), {label: number for number, label in enumerate(learner.classes)}
        targets = np.array([outputs[data.names[target]] for _, batch in test for target in batch.tolist()])
        checks = {"pictures": Pictures(learner.model, test)}
        given = Int8(Pictures(learner.model, [*few]), checks, {"pictures": targets}, force=True)
        rows = {str(way): _exported(learner, given, way) for way in ways.ATTEMPTS}
        accuracy = learner.evaluate(test, data.names).accuracy
        say(f"{name}: generated images")
        found.append({"backbone": name, "accuracy": accuracy, "ways": rows, "generated": _generated(learner, test, data.names)})
    setting = {"classes": CLASSES, "image_size": IMAGE_SIZE, "calibration": CALIBRATION * CLASSES}
    return {"networks": found, "setting": setting, **made}


def _trained(name: str, train: Part, data: Data) -> Learner:
    epochs, images = BACKBONES[name]
    recipe = RECIPES["edge"].changed({"schedule.first_epochs": epochs, "schedule.learning_rate": 0.05})
    learner = Learner(name, image_size=IMAGE_SIZE, recipe=recipe, device="cpu", multiscale=False)
    learner.learn_task(train.few(images, 0), data.names)
    return learner


def _exported(learner: Learner, setting: Int8, way: ways.Attempt) -> dict[str, Any]:
    """What `exporters.export` reports of one way, or why it refused."""
    model, size = Merged(learner.model).eval(), learner.image_size
    given = replace(setting, attempts=(way,))
    return _reported(lambda path: exporters.export(model, path, classes=learner.classes, image_size=size, int8=given))


def _generated(learner: Learner, test: Part, names: Sequence[str]) -> dict[str, Any]:
    """What an export reports that has no training images, or why it refused."""
    return _reported(lambda path: learner.export(path, "int8", evaluation=test, classes=names, force=True, progress=False))


def _reported(export: Callable[[Path], ExportReport]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = export(Path(folder) / "m.onnx")
        except ExportError as error:
            return {"refused": str(error)}
    return report.to_dict() | {"path": ""}


def describe(found: dict[str, Any]) -> str:
    """The findings as Markdown."""
    setting = found["setting"]
    rows = [
        [network["backbone"], images, way if "refused" in report else report["quantization"], *_row(report)]
        for network in found["networks"]
        for images, way, report in (
            *(("training", way, report) for way, report in network["ways"].items()),
            ("generated", "every way", network["generated"]),
        )
    ]
    head = [
        "network",
        "calibrated on",
        "weights",
        "size of float, %",
        "times as fast",
        "accuracy as float, %",
        "as INT8, %",
        "agreement, %",
    ]
    text = (
        f"{setting['classes']} classes of CIFAR-100 at {setting['image_size']} pixels, trained here from scratch, calibrated on "
        f"{setting['calibration']} training images or, as an export does without any, on generated images; answers on all "
        f"test images, ONNX Runtime, one image, one thread, {found['machine']['processor']}. An export writes the first way that "
        "loses at most a point of accuracy, if it is faster than floats."
    )
    return f"{text}\n\n{table(head, rows)}"


def _row(report: dict[str, Any]) -> list[str]:
    if "refused" in report:
        return [report["refused"]]
    as_float, as_int8 = report["accuracy"]["pictures"]
    shares = [percent(share) for share in (as_float, as_int8, report["agreement"]["pictures"])]
    return [f"{100 * report['bytes'] / report['float_bytes']:.0f}", f"{report['speedup']:.2f}", *shares]
