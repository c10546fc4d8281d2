"""A file stays readable: model and ONNX files of every released schema load and answer as they did when they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_dfcil import Learner
from edge_dfcil.demo import Batches
from exporters import OnnxClassifier
from tests.conftest import slow_but
from tests.golden.make import NAMES, own_classifier

FOLDER = Path(__file__).parent / "golden"
MODELS = sorted(FOLDER.glob("schema*/*.safetensors"))
GRAPHS = sorted(FOLDER.glob("schema*/*.onnx"))
TOLERANCE = 1e-5  # of a probability: rounding differs from one processor to another


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def load(path: Path) -> Learner:
    backbone = nn.Sequential(*own_classifier()[:-1], nn.Identity()) if path.stem == "adopted" else None  # its head taken off
    return Learner.load(path, "cpu", backbone=backbone)


def test_there_are_golden_files_of_every_kind() -> None:
    assert {path.stem for path in MODELS} == {"cifar", "torchvision", "adopted", "pruned", "mirrored", "closed_form"}
    assert {path.stem for path in GRAPHS} == {"cifar", "cifar-int8", "closed_form-any"}


def test_a_file_of_schema_2_keeps_statistics_and_thresholds() -> None:
    model = load(FOLDER / "schema2" / "closed_form.safetensors").model
    assert model.network.reads_scales
    assert {"mean", "count", "covariance", "frame"} == model.statistics.keys()
    assert model.statistics["mean"].images[3:] == (60, 0)  # no mean of only five images is kept
    assert model.temperature > 0 and len(model.thresholds) == 5
    graph = OnnxClassifier(FOLDER / "schema2" / "closed_form-any.onnx")
    assert graph.thresholds == model.thresholds


@pytest.mark.parametrize("path", MODELS, ids=named)
def test_a_model_file_answers_as_recorded(path: Any) -> None:
    answers = np.load(path.parent / "answers.npz")
    learner = load(path)
    images = torch.from_numpy(answers["images"])
    found = [[dict(p.top)[name] for name in learner.classes] for p in learner.predict(images, len(learner.classes))]
    np.testing.assert_allclose(found, answers[path.stem], atol=TOLERANCE)


@pytest.mark.parametrize("path", GRAPHS, ids=named)
def test_an_onnx_file_answers_as_recorded(path: Any) -> None:
    answers = np.load(path.parent / "answers.npz")
    found = OnnxClassifier(path).probabilities(answers["images"])
    # A quantized graph rounds activations to 256 steps; one step of difference between processors moves a probability.
    np.testing.assert_allclose(found, answers[path.name], atol=0.05 if "int8" in path.name else TOLERANCE)
    assert (found.argmax(1) == answers[path.name].argmax(1)).all()


@pytest.mark.parametrize("path", slow_but({FOLDER / "schema1" / "adopted.safetensors"}, MODELS), ids=named)
def test_a_model_file_learns_a_further_task(path: Any, train: Batches) -> None:
    learner = load(path)
    before = learner.classes
    learner.learn_task(train.of(("6", "7")), NAMES, progress=False)
    assert learner.classes == (*before, "6", "7")
