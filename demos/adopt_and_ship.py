"""Adopts an existing classifier, teaches it classes that it does not know, and exports it to ONNX in floats and in INT8.

    python demos/adopt_and_ship.py             about three minutes on two cores

Your classifier would come with its own weights. So that this runs anywhere, `trained` makes one here: torchvision's ResNet-18,
trained in plain PyTorch on the digits 0 to 7. After that no picture of these digits is used for learning: the learner remembers
them through images that it generates from the classifier.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from edge_dfcil import RECIPES, ExportError, Learner, Recipe
from edge_dfcil.demo import NAMES, Batches, digits
from exporters import OnnxClassifier

SIZE = 16
MEAN, STD = (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)  # of digits, approximately
OLD, NEW = NAMES[:8], NAMES[8:]
RECIPE = RECIPES["frozen"].changed(
    {
        "augmentation.flip": False,
        "augmentation.crop_padding": 2,
        "generator.width": 32,  # wide enough for 16 pixels
        "generator.steps": 80,
        "remember.pool": 512,
        "schedule.min_steps": 80,
        "refine.min_steps": 40,
    }
)


def normalized(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) as input of the classifier: float32, normalised, (N, 3, 16, 16)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (F.interpolate(images.float() / 255, (SIZE, SIZE), mode="bilinear") - mean) / std


def trained(batches: Batches, epochs: int) -> nn.Module:
    """A classifier of the digits 0 to 7, as any training script would make it."""
    classifier = resnet18(num_classes=len(OLD))
    optimizer = torch.optim.SGD(classifier.parameters(), 0.02, momentum=0.9)
    for _ in range(epochs):
        for images, targets in batches:
            optimizer.zero_grad()
            F.cross_entropy(classifier(normalized(images)), targets).backward()
            optimizer.step()
    return classifier.eval()


def run(out: Path, recipe: Recipe = RECIPE, epochs: int = 4, say: Callable[[str], None] = print) -> dict[str, float]:
    """Writes `digits.onnx` and `digits.int8.onnx` into a folder. Returns accuracies of all ten digits, in [0, 1]."""
    train, test = digits()
    torch.manual_seed(0)
    learner = Learner.from_classifier(
        trained(train.of(OLD), epochs), OLD, image_size=SIZE, mean=MEAN, std=STD, backbone="resnet18", recipe=recipe
    )
    say(f"adopted: {learner.evaluate(test.of(OLD), NAMES).accuracy:.1%} of the digits 0 to 7")

    say(f"{learner.learn_task(train.of(NEW), NAMES)}")
    found = {"learner": learner.evaluate(test, NAMES).accuracy}

    out.mkdir(parents=True, exist_ok=True)
    reports = [learner.export(out / "digits.onnx")]
    try:
        reports += [learner.export(out / "digits.int8.onnx", "int8", force=True)]
    except ExportError as error:  # its answers differ from the model's: only the float file is shipped
        say(f"no INT8 file: {error}")
    for report in reports:  # each file answers as in an app: with NumPy and ONNX Runtime, without torch
        answers = OnnxClassifier(report.path).predict([*test.images.numpy()])
        right = [answer.label == NAMES[target] for answer, target in zip(answers, test.targets.tolist(), strict=True)]
        found[report.format] = sum(right) / len(right)
        agreement = f", same answer as the model for {report.agreement['dreams']:.1%} of dreams" if report.agreement else ""
        say(f"{report.path}: {report.bytes / 1e6:.1f} MB{agreement}")
    for name, accuracy in found.items():
        say(f"{name}: {accuracy:.1%} of all ten digits")
    return found


if __name__ == "__main__":
    run(Path(sys.argv[1] if len(sys.argv) > 1 else "edge-dfcil-demo"))
