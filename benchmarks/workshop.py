"""Other uses of generated images: smaller models, INT8, and adopting a classifier that was trained elsewhere.

One teacher of 20 CIFAR-100 classes serves all of them. Every row of the tables is a separate step, and finished steps are kept
in the result file, so that the command can be stopped and run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import datasets, files, machine
from benchmarks.workshop_tables import PAGE, SEED
from edge_dfcil import Learner
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.compression.distillation import OBJECTIVE, REPAIR
from edge_dfcil.compression.latency import LatencyTable
from edge_dfcil.devices import find_device
from edge_dfcil.errors import BackboneError, ExportError
from edge_dfcil.model.backbones import build
from edge_dfcil.recipe import RECIPES, Recipe
from edge_dfcil.training.augment import augment

CALIBRATION = 500  # real images that INT8 is calibrated on for comparison
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # CIFAR-100's, for the classifier trained elsewhere

RECIPE = RECIPES["edge"].changed({"schedule.first_epochs": 24, "schedule.learning_rate": 0.05, "pixels.steps": 200})
LESSON = Distillation(rounds=4, dreams=1024, generator_steps=100, steps=200)  # for a student that begins with shared layers
PIXELS = Distillation(rounds=4, dreams=256, steps=200, quality="best")  # the same with DeepInversion's own dreams, but fewer
SEEDS = (0, 1, 2)

Step = Callable[[], dict[str, Any]]  # runs, and returns its findings


@dataclass(frozen=True)
class Setting:
    """The size of every step.

    Attributes
    ----------
    file, page
        Names of the result file and of the page of dreams.
    students
        Backbones, with their lessons and seeds; the lesson from noise, the baseline, is given with the first seed only.
    seed, prune_seeds
        The seed of the teacher and the order of classes, and the seeds of the prunings.
    latencies
        Shares of the latency to which the teacher is also pruned, with the latency term and without.
    """

    file: str = "workshop.json"
    page: str = PAGE
    backbone: str = "resnet32"
    elsewhere: str = "resnet20"  # trained outside the SDK
    students: tuple[tuple[str, Distillation, tuple[int, ...]], ...] = (
        ("resnet20", LESSON, (0,)),
        ("resnet20", PIXELS, (0,)),
        ("resnet20", Distillation(rounds=6, inherit=False), (0,)),
        ("mobilenet_v3_small", Distillation(), SEEDS),
    )
    classes: int = 20
    new_classes: int = 10
    images: int = 0  # training images in total; 0 takes all
    epochs: int = 16
    batch_size: int = 32
    learning_rate: float = 0.05
    recipe: Recipe = RECIPE
    repair: Distillation = REPAIR
    prune_ratio: float = 0.2
    latencies: tuple[float, ...] = (0.75,)
    group: int = 8
    seed: int = 0
    prune_seeds: tuple[int, ...] = SEEDS


FULL = Setting()
# For an accelerator: students from scratch, taught for longer, with several seeds.
LONG = Distillation(rounds=16, dreams=1024, generator_steps=60, steps=250, batch=128, learning_rate=0.1, inherit=False)
BY_PIXEL = replace(LONG, rounds=6, dreams=640, quality="best")  # 1,000 steps per round
LARGE = replace(
    FULL,
    file="workshop-large.json",
    page="workshop-large-dreams.png",
    students=(("resnet20", LONG, SEEDS), ("resnet20", BY_PIXEL, SEEDS), ("mobilenet_v3_small", replace(LONG, rounds=10), SEEDS)),
    # The competition's weight was chosen in shorter lessons with other seeds, which the result file names.
    recipe=RECIPE.changed(
        {"generator.latent": 128, "generator.batch": 128, "generator.steps": 400, "inversion.competition": 3.0}
    ),
)
QUICK = Setting(
    backbone="resnet8",
    elsewhere="resnet8",
    students=tuple(
        ("resnet8", Distillation(rounds=2, dreams=32, generator_steps=2, steps=2, batch=16, quality=quality), (0,))
        for quality in ("fast", "best")
    ),
    classes=3,
    new_classes=2,
    images=96,
    epochs=1,
    recipe=RECIPES["edge"].changed({
        "schedule.first_epochs": 1, "schedule.epochs": 1, "schedule.min_steps": 4, "generator.steps": 4, "generator.latent": 8,
        "generator.width": 8, "remember.pool": 32, "pixels.steps": 2, "pixels.batch": 16, "refine.epochs": 1,
        "refine.min_steps": 2,
    }),
    repair=Distillation(rounds=1, dreams=32, generator_steps=2, steps=2, batch=16),
    latencies=(),
    group=4,
    prune_seeds=(0,),
)  # fmt: skip
SETTINGS = {"full": FULL, "large": LARGE, "quick": QUICK}
PARTS = ("teacher", "dreams", "distill", "prune", "int8", "adopt")


class Workshop:
    """The steps, each a method that returns what it found."""

    def __init__(
        self, data: datasets.Data, out: Path, models: Path, setting: Setting, device: str = "cpu", table: Path | None = None
    ) -> None:
        self._data, self._models, self._setting, self._device = data, models, setting, find_device(device)
        self._table = LatencyTable(table)
        self._order = datasets.class_order(len(data.names), setting.seed)
        self._path = out / setting.file
        self._found = files.read(self._path) or {}

    def run(self, parts: list[str], say: Callable[[str], None]) -> dict[str, Any]:
        for name, step in self._steps(parts):
            if name not in self._found or (name == "teacher" and not self._teacher_file.exists()):
                say(name)
                begin = time.perf_counter()
                made = machine.provenance(self._device)
                found = step()
                self._found[name] = {**found, "minutes": (time.perf_counter() - begin) / 60, "commit": made["commit"]}
                self._found |= made
                files.write(self._path, self._found)
        return self._found

    def _steps(self, parts: list[str]) -> list[tuple[str, Step]]:
        s = self._setting
        steps: list[tuple[str, str, Step]] = [("teacher", "teacher", self._train)]
        steps += [("teacher", "mirrored answers", self._mirrored), ("dreams", "dreams", self._page)]
        steps += [("distill", f"distill {name}", step) for name, step in self._students()]
        for seed in s.prune_seeds:
            steps += [("prune", f"prune {name}", step) for name, step in self._prunings(seed)]
        steps += [
            ("int8", "int8 calibrated on dreams", lambda: self._int8(real=False)),
            ("int8", "int8 calibrated on real images", lambda: self._int8(real=True)),
            ("adopt", "adopted", self._elsewhere),
        ]
        pixels = {"remember.dreams": "pixels", "remember.pool": s.recipe.remember.pool // 2}
        methods: dict[str, dict[str, Any]] = {
            "abd": {},
            "abd augment_dreams": {"inversion.augment": True},
            "abd by the pixel": pixels,
            "deep_inversion": pixels,
            "lwf_mc": {},
        }
        for name, changes in methods.items():
            steps.append(("adopt", f"adopt {name}", self._adopt(name.partition(" ")[0], changes)))
        steps.append(("adopt", "adopt upper bound", self._everything))
        return [(name, step) for part, name, step in steps if part in parts]

    def _students(self) -> Iterator[tuple[str, Step]]:
        for student, lesson, seeds in self._setting.students:
            pixels, begins = lesson.quality == "best", "" if lesson.inherit else " from nothing"
            for source in ("adaptive", "dreams") if pixels else ("adaptive", "dreams", "noise"):
                made = " by the pixel" if pixels else ""
                for seed in seeds if source != "noise" else seeds[:1]:
                    name = f"{student} {source}{made}{begins}{_seed_said(seed, seeds)}"
                    yield name, self._distill(name, student, replace(lesson, source=source), seed)

    def _prunings(self, seed: int) -> Iterator[tuple[str, Step]]:
        """By importance alone and with the latency term: to the same number of filters, and to the same latency."""
        said = _seed_said(seed, self._setting.prune_seeds)
        for eta, by in ((0.0, "by importance"), (Pruning.eta, "by importance and latency")):
            yield f"{by}{said}", self._prune(eta, seed)
            for share in self._setting.latencies:
                yield f"{by}, to {100 * share:.0f} % of the latency{said}", self._prune(eta, seed, share)

    # Data and models

    def _seen(self, which: str, begin: int, end: int) -> datasets.Part:
        return self._data.part(which, self._order[begin:end], self._setting.batch_size if which == "train" else 500)

    def _train_part(self, begin: int, end: int) -> datasets.Part:
        part, n = self._seen("train", begin, end), self._setting.images
        if not n:
            return part
        few = torch.randperm(len(part.images), generator=torch.Generator().manual_seed(0))[:n]
        return replace(part, images=part.images[few], targets=part.targets[few])

    @property
    def _test(self) -> list[Any]:
        return [*self._seen("test", 0, self._setting.classes)]

    @property
    def _teacher_file(self) -> Path:
        return self._models / "teacher.safetensors"

    @property
    def _teacher(self) -> Learner:
        teacher = Learner.load(self._teacher_file, self._device)
        teacher.recipe = self._setting.recipe  # another setting may have trained it
        return teacher

    def _train(self) -> dict[str, Any]:
        s = self._setting
        learner = Learner(s.backbone, recipe=s.recipe, device=self._device, seed=s.seed)
        learner.learn_task(self._train_part(0, s.classes), self._data.names)
        learner.save(self._teacher_file)
        return {"accuracy": learner.evaluate(self._test, self._data.names).accuracy}

    def _mirrored(self) -> dict[str, Any]:
        """The teacher with test-time augmentation: the mean over an image and its mirror image."""
        teacher = self._teacher
        teacher.recipe = teacher.recipe.changed({"augmentation.mirrored_answers": True})
        return {"accuracy": teacher.evaluate(self._test, self._data.names).accuracy}

    def _page(self) -> dict[str, Any]:
        """A page of pictures: real ones, a generator's dreams, and pixel dreams, a row for each class."""
        from matplotlib.figure import Figure

        teacher, rows, columns = self._teacher, min(10, self._setting.classes), 5
        names = teacher.classes[:rows]
        train = self._seen("train", 0, self._setting.classes)
        sets = {"real, not kept": (train.images, [self._data.names[target] for target in train.targets.tolist()])}
        share = {}
        for title, quality in (("fast, by a generator", "fast"), ("best, by the pixel", "best")):
            images = teacher.dream(8 * len(teacher.classes), quality=quality)  # type: ignore[arg-type]
            sets[title] = images, [prediction.label for prediction in teacher.predict(images)]
            share[quality] = len(set(sets[title][1])) / len(teacher.classes)
        figure = Figure(figsize=(11, 0.75 * rows + 0.5), layout="constrained")
        sides: Any = figure.subfigures(1, 3, wspace=0.05)
        for side, (title, (images, labels)) in zip(sides, sets.items(), strict=True):
            side.suptitle(title)
            grid = side.subplots(rows, columns, squeeze=False)
            for name, row in zip(names, grid, strict=True):
                mine = [index for index, label in enumerate(labels) if label == name][:columns]
                for axes in row:
                    axes.axis("off")
                for axes, index in zip(row, mine, strict=False):
                    axes.imshow(images[index].permute(1, 2, 0).numpy())
        figure.savefig(self._path.with_name(self._setting.page), dpi=100)
        return {"classes_dreamt": share}

    # Compression

    def _distill(self, name: str, student: str, lesson: Distillation, seed: int) -> Step:
        def step() -> dict[str, Any]:
            teacher = self._teacher
            teacher.seed = seed
            found, report = distill(teacher, student, settings=lesson, evaluation=self._test, classes=self._data.names)
            found.save(self._models / f"{name.replace(',', '').replace(' ', '-')}.safetensors")
            return {**report.to_dict(), "settings": vars(lesson), "objective": OBJECTIVE, "stages": None}

        return step

    def _prune(self, eta: float, seed: int, latency: float | None = None) -> Step:
        """Prunes to the setting's ratio, or to a share of the latency."""

        def step() -> dict[str, Any]:
            s, teacher = self._setting, self._teacher
            teacher.seed = seed
            ratio = s.prune_ratio if latency is None else None
            settings = Pruning(ratio=ratio, latency=latency, group=s.group, eta=eta, repair=s.repair)
            try:
                found, report = prune(teacher, settings, table=self._table, evaluation=self._test, classes=self._data.names)
            except BackboneError as error:
                return {"refused": str(error)}
            found.save(self._models / f"pruned-{eta}{f'-{latency:.2f}' if latency else ''}-{seed}.safetensors")
            return {**report.to_dict(), "eta": eta, "objective": OBJECTIVE, "stages": None}

        return step

    def _int8(self, real: bool) -> dict[str, Any]:
        calibration = None
        if real:
            part = self._train_part(0, self._setting.classes)
            calibration = [(part.images[:CALIBRATION], part.targets[:CALIBRATION])]
        path = self._models / f"int8-{'real' if real else 'dreams'}.onnx"
        try:
            sets: dict[str, Any] = {"calibration": calibration, "evaluation": self._test, "classes": self._data.names}
            report = self._teacher.export(path, "int8", force=True, **sets)
        except ExportError as error:
            return {"refused": str(error)}
        return {**report.to_dict(), "path": path.name}

    # A classifier trained elsewhere

    def _elsewhere(self) -> dict[str, Any]:
        """A plain PyTorch training, without the SDK, that saves a state dict."""
        accuracy = self._plain(self._setting.classes, self._models / "elsewhere.safetensors")
        return {"accuracy": accuracy}

    def _everything(self) -> dict[str, Any]:
        """The same on old and new classes together: the upper bound."""
        s = self._setting
        return {"combined": self._plain(s.classes + s.new_classes, None)}

    def _plain(self, classes: int, path: Path | None) -> float:
        from safetensors.torch import save_file

        s = self._setting
        torch.manual_seed(s.seed)
        module, device = self._module(classes), self._device
        part = self._train_part(0, classes)
        output = {target: number for number, target in enumerate(self._order[:classes])}
        steps = s.epochs * -(-len(part.images) // s.batch_size)
        optimizer = torch.optim.SGD(module.parameters(), s.learning_rate, 0.9, weight_decay=2e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.learning_rate, total_steps=steps, cycle_momentum=False)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        for _ in range(s.epochs):
            for images, targets in part:
                pixels = augment(images.to(device).float() / 255, s.recipe)
                seen = ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)
                wanted = torch.tensor([output[t] for t in targets.tolist()], device=device)
                loss = F.cross_entropy(module(seen), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        module.eval()
        if path is not None:
            save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)
        right = total = 0
        with torch.no_grad():
            for images, targets in self._seen("test", 0, classes):
                found = module((images.to(device).float() / 255 - mean) / std).argmax(1).tolist()
                right += sum(one == output[t] for one, t in zip(found, targets.tolist(), strict=True))
                total += len(found)
        return right / total

    def _module(self, classes: int) -> nn.Module:
        backbone = build(self._setting.elsewhere)
        return nn.Sequential(backbone, nn.Linear(64, classes)).to(memory_format=torch.channels_last).to(self._device)

    def _adopt(self, method: str, changes: dict[str, Any]) -> Step:
        def step() -> dict[str, Any]:
            from safetensors.torch import load_file

            s = self._setting
            module = self._module(s.classes)
            module.load_state_dict(load_file(self._models / "elsewhere.safetensors"))
            names = [self._data.names[number] for number in self._order[: s.classes]]
            learner = Learner.from_classifier(
                module.eval(),
                names,
                image_size=32,
                mean=MEAN,
                std=STD,
                method=method,
                recipe=s.recipe.changed(changes),
                device=self._device,
                seed=s.seed,
            )
            learner.learn_task(self._train_part(s.classes, s.classes + s.new_classes), self._data.names)
            found = learner.evaluate([*self._seen("test", 0, s.classes + s.new_classes)], self._data.names)
            old, new = found.per_task
            return {"old": old, "new": new, "combined": found.accuracy}

        return step


def _seed_said(seed: int, seeds: tuple[int, ...]) -> str:
    """The end of a step's name, if it is run with several seeds."""
    return f"{SEED}{seed}" if len(seeds) > 1 else ""
