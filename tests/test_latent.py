"""The benchmark of latent inversion, with a small network in place of the pretrained one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from benchmarks import accuracy, latent
from benchmarks.__main__ import main
from benchmarks.datasets import Data
from edge_dfcil.model import backbones

STAND_IN = accuracy.Protocol("stand-in", 4, 2, "lite_stand_in:small", "frozen", image_size=32, batch_size=8, weights="imagenet")
SCRATCH = accuracy.Protocol(
    "scratch", 4, 2, "resnet8", "edge", image_size=32, batch_size=8, changes={"schedule.first_epochs": 1, "schedule.min_steps": 2}
)
FEW = latent.Budget(4, 4, 4)


class Block(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(8, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.relu(self.norm(self.convolution(maps)))


class StandIn(nn.Module):
    """EfficientNet-Lite's parts by name: a stem, four blocks of which the first two halve the resolution, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0, self._swish = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self._blocks = nn.ModuleList(Block(2 if i < 2 else 1) for i in range(4))
        self._conv_head, self._bn1 = nn.Conv2d(8, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)

    def forward(self, images: Tensor) -> Tensor:
        maps = self._swish(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            maps = block(maps)
        features: Tensor = self._swish(self._bn1(self._conv_head(maps))).mean((2, 3))
        return features


def _build(name: str, weights: str | None) -> backbones.Backbone:
    torch.manual_seed(0)
    network = StandIn()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    network(torch.randn(64, 3, 32, 32))  # sets BatchNorm's statistics
    return backbones.Backbone(network, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> Data:
    """Four classes of noisy images of one colour each; few steps."""
    backbones.register_backbone("lite_stand_in", _build, names=["small"], replace=True)
    monkeypatch.setattr(latent, "POOL", 32)
    random = np.random.default_rng(0)
    colours = random.integers(60, 200, (4, 1, 1, 3))
    arrays = {"class_names": np.array([*"abcd"])}
    for part, per_class in (("train", 10), ("test", 5)):
        y = arrays[f"{part}_y"] = np.repeat(np.arange(4), per_class)
        noise = random.integers(-50, 50, (len(y), 32, 32, 3))
        arrays[f"{part}_x"] = (colours[y] + noise).clip(0, 255).astype(np.uint8)
    return Data(arrays)


@pytest.mark.parametrize("protocol", [STAND_IN, SCRATCH], ids=["pretrained", "scratch"])
@pytest.mark.parametrize("variant", [latent.NONE, latent.ALIGNED, latent.GUIDED])
def test_blocks_that_do_not_move_leave_the_frozen_result(
    protocol: accuracy.Protocol, variant: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent, "LEARNING_RATE", 1e-12)
    found = latent.case(protocol, data, 0, FEW)
    frozen, moved = (latent.learn(found, each, 0, lambda line: None) for each in (latent.FROZEN, variant))
    assert moved["accuracy"] == frozen["accuracy"]
    assert moved["last_features"] == frozen["last_features"]


def test_a_variant_trains_a_copy_and_parameters_alone(data: Data) -> None:
    found = latent.case(STAND_IN, data, 0, FEW)
    before = {name: value.clone() for name, value in found.upper.state_dict().items()}
    parameters = {name for name, _ in found.upper.named_parameters()}
    kept = latent.learn(found, latent.GUIDED, 0, lambda line: None)
    assert all(torch.equal(before[name], value) for name, value in found.upper.state_dict().items()), "a variant changed the case"
    assert kept == latent.learn(found, latent.GUIDED, 0, lambda line: None) | {"seconds": kept["seconds"]}
    latent._train(found.upper, found.last, latent._batches(found.training[:1], [found.training[0].fixed]), 4, 2)
    after = found.upper.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == parameters  # BatchNorm's statistics stay


def test_guided_maps_are_nearer_to_the_stored_means_of_their_classes(data: Data) -> None:
    found = latent.case(STAND_IN, data, 0, FEW)
    new = found.training[0]
    statistics = latent.Statistics.of(new.features(found.upper), new.rows)
    moments = latent.Moments.of(statistics, found.upper(new.maps[:1]).shape[1], found.last)

    def distance(variant: str) -> float:
        torch.manual_seed(0)
        generator = latent.Generator(2, new.maps)
        latent._train_generator(generator, found.upper, statistics, moments, variant, 60)
        with torch.no_grad():
            features = [found.upper(generator(torch.full((64,), row))).mean(0) for row in range(2)]
        return float((torch.stack(features) - moments.means).square().sum())

    assert distance(latent.GUIDED) < distance(latent.ALIGNED) / 2


def test_a_stopped_run_goes_on_with_the_next_variant(data: Data, tmp_path: Path) -> None:
    variants = [latent.FROZEN, latent.GUIDED]
    first = latent.run(STAND_IN, data, 0, tmp_path, lambda line: None, variants[:1], FEW)
    assert list(first["variants"]) == variants[:1]
    said: list[str] = []
    found = latent.run(STAND_IN, data, 0, tmp_path, said.append, variants, FEW)
    assert found["variants"][latent.FROZEN] == first["variants"][latent.FROZEN] and list(found["variants"]) == variants
    assert said and all(latent.GUIDED in line for line in said)
    text = latent.describe(tmp_path)
    assert "| stand-in | guided:" in text and latent.JOINT not in text


@pytest.mark.parametrize(("option", "known"), [("--variants", "frozen"), ("--presets", "edge-5x4")])
def test_an_unknown_name_is_refused(option: str, known: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["latent", "--data", str(tmp_path), option, f"{known},sideways"])
    assert done.exit_code != 0 and option in done.output and "unknown: sideways" in done.output
