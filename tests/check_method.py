"""The one suite that every method passes, the benchmarks' yardsticks included (they are excused from the sample rule)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edge_dfcil import Learner
from edge_dfcil.demo import Batches
from edge_dfcil.methods import Method
from exporters import OnnxClassifier
from tests.conftest import NAMES, QUICK, weights

TASKS = (("0", "1", "2"), ("3",), ("4", "5"))  # unequal sizes, one class among them


def check_method(
    make: Callable[[], str | Method], train: Batches, test: Batches, folder: Path, keeps_no_sample: bool = True
) -> None:
    """`make()` gives the method, by name or as an instance.

    It learns a second task, grows with unequal task sizes, is equal to the bit under one seed on the CPU, leaves the model
    that answers meanwhile alone, keeps no sample, saves, loads and exports.
    """
    before = images_alive()
    learner = learn(make(), train)
    assert learner.tasks == TASKS
    assert learner.network.n_classes == 6
    again = weights(learn(make(), train))
    assert all(torch.equal(value, again[name]) for name, value in weights(learner).items()), "two runs differ under one seed"

    if keeps_no_sample:
        check_keeps_no_sample(learner, before)

    path = learner.save(folder / "model.safetensors")
    method = make()
    loaded = Learner.load(path, "cpu", method=method if isinstance(method, Method) else None)
    images = test.images[:16]
    assert loaded.predict(images, top_k=6) == learner.predict(images, top_k=6)
    learner.export(folder / "model.onnx")
    exported = OnnxClassifier(folder / "model.onnx").predict(images.numpy())
    assert [answer.label for answer in exported] == [answer.label for answer in learner.predict(images)]


def learn(method: str | Method, train: Batches) -> Learner:
    learner = Learner("resnet8", image_size=16, recipe=QUICK, method=method, device="cpu", seed=3)
    for names in TASKS:
        answering, before = learner.network, weights(learner)
        report = learner.learn_task(train.of(names), NAMES, progress=False)
        assert report.new_classes == names
        after = answering.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "the model that answered was changed"
    return learner


def images_alive() -> set[int]:
    """The float tensors in memory that have the shape of images."""
    gc.collect()
    alive = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    return {id(t) for t in alive if t.dim() == 4 and t.shape[1:] == (3, 16, 16) and t.is_floating_point()}


def check_keeps_no_sample(learner: Learner, before: set[int]) -> None:
    """No tensor hangs on to the learner but the model's own, and no image that the tasks made is alive at all."""
    own = {id(tensor) for tensor in learner.network.state_dict(keep_vars=True).values()}
    own |= {id(learner.network.mean), id(learner.network.std)}
    own |= {id(statistic.values) for statistic in learner.model.statistics.values()}
    seen: set[int] = set()
    queue: list[Any] = [learner, learner.method]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type) or not hasattr(thing, "__dict__"):
            continue
        seen.add(id(thing))
        for value in vars(thing).values():
            values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else [value]
            for item in values:
                assert not isinstance(item, torch.Tensor) or id(item) in own, f"{type(thing).__name__} keeps a tensor"
                queue.append(item)
    assert not images_alive() - before, "images of the tasks are still in memory"
