"""Shared by the tests: real digits, a recipe that takes one second per task, and trained learners."""

from __future__ import annotations

import copy
import os
from collections.abc import Container, Iterable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import nn

from edge_dfcil import RECIPES, Learner
from edge_dfcil.demo import Batches, digits

settings.register_profile("tests", deadline=None, max_examples=50)  # nothing is timed
settings.load_profile("tests")

# Faster for networks this small, and for the processes that the tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

QUICK = RECIPES["edge"].changed(
    {
        "schedule.epochs": 1,
        "schedule.first_epochs": 1,
        "schedule.min_steps": 12,
        "augmentation.brightness": 0.0,
        "augmentation.contrast": 0.0,
        "augmentation.flip": False,
        "augmentation.crop_padding": 2,
        "generator.latent": 16,
        "generator.width": 16,
        "generator.steps": 8,
        "generator.batch": 32,
        "remember.pool": 96,
        "refine.epochs": 1,
        "refine.min_steps": 4,
    }
)
NAMES = [str(digit) for digit in range(10)]


def slow_but(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of one test; those that are not in `quick` are marked as slow."""
    return [
        value if value in quick else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


class Conv(nn.Module):
    """A classifier with a convolution, from images (N, 3, H, W), uint8, to three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, 2)

    def forward(self, images: Any) -> Any:
        return self.conv(images.float() / 255).mean((2, 3))


def quick_learner(**settings: Any) -> Learner:
    return Learner("resnet8", **{"image_size": 16, "recipe": QUICK, "device": "cpu", **settings})


@pytest.fixture(scope="session")
def train() -> Batches:
    return digits()[0]


@pytest.fixture(scope="session")
def test() -> Batches:
    return digits()[1]


@pytest.fixture(scope="session")
def _learnt(train: Batches) -> Learner:
    learner = quick_learner()
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    return learner


@pytest.fixture
def learnt(_learnt: Learner) -> Learner:
    """A learner that knows the digits 0 and 1; each test has its own."""
    return copy.deepcopy(_learnt)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    """A copy of the tensors of the model that serves."""
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


def same_weights(before: dict[str, torch.Tensor], learner: Learner) -> bool:
    after = learner.network.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
