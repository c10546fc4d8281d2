"""Features of several scales: read from any backbone, kept in copies and files, exported, and better for new classes."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edge_dfcil import BackboneError, Learner, Model, Statistic
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.demo import Batches
from edge_dfcil.model import file
from edge_dfcil.model.backbones import build
from edge_dfcil.model.network import Network
from edge_dfcil.model.scales import GRID, MOST, ROOM, SMALLEST, find_layers
from exporters import OnnxClassifier
from tests.conftest import NAMES, quick_learner


@pytest.fixture(scope="module")
def scaled(train: Batches) -> Learner:
    learner = quick_learner(method="lda", multiscale=True)
    for names in (("0", "1"), ("2", "3")):
        learner.learn_task(train.of(names), NAMES, progress=False)
    return learner


def outputs_of(backbone: nn.Module, layers: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    handles = [
        backbone.get_submodule(name).register_forward_hook(lambda layer, _, output, name=name: found.update({name: output}))
        for name in layers
    ]
    with torch.no_grad():
        backbone(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("name", "size", "layers"),
    [
        ("resnet8", 16, ("stages.0.0", "stages.1.0", "stages.2.0")),
        ("resnet20", 32, tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(3))),
        ("resnet18", 64, ("layer2.1", "layer3.1")),
        ("mobilenet_v3_small", 96, ("features.0.2", *(f"features.{block}" for block in range(1, 9)))),
    ],
)
def test_the_last_block_at_each_resolution_is_taken_then_narrow_ones(name: str, size: int, layers: tuple[str, ...]) -> None:
    assert find_layers(build(name), size) == layers


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v3_small", "efficientnet_b0", "resnet50"])
def test_what_is_added_is_bounded(name: str) -> None:
    backbone = build(name).eval()
    maps = outputs_of(backbone, find_layers(backbone, 64), torch.randn(2, 3, 64, 64))
    own = backbone(torch.randn(2, 3, 64, 64)).shape[1]
    assert maps and sum((GRID**2 + 1) * output.shape[1] for output in maps.values()) <= max(MOST - own, ROOM)
    assert all(min(output.shape[2:]) >= SMALLEST for output in maps.values())


def test_features_are_the_backbones_and_the_pooled_maps() -> None:
    torch.manual_seed(0)
    backbone = build("resnet8").eval()
    layers = find_layers(backbone, 16)
    images = torch.randn(3, 3, 16, 16)
    maps = outputs_of(backbone, layers, images)
    network = Network(backbone, 64, 16, layers).eval()
    with torch.no_grad():
        expected = [backbone(images)]
        for name in layers:
            expected += [F.adaptive_avg_pool2d(maps[name], 2).flatten(1), maps[name].std((2, 3), correction=0)]
        assert torch.allclose(network.features(images), torch.cat(expected, 1), atol=1e-3)
        of_before = Network(backbone, 64, 16, layers, spread=False).features(images)
        assert torch.equal(of_before, torch.cat([expected[0], *expected[1::2]], 1)), "as in older files"
        assert torch.equal(Network(backbone, 64, 16).features(images), backbone(images))


def test_gradients_reach_the_layers_through_them() -> None:
    network = Network(build("resnet8"), 64, 16, ["stages.0.0"])
    network.features(torch.randn(4, 3, 16, 16))[:, 64:].sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in network.parameters())
    weights = dict(network.backbone.named_parameters())
    assert weights["stages.0.0.conv1.weight"].grad is not None and weights["stages.2.0.conv1.weight"].grad is not None
    assert not weights["stages.2.0.conv1.weight"].grad.any(), "it comes after the layer that is read"


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"no layer 'stages\.9'"):
        Network(build("resnet8"), 64, 16, ["stages.9"])


def test_threads_read_their_own_images(scaled: Learner, test: Batches) -> None:
    expected = [scaled.embed(test.images[i : i + 20]) for i in range(0, 80, 20)]
    found: dict[int, list[torch.Tensor]] = {}

    def ask(number: int) -> None:
        found[number] = [scaled.embed(test.images[20 * number : 20 * number + 20]) for _ in range(10)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, answers in found.items():
        assert all(torch.allclose(answer, expected[number], atol=1e-5) for answer in answers)


@pytest.mark.slow
def test_copies_files_and_exports_answer_alike(scaled: Learner, test: Batches, tmp_path: Path) -> None:
    images = test.images[:40]
    expected = scaled.probabilities(images)
    scaled.save(tmp_path / "model.safetensors")
    for model in (
        copy.deepcopy(scaled.model),
        pickle.loads(pickle.dumps(scaled.model)),
        Model.load(tmp_path / "model.safetensors", "cpu"),
    ):
        assert torch.equal(model.probabilities(images), expected)
        assert model.network.scales.layers == scaled.network.scales.layers
    scaled.export(tmp_path / "model.onnx", progress=False)
    answers = torch.from_numpy(OnnxClassifier(tmp_path / "model.onnx").probabilities(images.numpy()))
    assert torch.allclose(answers, expected, atol=1e-4)


def test_a_file_from_before_deviations_answers_as_it_did(scaled: Learner, test: Batches, tmp_path: Path) -> None:
    """Its settings do not say whether deviations are read, and its covariance is a full matrix."""
    network = Network(build("resnet8"), 64, 16, ["stages.1.0"], spread=False).grown(4).requires_grad_(False).eval()
    network.set_statistics((0.5,) * 3, (0.25,) * 3)
    covariance = torch.eye(network.all_features)
    kept = {"covariance": Statistic("shared_covariance", covariance, (100,))}
    model = replace(scaled.model, network=network, statistics=kept)
    tensors = network.state_dict() | {"statistics.covariance": covariance}
    settings = {name: value for name, value in model.settings().items() if name != "spread"}
    file.write(tmp_path / "model.safetensors", tensors, settings)
    found = Model.load(tmp_path / "model.safetensors", "cpu")
    assert torch.equal(found.probabilities(test.images[:20]), model.probabilities(test.images[:20]))
    assert torch.equal(found.statistics["covariance"].values, covariance)


def test_a_copy_reads_its_own_layers(scaled: Learner, test: Batches) -> None:
    """It does not read those of the network that it was copied from."""
    images = scaled.network.normalize(scaled.network.pixels(test.images[:8]))
    before = scaled.network.features(images)
    other = scaled.network.grown(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other.features(images), before)
    assert torch.equal(scaled.network.features(images), before)


@pytest.mark.slow
def test_new_classes_are_told_apart_better_by_a_frozen_backbone(train: Batches, test: Batches) -> None:
    accuracy = []
    for multiscale in (False, True):
        learner = quick_learner(method="lda", multiscale=multiscale)
        for names in (("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")):
            learner.learn_task(train.of(names), NAMES, progress=False)
        accuracy.append(learner.evaluate(test, NAMES).accuracy)
    assert accuracy[1] > accuracy[0] + 0.02 and accuracy[1] > 0.9


def test_an_adopted_classifier_answers_as_before_and_learns_on(train: Batches, test: Batches) -> None:
    torch.manual_seed(0)
    classifier = nn.Sequential(build("resnet8"), nn.Linear(64, 2))
    classifier(torch.randn(16, 3, 16, 16))  # so that its statistics are learnt
    plain, scaled = (
        Learner.from_classifier(
            classifier, ["0", "1"], image_size=16, method="lda", device="cpu", recipe=quick_learner().recipe, multiscale=scales
        )
        for scales in (False, True)
    )
    assert torch.allclose(plain.probabilities(test.images[:20]), scaled.probabilities(test.images[:20]), atol=1e-6)
    scaled.learn_task(train.of(("2", "3")), NAMES, progress=False)
    assert scaled.classes == ("0", "1", "2", "3")


@pytest.mark.slow
def test_it_is_pruned_and_distilled_to_a_network_of_one_scale(scaled: Learner, test: Batches) -> None:
    short = Distillation(rounds=2, dreams=64, steps=20, generator_steps=20)
    for smaller, _ in (
        prune(scaled, Pruning(ratio=0.2, repair=short), timing=False, progress=False),
        distill(scaled, "resnet8", settings=short, progress=False),
    ):
        assert not smaller.network.scales.layers and not smaller.model.statistics
        assert smaller.probabilities(test.images[:4]).shape == (4, 4)
    assert scaled.network.scales.layers


def test_probabilities_are_as_sure_as_they_are_right(scaled: Learner, test: Batches) -> None:
    images, targets = test.of(scaled.classes).images, test.of(scaled.classes).targets
    sure, answers = scaled.probabilities(images).max(1)
    right = torch.tensor([scaled.classes[answer] == NAMES[target] for answer, target in zip(answers, targets, strict=True)])
    assert abs(float(sure.mean()) - float(right.float().mean())) < 0.05
