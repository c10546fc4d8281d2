"""Writes the golden files of a file schema: `python -m tests.golden.make schema2 FOLDER`.

Each folder is made once, by the version that introduces its schema, and never changed. `schema1` was made at commit 9bb9d52,
before any code of that version moved. `schema2` has what schema 1 lacked: features of several scales, class statistics, a class
that is known only by its row of the head, thresholds and a temperature, and an ONNX file that takes images of any size.
`tests/test_golden.py` loads every folder and compares the answers. Each folder contains model files, ONNX files, and
`answers.npz`: the images, and the probabilities that each file gave.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_dfcil import RECIPES, Learner
from edge_dfcil.compression import Pruning, prune
from edge_dfcil.demo import digits
from exporters import OnnxClassifier

NAMES = [str(digit) for digit in range(10)]
RECIPE = RECIPES["edge"].changed(
    {
        "schedule.epochs": 2,
        "schedule.first_epochs": 2,
        "schedule.min_steps": 60,
        "augmentation.brightness": 0.0,
        "augmentation.contrast": 0.0,
        "augmentation.flip": False,
        "augmentation.crop_padding": 2,
        "generator.latent": 16,
        "generator.width": 16,
        "generator.steps": 20,
        "generator.batch": 32,
        "remember.pool": 96,
        "refine.epochs": 1,
        "refine.min_steps": 10,
    }
)


def own_classifier() -> nn.Sequential:
    """A plain module, as an app might have it: three blocks and a linear layer."""
    blocks: list[nn.Module] = []
    for channels_in, channels in ((3, 8), (8, 16), (16, 16)):
        blocks += [nn.Conv2d(channels_in, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


def learners() -> dict[str, Learner]:
    train, _ = digits()
    found = {}
    cifar = found["cifar"] = Learner("resnet8", image_size=16, recipe=RECIPE, device="cpu")
    for names in (("0", "1", "2"), ("3", "4")):
        cifar.learn_task(train.of(names), NAMES, progress=False)
    mirrored = RECIPE.changed({"augmentation.flip": True, "augmentation.mirrored_answers": True})
    found["mirrored"] = Learner("resnet8", image_size=16, recipe=mirrored, method="finetune", device="cpu")
    found["mirrored"].learn_task(train.of(("0", "8")), NAMES, progress=False)
    found["torchvision"] = Learner("shufflenet_v2_x0_5", image_size=32, recipe=RECIPE, method="lwf", device="cpu")
    found["torchvision"].learn_task(train.of(("0", "1")), NAMES, progress=False)
    torch.manual_seed(0)
    module = own_classifier().train()
    for _ in range(20):
        module(torch.rand(32, 3, 16, 16))  # running statistics
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    adopted = Learner.from_classifier(module, ["a", "b", "c"], image_size=16, recipe=RECIPE, device="cpu", **statistics)
    adopted.learn_task(train.of(("5",)), NAMES, progress=False)
    found["adopted"] = adopted
    found["pruned"], _ = prune(cifar, Pruning(ratio=0.2, repair=None, dreams=64, rounds=5), progress=False)
    return found


def closed_form() -> dict[str, Learner]:
    train, _ = digits()
    settings = {"schedule.adapt": "first", "refine.head": "lda", "refine.calibrate": True}
    found = Learner("resnet8", image_size=16, recipe=RECIPE.changed(settings), device="cpu")
    found.learn_task(train.of(("0", "1", "2")), NAMES, progress=False)
    images, targets = train.of(("3", "4")).images, train.of(("3", "4")).targets
    keep = torch.cat([torch.nonzero(targets == 3).flatten()[:60], torch.nonzero(targets == 4).flatten()[:5]])
    found.learn_task([(images[keep], targets[keep])], NAMES, progress=False)
    return {"closed_form": found}


def main(schema: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True)
    images = digits()[1].images[:8]
    answers = {"images": images.numpy()}
    found = {"schema1": learners, "schema2": closed_form}[schema]()
    for name, learner in found.items():
        learner.save(folder / f"{name}.safetensors")
        answers[name] = np.array([[dict(p.top)[c] for c in learner.classes] for p in learner.predict(images, 10)])
    if schema == "schema1":
        found["cifar"].export(folder / "cifar.onnx")
        found["cifar"].export(
            folder / "cifar-int8.onnx", "int8", force=True, calibration=[*digits()[0].of(("0", "1", "2", "3", "4"))]
        )
    else:
        found["closed_form"].export(folder / "closed_form-any.onnx", input="any")
    for path in sorted(folder.glob("*.onnx")):
        answers[path.name] = OnnxClassifier(path).probabilities(images.numpy())
    np.savez_compressed(folder / "answers.npz", allow_pickle=False, **answers)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
