"""The method in one file equals that of the package: the same losses and gradients for the same weights and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.steps import classifier_of, generator_of
from demos import abd_in_one_file as one_file
from edge_dfcil import RECIPES
from edge_dfcil.dreaming.generator import Generator
from edge_dfcil.dreaming.inversion import Dreamer
from edge_dfcil.methods import find_method
from edge_dfcil.model.backbones import CifarResNet
from tests.test_abd import setting

PAPER = RECIPES["paper"]
CLASSES = [(2, 2), (3, 1), (4, 6)]  # old, new


def gradients(losses: dict[str, Tensor], module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(module.parameters())))


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], our_gradients: list[Tensor], their_gradients: list[Tensor]
) -> None:
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        assert loss.item() == pytest.approx(theirs[name].item(), rel=1e-4, abs=1e-6), name
    largest = max(gradient.abs().max() for gradient in our_gradients)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        # Some gradients are zero except for rounding, such as those of a bias before BatchNorm.
        assert (one - other).abs().max() <= 1e-3 * one.abs().max() + 1e-5 * largest


@pytest.mark.parametrize("depth", [8, 20])
def test_the_network_is_the_same_function_of_the_same_weights(depth: int) -> None:
    ours, theirs = CifarResNet(depth), one_file.ResNet(depth)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(4, 3, 16, 16)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize("image_size", [16, 32, 64])
def test_the_generator_is_the_same_function_of_the_same_weights(image_size: int) -> None:
    ours = Generator(image_size, latent=16, width=8)
    theirs = generator_of(ours)
    z = torch.randn(4, 16)
    assert torch.allclose(ours(z), theirs(z), atol=1e-4)


@pytest.mark.parametrize(("n_old", "n_new"), CLASSES)
def test_inversion_has_the_losses_and_gradients_of_the_package(n_old: Any, n_new: Any) -> None:
    task, _, _ = setting(PAPER, n_old, n_new)
    assert task.teacher is not None
    dreamer = Dreamer(task.teacher, task.old, PAPER.changed({"generator.latent": 16, "generator.width": 8}))
    generator, teacher = generator_of(dreamer.generator), one_file.Teacher(classifier_of(task.teacher))
    torch.manual_seed(1)
    ours = dreamer.stage().loss(dreamer.noise(12))
    torch.manual_seed(1)
    theirs = one_file.inversion_losses(teacher, generator.sample(12))
    assert_same(ours, theirs, gradients(ours, dreamer.generator), gradients(theirs, generator))


@pytest.mark.parametrize(("n_old", "n_new"), CLASSES)
def test_learning_has_the_losses_and_gradients_of_the_package(n_old: Any, n_new: Any) -> None:
    task, batch, dream = setting(PAPER, n_old, n_new)
    assert task.teacher is not None
    student, teacher = classifier_of(task.student), one_file.Teacher(classifier_of(task.teacher))
    ours = find_method("abd").loss(task, batch)
    theirs = one_file.learning_losses(student, teacher, batch.images, batch.targets, dream.images)
    assert_same(ours, theirs, gradients(ours, task.student), gradients(theirs, student))


def test_its_settings_are_the_published_ones() -> None:
    schedule, inversion = PAPER.schedule, PAPER.inversion
    assert schedule.learning_rate == one_file.LEARNING_RATE
    assert schedule.momentum == one_file.MOMENTUM
    assert schedule.weight_decay == one_file.WEIGHT_DECAY
    assert schedule.milestones == one_file.MILESTONES
    assert inversion.statistics == one_file.STATISTICS
    assert inversion.smoothness == one_file.SMOOTHNESS
    assert find_method("abd").mu == one_file.DISTILLATION


@pytest.mark.slow
def test_it_is_short_and_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(Path(one_file.__file__).read_text().splitlines()) < 200
    pixels, targets = load_digits(return_X_y=True)
    monkeypatch.setattr(one_file, "load_digits", lambda return_X_y: (pixels[::4], targets[::4]))  # noqa: N803
    monkeypatch.setattr(one_file, "EPOCHS", 2)
    monkeypatch.setattr(one_file, "GENERATOR_STEPS", 2)
    one_file.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["fine-tuning"] * 5 + ["ABD"] * 5
    assert lines[-1].endswith("% of the test images of 10 digits")
    assert lines[0].split(":")[1] == lines[5].split(":")[1], "the first task is the same without a teacher"
