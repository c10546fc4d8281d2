"""A check for any `Method`, including those of other packages: `check_method(MyMethod)`.

It needs no data: images are noise with a bright bar, whose position and colour depend on the class.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_dfcil.learner import Learner
from edge_dfcil.methods import Method
from edge_dfcil.recipe import RECIPES
from exporters import OnnxClassifier

SIDE = 16
TASKS = ((0, 1, 2), (3,), (4, 5))  # unequal sizes, including a single class
# About a second per task: the checks do not depend on accuracy.
RECIPE = RECIPES["edge"].changed(
    {
        "schedule.epochs": 1,
        "schedule.first_epochs": 1,
        "schedule.min_steps": 6,
        "generator.latent": 16,
        "generator.width": 16,
        "generator.steps": 6,
        "generator.batch": 32,
        "remember.pool": 64,
        "refine.epochs": 1,
        "refine.min_steps": 3,
    }
)

Batches = list[tuple[Tensor, Tensor]]


def images_of(classes: Sequence[int], each: int = 24) -> Batches:
    """Batches of uint8 images (32, 3, 16, 16) and targets, `each` images of every class."""
    draw = torch.Generator().manual_seed(sum(classes))
    targets = torch.tensor(classes).repeat_interleave(each)[torch.randperm(len(classes) * each, generator=draw)]
    images = torch.randint(0, 80, (len(targets), 3, SIDE, SIDE), generator=draw)
    for image, target in zip(images, targets.tolist(), strict=True):
        image[target % 3, 3 * target % (SIDE - 3) :][:4] += 150
    return list(zip(images.to(torch.uint8).split(32), targets.split(32), strict=True))


def check_method(make: Callable[[], str | Method], *, keeps_no_sample: bool = True, exports: bool = True) -> None:
    """Checks a method, which `make()` returns as a name or an instance. Raises an `AssertionError` that says what failed.

    The method must learn several tasks of unequal sizes, and the network must grow with them; two runs with one seed must be
    bit-identical on the CPU; the model that answers during a task must not change; no image, feature or generated image may
    remain in memory; what the method keeps must be saved and loaded; and the exported file must answer as the model does.

    Parameters
    ----------
    keeps_no_sample
        False for a method that stores samples on purpose.
    exports
        False skips the export, which takes most of the time.
    """
    before = images_alive()
    learner = _learn(make())
    assert learner.network.n_classes == sum(map(len, TASKS)), "the network has not grown to all classes"
    again = _weights(_learn(make()))
    assert all(torch.equal(value, again[name]) for name, value in _weights(learner).items()), "two runs with one seed differ"
    if keeps_no_sample:
        check_keeps_no_sample(learner, before)
    images, method = images_of((0, 3, 5), 4)[0][0], make()
    with tempfile.TemporaryDirectory() as folder:
        path = learner.save(Path(folder) / "model")
        loaded = Learner.load(path, "cpu", method=method if isinstance(method, Method) else None)
        assert loaded.predict(images, 6) == learner.predict(images, 6), "a saved and loaded model gives other answers"
        assert loaded.model.digest() == learner.model.digest(), "a saved and loaded model keeps something else"
        if exports:
            learner.export(Path(folder) / "model.onnx", progress=False)
            exported = OnnxClassifier(Path(folder) / "model.onnx").predict(images.numpy())
            ours = [answer.label for answer in learner.predict(images)]
            assert [answer.label for answer in exported] == ours, "the exported file gives other answers"


def _learn(method: str | Method) -> Learner:
    learner = Learner("resnet8", image_size=SIDE, recipe=RECIPE, method=method, device="cpu", seed=3)
    for task in TASKS:
        answering, before, names = learner.network, _weights(learner), {target: f"class {target}" for target in task}
        report = learner.learn_task(images_of(task), names, progress=False)
        assert report.new_classes == tuple(names.values()), "the report names other classes"
        after = answering.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "the model that answered was changed"
    return learner


def _weights(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.network.state_dict().items()}


def images_alive() -> set[int]:
    """The float tensors in memory that have the shape of images."""
    gc.collect()
    alive = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
    return {id(t) for t in alive if t.dim() == 4 and t.shape[1:] == (3, SIDE, SIDE) and t.is_floating_point()}


def check_keeps_no_sample(learner: Learner, before: set[int]) -> None:
    """The learner refers to no tensor but the model's own, and no image that the tasks made is in memory."""
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
