"""A camera that keeps answering while it learns: `learn_task` in one thread, `predict` in another.

    python demos/camera.py             about a minute on a laptop

The answers come from the committed model until the new one is whole; then they come from that one.
"""

from __future__ import annotations

import threading
import time

from edge_dfcil import RECIPES, Learner
from edge_dfcil.demo import NAMES, digits


def main() -> None:
    train, test = digits()
    learner = Learner(
        "resnet8",
        image_size=16,
        recipe=RECIPES["frozen"].changed({"augmentation.flip": False, "generator.steps": 100, "schedule.min_steps": 150}),
    )
    learner.learn_task(train.of(("0", "1")), NAMES)
    learning = threading.Thread(target=learner.learn_task, args=(train.of(("2", "3")), NAMES))
    learning.start()
    frames, known = 0, 0
    while learning.is_alive() or len(learner.classes) > known:
        if len(learner.classes) > known:
            known = len(learner.classes)
            print(f"frame {frames}: it knows {', '.join(learner.classes)}")
        frame = test.images[frames % len(test.images)][None]
        learner.predict(frame)
        frames += 1
        time.sleep(0.05)
    learning.join()
    print(f"{frames} frames were answered, {len(learner.classes)} classes are known now")


if __name__ == "__main__":
    main()
