"""Backbones by name: families, their statistics and sizes, and that adding a family is one call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import edge_dfcil
from edge_dfcil import BackboneError, Learner, SettingError, list_backbones, register_backbone
from edge_dfcil.demo import Batches
from edge_dfcil.model import backbones
from tests.conftest import NAMES, QUICK


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a family that a test registers; it is removed after the test."""
    monkeypatch.setattr(backbones, "_FAMILIES", dict(backbones._FAMILIES))
    return "toy"


def tiny(name: str, weights: str | None = None) -> nn.Module:
    width, layers = int(name), []
    for channels in (3, width, width):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.slow
def test_a_new_family_is_one_call(family: Any, train: Batches, test: Batches, tmp_path: Path) -> None:
    """A learner of it learns, is saved, and is loaded by the name, which is listed."""
    register_backbone(family, tiny, names=["8", "16"])
    assert list_backbones("toy:*") == ["toy:16", "toy:8"]
    learner = Learner("toy:8", image_size=16, recipe=QUICK, device="cpu")
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    loaded = Learner.load(learner.save(tmp_path / "m"), "cpu")
    assert loaded.backbone == "toy:8"
    loaded.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert loaded.classes == ("0", "1", "2", "3")
    assert Learner.load(learner.save(tmp_path / "m"), "cpu").predict(test.images[:4]) == learner.predict(test.images[:4])


def test_a_file_of_a_family_that_is_not_registered_says_so(family: Any, tmp_path: Path) -> None:
    register_backbone(family, tiny)
    path = Learner("toy:8", image_size=16, recipe=QUICK, device="cpu").save(tmp_path / "m")
    del backbones._FAMILIES[family]
    with pytest.raises(BackboneError, match=r"no family of backbones is called 'toy'.*register"):
        Learner.load(path, "cpu")


def test_a_family_says_how_its_images_are(family: Any) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    register_backbone(family, lambda name, weights: backbones.Backbone(tiny(name), mean, std, 24))
    learner = Learner("toy:8", device="cpu")
    assert learner.image_size == 24
    assert learner.network.mean.flatten().tolist() == pytest.approx(mean)
    assert learner.network.std.flatten().tolist() == pytest.approx(std)
    own = Learner("toy:8", image_size=16, mean=(0.5,) * 3, std=(1.0,) * 3, device="cpu")
    assert own.image_size == 16
    assert own.network.mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("family_name", "build", "message"),
    [
        ("cifar", tiny, "already registered"),
        ("Toy", tiny, "lower-case"),
        ("a:b", tiny, "lower-case"),
        (None, tiny, "lower-case"),
        ("toy", "resnet8", "must be a function"),
    ],
)
def test_families_that_cannot_be(family: Any, family_name: Any, build: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        register_backbone(family_name, build)


def test_a_family_can_be_replaced(family: Any) -> None:
    register_backbone("cifar", tiny, replace=True)
    assert isinstance(backbones.build("cifar:8"), nn.Sequential)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda name, weights: {}[name], "toy:8 could not be built.*'8'"),
        (lambda name, weights: None, "built a NoneType"),
        (lambda name, weights: nn.Flatten(), "0 BatchNorm layers"),
    ],
)
def test_what_a_family_builds_wrongly_is_an_error_of_the_package(family: Any, build: Callable[..., Any], message: str) -> None:
    register_backbone(family, build)
    with pytest.raises(BackboneError, match=message):
        Learner("toy:8", image_size=16, device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet33", "'resnet33'.*resnet32"),
        ("cifar:resnet18", "'cifar:resnet18'.*resnet32"),
        ("torchvision:resnet20", "'resnet20'"),
        ("keras:resnet50", "no family.*cifar, torchvision, timm"),
        ("", "no backbone is called ''"),
        (":", "no family"),
        ("squeezenet1_0", r"no nn\.Linear"),
        (32, "must be a torch.nn.Module"),
        (None, "None was given"),
    ],
)
def test_names_that_are_none(name: Any, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        Learner(name, device="cpu")


def test_short_and_full_names_are_the_same_network() -> None:
    for short, full in (("resnet8", "cifar:resnet8"), ("mobilenet_v3_small", "torchvision:mobilenet_v3_small")):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            one = backbones.build(short).state_dict()
            torch.manual_seed(0)
            other = backbones.build(full).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert backbones.smaller("cifar:resnet20") == backbones.smaller("resnet20") == ["resnet14"]
    assert backbones.smaller("torchvision:mobilenet_v3_small") == []


def test_names_are_listed_by_a_pattern() -> None:
    assert list_backbones("cifar:*") == sorted(f"cifar:{name}" for name in backbones.CIFAR_RESNETS)
    assert {"cifar:resnet20", "torchvision:resnet18"} <= set(list_backbones("resnet*"))
    assert set(backbones.names()) <= {name.partition(":")[2] for name in list_backbones()}
    assert not [name for name in list_backbones("torchvision:*") if ":vit_" in name or name.endswith("vgg11")]
    assert list_backbones("nothing*") == []


def test_weights_are_for_names() -> None:
    with pytest.raises(SettingError, match="by name"):
        Learner(tiny("8"), image_size=16, weights="DEFAULT", device="cpu")
    with pytest.raises(BackboneError, match="weights=True"):
        Learner("resnet18", weights=True, device="cpu")  # type: ignore[arg-type]


def test_pretrained_weights_bring_their_own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """efficientnet_v2_l was trained with a mean of 0.5, unlike most; googlenet's `transform_input` amounts to the same."""
    from torchvision.models import _api

    monkeypatch.setattr(
        _api.WeightsEnum, "get_state_dict", lambda self, *args, **settings: (_ for _ in ()).throw(OSError("offline"))
    )
    with pytest.raises(BackboneError, match="offline"):
        backbones.create("resnet18", "DEFAULT")
    statistics = backbones._torchvision_statistics
    assert statistics("resnet18", "DEFAULT") == backbones.IMAGENET_STATISTICS
    assert statistics("resnet18", "IMAGENET1K_V1") == backbones.IMAGENET_STATISTICS
    assert statistics("efficientnet_v2_l", "DEFAULT") == ((0.5,) * 3, (0.5,) * 3)
    assert statistics("googlenet", "DEFAULT") == ((0.5,) * 3, (0.5,) * 3)
    assert statistics("resnet18", None) == (None, None)


@pytest.mark.slow
def test_a_network_of_timm_learns_and_loads_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    made = backbones.create("timm:resnet18.a1_in1k")
    assert (made.mean, made.std) == backbones.IMAGENET_STATISTICS
    assert made.image_size == 224
    one_step = QUICK.changed({"schedule.min_steps": 1, "generator.steps": 1, "remember.pool": 8, "refine.min_steps": 1})
    learner = Learner("timm:mobilenetv3_small_050", image_size=32, recipe=one_step, device="cpu")
    assert learner.network.mean.flatten().tolist() == pytest.approx(made.mean)
    x = torch.rand(4, 3, 32, 32)
    for names in (["a", "b"], ["c", "d"]):
        learner.learn_task([(x, torch.tensor([0, 0, 1, 1]))], names, progress=False)
    assert Learner.load(learner.save(tmp_path / "m"), "cpu").predict(x) == learner.predict(x)


def test_timms_refusals() -> None:
    pytest.importorskip("timm")
    assert "timm:resnet18" in list_backbones("timm:resnet1*")
    for name, weights, message in (
        ("timm:resnet18x", None, "no model 'resnet18x'; .*resnet18"),
        ("timm:vit_tiny_patch16_224", None, "0 BatchNorm layers"),
        ("timm:resnet18", "IMAGENET1K_V1", "weights in the name"),
    ):
        with pytest.raises(BackboneError, match=message):
            Learner(name, weights=weights, device="cpu")


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(BackboneError, match=r"pip install 'edge-dfcil\[timm\]'"):
        Learner("timm:resnet18", device="cpu")


def test_the_calls_are_public() -> None:
    assert {"list_backbones", "register_backbone"} <= set(edge_dfcil.__all__)
