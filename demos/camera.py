"""A camera that learns a product while it answers: `predict` in one thread, `learn_task` in another.

    python demos/camera.py             about a minute on two cores

Handwritten digits stand for products, and `frames` for a camera (`cv2.VideoCapture`). Five products are known. Then a person
shows a sixth one and names it. No frame waits for that: the model from before answers until, within a second or so, the instant
commit knows the product; that one answers while the network is adapted; and then the adapted one does.
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
SHOTS = 60  # pictures of the product that the person takes; they are gone when it is learnt
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
    """What the camera sees, without end: images (1, 3, H, W), uint8, each with the product that it shows."""
    seen = test.of((*KNOWN, PRODUCT))
    for index in itertools.cycle(torch.randperm(len(seen.images)).tolist()):
        yield seen.images[index : index + 1], NAMES[int(seen.targets[index])]


@dataclass
class Answers(Callback):
    """How many frames were answered, and how many rightly, by the model of each commit."""

    say: Callable[[str], None]
    model: str = "before"  # the model that answers
    frames: dict[str, int] = field(default_factory=lambda: {"before": 0})
    right: dict[str, list[bool]] = field(default_factory=dict)  # of the new product alone, by model

    def on_commit(self, commit: Commit) -> None:
        self.say(f"frame {sum(self.frames.values())}: {commit}; from here on that model answers")
        self.model = commit.kind

    def add(self, product: str, label: str | None) -> None:
        self.frames[self.model] = self.frames.get(self.model, 0) + 1
        if product == PRODUCT:
            self.right.setdefault(self.model, []).append(label == product)


def run(recipe: Recipe = RECIPE, pause: float = 0.05, after: int = 50, say: Callable[[str], None] = print) -> Answers:
    """Learns the product while frames are answered, every `pause` seconds, and `after` frames more. Returns the answers."""
    train, test = digits()
    learner = Learner("resnet8", image_size=16, recipe=recipe)
    learner.learn_task(train.of(KNOWN), NAMES)
    say(f"it knows {', '.join(learner.classes)}")

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
        say(f"{model}: {count} frames were answered; {sum(right)} of {len(right)} of the new product were named right")
    return answers


if __name__ == "__main__":
    run()
