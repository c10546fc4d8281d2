"""Parts of other methods in ABD do what they are there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import trials
from edge_dfcil import Callback, Learner
from edge_dfcil.demo import NAMES, Batches
from edge_dfcil.methods.abd import ABD
from tests.conftest import QUICK, quick_learner


@pytest.mark.slow
def test_guided_images_lie_nearer_to_the_means_of_their_classes(train: Batches) -> None:
    class Distance(Callback):
        def on_stage_end(self, stage: Any, report: Any) -> None:
            if stage.name == "learn" and self.learner.running is not None:
                task: Any = self.learner.running.work.task
                dream, means = task.dreams.sample(200), task.statistics["mean"].values[:, : task.student.own_features]
                with torch.no_grad():
                    features = task.teacher.features(dream.images)
                each = [(features[dream.labels == k].mean(0) - mean).norm() for k, mean in enumerate(means)]
                self.found = float(torch.stack(each).mean())

        def on_task_begin(self, learner: Any) -> None:
            self.learner = learner

    distances = []
    recipe = QUICK.changed({"refine.head": "lda", "schedule.adapt": "always", "generator.steps": 150, "generator.width": 32})
    first = quick_learner(recipe=recipe)
    first.learn_task(train.of(("0", "1", "2")), NAMES, progress=False)
    for method in (ABD(), trials.GuidedInversion()):
        learner, distance = Learner.of(first.model, method=method, recipe=recipe), Distance()
        learner.learn_task(train.of(("3", "4")), NAMES, callbacks=[distance], progress=False)
        distances.append(distance.found)
    assert distances[1] < distances[0]
