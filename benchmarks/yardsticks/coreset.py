"""A coreset: some images of every class seen, stored as uint8 and learnt again with every task."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.yardsticks.base import Yardstick
from edge_dfcil.errors import SettingError
from edge_dfcil.methods.task import Task
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.augment import augment
from edge_dfcil.training.data import Batch, RealBatches
from edge_dfcil.training.stage import Stage, Terms

Order = Callable[[Tensor], Tensor]  # features (N, F) of a class to the order (N,) in which its images are worth keeping


class Images(RealBatches):
    """Stored images as a task's batches: shuffled, augmented, normalised, on the device.

    Parameters
    ----------
    images, outputs
        uint8 (N, 3, S, S) at the network's size, and (N,).
    """

    def __init__(self, images: Tensor, outputs: Tensor, network: Network, recipe: Recipe, batch_size: int) -> None:
        self.images, self.outputs, self.network, self.recipe, self.batch_size = images, outputs, network, recipe, batch_size
        self.left_out, self._in_order = 0, False

    @classmethod
    def of(cls, task: Task) -> Images:
        """The images that `prepare` has set as the task's batches."""
        assert isinstance(task.batches, cls)
        return task.batches

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch_size)
        return max(1, whole + (rest >= (1 if self._in_order else self._fewest)))

    def __iter__(self) -> Iterator[Batch]:
        if self._in_order:
            for index in torch.arange(len(self.images)).split(self.batch_size):
                yield self._batch(self.network.pixels(self.images[index]), index)
            return
        chunks = torch.randperm(len(self.images)).split(self.batch_size)
        for index in chunks:
            if len(index) >= self._fewest or len(chunks) == 1:
                yield self._batch(augment(self.network.pixels(self.images[index]), self.recipe), index)

    @property
    def largest(self) -> int:
        return self.batch_size

    def plain(self) -> Images:
        """All images in order, not augmented."""
        every = copy.copy(self)
        every._in_order = True
        return every

    def take(self, index: Tensor) -> Images:
        """Some of the images, by index."""
        return Images(self.images[index], self.outputs[index], self.network, self.recipe, self.batch_size)

    def features(self) -> Tensor:
        """Features (N, F) of the images with the current network, on the CPU."""
        with torch.no_grad():
            return torch.cat([self.network.features(batch.images).float().cpu() for batch in self.plain()])

    @property
    def _fewest(self) -> int:
        return self.batch_size if self.recipe.schedule.drop_incomplete else 2

    def _batch(self, pixels: Tensor, index: Tensor) -> Batch:
        return Batch(self.network.normalize(pixels), self.outputs[index].to(pixels.device))


class CoresetMethod(Yardstick):
    """Learns from new and stored images together, shuffled, and keeps some of each class afterwards.

    Parameters
    ----------
    size
        Images (2000 or "2000") or bytes ("6MB", of uint8 pixels), shared evenly by all classes seen.
    """

    def __init__(self, size: int | str = 2000) -> None:
        super().__init__()
        self.size = size
        capacity(size, 1)  # refuses an invalid size now rather than after a task

    def prepare(self, task: Task) -> Iterator[Stage]:
        new = read(task)
        task.batches = joined(self.stored(task, new), new) if "images" in self.kept else new
        return iter(())

    def loss(self, task: Task, batch: Batch) -> Terms:
        return self.first_loss(task, batch)

    def refine(self, task: Task) -> Iterator[Stage]:
        self.keep(Images.of(task))
        return iter(())

    def stored(self, task: Task, like: Images) -> Images:
        """What was kept, ready for this task."""
        return Images(self.kept["images"], self.kept["outputs"], task.student, task.recipe, like.batch_size)

    def keep(self, images: Images) -> None:
        """Keeps an even share of each class. Images kept before retain their order and are cut from the end."""
        quota = capacity(self.size, images.images[0].nbytes) // images.network.n_classes
        features, chosen = images.features(), []
        stored = set(self.kept["outputs"].tolist()) if "outputs" in self.kept else set()
        for output in images.outputs.unique().tolist():
            index = torch.nonzero(images.outputs == output).flatten()
            if output not in stored:
                index = index[self.order(features[index])]
            chosen.append(index[:quota])
        kept = images.take(torch.cat(chosen))
        self.kept["images"], self.kept["outputs"] = kept.images.clone(), kept.outputs.clone()

    def order(self, features: Tensor) -> Tensor:
        """The order in which a class's images are worth keeping, the best first; random unless overridden."""
        return torch.randperm(len(features))


def read(task: Task) -> Images:
    """A task's own images, as they came."""
    images, outputs, largest = [], [], 0
    for batch in task.batches.plain():
        images.append(task.student.denormalize(batch.images).cpu())
        outputs.append(batch.targets.cpu())
        largest = max(largest, len(batch))
    return Images(torch.cat(images), torch.cat(outputs), task.student, task.recipe, largest)


def joined(one: Images, other: Images) -> Images:
    images, outputs = torch.cat([one.images, other.images]), torch.cat([one.outputs, other.outputs])
    return Images(images, outputs, other.network, other.recipe, other.batch_size)


def herding(features: Tensor) -> Tensor:
    """Greedy: each next image brings the mean of those kept nearest to the class mean (iCaRL, algorithm 4)."""
    features = torch.nn.functional.normalize(features)
    mean, total = features.mean(0), torch.zeros(features.shape[1])
    order: list[int] = []
    left = torch.ones(len(features), dtype=torch.bool)
    for count in range(1, len(features) + 1):
        distance = (mean - (total + features) / count).norm(dim=1)
        best = int(distance.where(left, torch.inf).argmin())
        order.append(best)
        left[best], total = False, total + features[best]
    return torch.tensor(order)


def nearest_to_mean(features: Tensor) -> Tensor:
    """Nearest to the class mean first (E2E)."""
    return (features - features.mean(0)).norm(dim=1).argsort()


def capacity(size: int | str, bytes_an_image: int) -> int:
    """How many images a size allows. Raises `SettingError` for an invalid size."""
    found = re.fullmatch(r"(\d+)(kB|MB|GB|B)?", str(size).strip())
    if not found:
        raise SettingError(f"{size!r} is no coreset size; pass images such as 400, or bytes such as '80kB' or '6MB'")
    number, unit = int(found[1]), found[2]
    return number if unit is None else number * {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[unit] // bytes_an_image
