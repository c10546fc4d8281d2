"""A camera that learns a product while it answers: `predict` in one thread, `learn_task` in another.

    python demos/camera.py             about a minute on two cores

Handwritten digits represent products, and `frames` simulates a camera (`cv2.VideoCapture`). Five products are known. Then a
person shows a sixth one and names it. No frame waits for the learning. The previous model answers for about a second, until the
instant commit; the model of that commit answers while the network is adapted, and then the adapted model answers.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edge_dfcil import RECIPES, Callback, Commit, Learner, Recipe
from edge_dfcil.demo import NAMES, Batches, digits

KNOWN, PRODUCT = ("0", "1", "2", "3", "4"), "5"
SHOTS = 60  # pictures of the product that the person takes; they are discarded once it is learnt
RECIPE = RECIPES["frozen"].changed(
    {
        "augmentation.flip": False,
        "schedule.adapt": "always",
        "schedule.min_steps": 100,
        "generator.width": 32,
        "generator.steps": 100,
    }
)


def frames(test: Batches) -> Iterator[tuple[Tensor, str]]:
    """An endless stream of what the camera sees: images (1, 3, H, W), uint8, each with the product that it shows."""
    seen = test.of((*KNOWN, PRODUCT))
    for index in itertools.cycle(torch.randperm(len(seen.images)).tolist()):
        yield seen.images[index : index + 1], NAMES[int(seen.targets[index])]


@dataclass
class Answers(Callback):
    """How many frames the model of each commit answered, and how many of them correctly."""

    say: Callable[[str], None]
    model: str = "before"  # the model that answers
    frames: dict[str, int] = field(default_factory=lambda: {"before": 0})
    right: dict[str, list[bool]] = field(default_factory=dict)  # for the new product only, by model

    def on_commit(self, commit: Commit) -> None:
        self.say(f"frame {sum(self.frames.values())}: {commit}; the new model answers now")
        self.model = commit.kind

    def add(self, product: str, label: str | None) -> None:
        self.frames[self.model] = self.frames.get(self.model, 0) + 1
        if product == PRODUCT:
            self.right.setdefault(self.model, []).append(label == product)


def run(recipe: Recipe = RECIPE, pause: float = 0.05, after: int = 50, say: Callable[[str], None] = print) -> Answers:
    """Learns the product and answers a frame every `pause` seconds meanwhile, then `after` more. Returns the answers."""
    train, test = digits()
    learner = Learner("resnet8", image_size=16, recipe=recipe)
    learner.learn_task(train.of(KNOWN), NAMES)
    say(f"known products: {', '.join(learner.classes)}")

    answers, camera = Answers(say), frames(test)
    shots = train.of((PRODUCT,))
    pictures = Batches(shots.images[:SHOTS], shots.targets[:SHOTS])
    learning = threading.Thread(target=learner.learn_task, args=(pictures, NAMES), kwargs={"callbacks": [answers]})
    learning.start()
    left = after
    while left:
        image, product = next(camera)
        answers.add(product, learner.predict(image)[0].label)
        left -= not learning.is_alive()
        time.sleep(pause)
    learning.join()
    for model, count in answers.frames.items():
        right = answers.right.get(model, [])
        say(f"{model}: {count} frames were answered; of the new product {sum(right)} of {len(right)} were named correctly")
    return answers


if __name__ == "__main__":
    run()
