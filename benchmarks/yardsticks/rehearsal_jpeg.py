"""Naive rehearsal that keeps JPEG files: what replay takes when its size is reduced."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from benchmarks.yardsticks.base import Yardstick
from benchmarks.yardsticks.coreset import Images, read
from edge_dfcil.errors import SettingError
from edge_dfcil.methods.task import Task
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, Terms

QUALITY = 90


class Files:
    """JPEG files, indexed like the tensor (N, 3, S, S) that they decode to."""

    def __init__(self, files: list[Tensor]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.stack([decode_jpeg(self.files[i]) for i in index.tolist()])


class RehearsalJpeg(Yardstick):
    """`size` images, shared evenly by all classes seen, chosen at random."""

    name = "rehearsal_jpeg"

    def __init__(self, size: int | str = 2000) -> None:
        super().__init__()
        if not str(size).isdecimal():
            raise SettingError(f"{size!r} is no number of JPEG files; pass one such as 400")
        self.size = int(size)

    def prepare(self, task: Task) -> Iterator[Stage]:
        new = read(task)
        files, outputs = [encode_jpeg(image, QUALITY) for image in new.images], new.outputs
        if self.kept:
            files += list(self.kept["bytes"].split(self.kept["sizes"].tolist()))
            outputs = torch.cat([outputs, self.kept["outputs"]])
        stored: Tensor = Files(files)  # type: ignore[assignment]  # batches only index it
        task.batches = Images(stored, outputs, task.student, task.recipe, new.batch_size)
        return iter(())

    def loss(self, task: Task, batch: Batch) -> Terms:
        return self.first_loss(task, batch)

    def refine(self, task: Task) -> Iterator[Stage]:
        images, quota = Images.of(task), self.size // task.student.n_classes
        chosen = []
        for output in images.outputs.unique().tolist():
            index = torch.nonzero(images.outputs == output).flatten()
            chosen += index[torch.randperm(len(index))[:quota]].tolist()
        assert isinstance(images.images, Files)
        files = [images.images.files[i] for i in chosen]
        sizes = torch.tensor([len(file) for file in files])
        self.kept = {"bytes": torch.cat(files), "sizes": sizes, "outputs": images.outputs[torch.tensor(chosen)]}
        return iter(())
