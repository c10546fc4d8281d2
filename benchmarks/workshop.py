"""What dreams are good for besides remembering: smaller models, INT8, and going on from somebody else's classifier.

One teacher of 20 CIFAR-100 classes serves all of it. Every line of the tables is a step of its own, and what is done is kept
in the result file, so that the command can be stopped and run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import datasets, machine
from benchmarks.tables import percent, table
from edge_dfcil import RECIPES, Learner
from edge_dfcil.augment import augment
from edge_dfcil.backbones import build
from edge_dfcil.compression import Distillation, Pruning, distill, prune
from edge_dfcil.errors import BackboneError, ExportError
from edge_dfcil.recipe import Recipe

FILE = "workshop.json"
PAGE = "workshop-dreams.png"
CALIBRATION = 500  # real images that INT8 is calibrated on for comparison
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # CIFAR-100's, for the classifier trained elsewhere


RECIPE = replace(RECIPES["edge"], first_epochs=24, learning_rate=0.05, pixel_steps=200)
LESSON = Distillation(rounds=4, dreams=1024, generator_steps=100, steps=200)  # of a student that begins with shared layers
PIXELS = Distillation(rounds=4, dreams=256, steps=200, quality="best")  # the same by DeepInversion's own dreams, fewer of them
REPAIR = Distillation(rounds=4, learning_rate=0.02)


@dataclass(frozen=True)
class Setting:
    """How much of everything."""

    backbone: str = "resnet32"
    students: tuple[tuple[str, Distillation], ...] = (
        ("resnet20", LESSON),
        ("resnet20", PIXELS),
        ("resnet20", Distillation(rounds=6, inherit=False)),
        ("mobilenet_v3_small", Distillation()),
    )
    classes: int = 20
    new_classes: int = 10
    images: int = 0  # of the training set, in all; 0 takes all
    epochs: int = 16
    batch_size: int = 32
    learning_rate: float = 0.05
    recipe: Recipe = RECIPE
    repair: Distillation = REPAIR
    prune_ratio: float = 0.2
    latencies: tuple[float, ...] = (0.6,)  # that are pruned to as well, each with the latency term and without
    group: int = 8
    seed: int = 0


FULL = Setting()
QUICK = Setting(
    backbone="resnet8",
    students=tuple(
        ("resnet8", Distillation(rounds=2, dreams=32, generator_steps=2, steps=2, batch=16, quality=quality))
        for quality in ("fast", "best")
    ),
    classes=3,
    new_classes=2,
    images=96,
    epochs=1,
    recipe=replace(
        RECIPES["edge"], first_epochs=1, epochs=1, min_steps=4, generator_steps=4, latent=8, width=8, pool=32, pixel_steps=2,
        pixel_batch=16, refine_epochs=1, refine_min_steps=2,
    ),
    repair=Distillation(rounds=1, dreams=32, generator_steps=2, steps=2, batch=16),
    latencies=(),
    group=4,
)  # fmt: skip
PARTS = ("teacher", "dreams", "distill", "prune", "int8", "adopt")


class Workshop:
    """The steps, each a method that returns what it found."""

    def __init__(self, data: datasets.Data, out: Path, models: Path, setting: Setting) -> None:
        self._data, self._models, self._setting = data, models, setting
        self._order = datasets.class_order(len(data.names), setting.seed)
        self._path = out / FILE
        self._found: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def run(self, parts: list[str], say: Callable[[str], None]) -> dict[str, Any]:
        for name, step in self._steps(parts):
            if name not in self._found or (name == "teacher" and not self._teacher_file.exists()):
                say(name)
                begin = time.perf_counter()
                self._found[name] = {**step(), "minutes": (time.perf_counter() - begin) / 60}
                self._found |= {"versions": machine.versions(), "machine": machine.machine(torch.device("cpu"))}
                self._path.write_text(json.dumps(self._found, indent=1) + "\n")
        return self._found

    def _steps(self, parts: list[str]) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
        s = self._setting
        steps: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [("teacher", "teacher", self._train)]
        steps += [("teacher", "mirrored answers", self._mirrored), ("dreams", "dreams", self._page)]
        for student, lesson in s.students:
            pixels = lesson.quality == "best"
            for source in ("adaptive", "dreams") if pixels else ("adaptive", "dreams", "noise"):
                name = f"{student} {source}{' by the pixel' if pixels else ''}{'' if lesson.inherit else ' from nothing'}"
                steps.append(("distill", f"distill {name}", self._distill(name, student, lesson, source)))
        steps += [
            ("prune", "prune by importance", self._prune(eta=0.0)),
            ("prune", "prune by importance and latency", self._prune(eta=0.1)),
            ("prune", "prune by importance, to that latency", self._prune_to_that_latency),
        ]
        for share in s.latencies:
            to = f"to {100 * share:.0f} % of"
            steps += [
                ("prune", f"prune by importance, {to} the latency", self._prune(eta=0.0, latency=share)),
                ("prune", f"prune by importance and latency, {to} it", self._prune(eta=0.1, latency=share)),
            ]
        steps += [
            ("int8", "int8 calibrated on dreams", lambda: self._int8(real=False)),
            ("int8", "int8 calibrated on real images", lambda: self._int8(real=True)),
            ("adopt", "adopted", self._elsewhere),
        ]
        pixels = {"dreams": "pixels", "pool": s.recipe.pool // 2}
        for name, changes in (("abd", {}), ("abd by the pixel", pixels), ("deep_inversion", pixels), ("lwf_mc", {})):
            steps.append(("adopt", f"adopt {name}", self._adopt(name.partition(" ")[0], changes)))
        steps.append(("adopt", "adopt upper bound", self._everything))
        return [(name, step) for part, name, step in steps if part in parts]

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
        return Learner.load(self._teacher_file, "cpu")

    def _train(self) -> dict[str, Any]:
        s = self._setting
        learner = Learner(s.backbone, recipe=s.recipe, device="cpu", seed=s.seed)
        learner.learn_task(self._train_part(0, s.classes), self._data.names)
        learner.save(self._teacher_file)
        return {"accuracy": learner.evaluate(self._test, self._data.names).accuracy}

    def _mirrored(self) -> dict[str, Any]:
        """The teacher, answering by the mean over an image and its mirror image."""
        teacher = self._teacher
        teacher.recipe = replace(teacher.recipe, mirrored_answers=True)
        teacher = teacher.having(teacher.network.grown(0), teacher.backbone)
        return {"accuracy": teacher.evaluate(self._test, self._data.names).accuracy}

    def _page(self) -> dict[str, Any]:
        """A page of pictures: real ones, a generator's dreams, and pixel dreams, a row a class."""
        from matplotlib.figure import Figure

        teacher, rows, columns = self._teacher, min(10, self._setting.classes), 5
        names = teacher.classes[:rows]
        train = self._seen("train", 0, self._setting.classes)
        sets = {"real, not kept": (train.images, [self._data.names[target] for target in train.targets.tolist()])}
        share = {}
        for title, quality in (("dreamt fast, by a generator", "fast"), ("dreamt best, by the pixel", "best")):
            images = teacher.dream(8 * len(teacher.classes), quality=quality)  # type: ignore[arg-type]
            sets[title] = images, [prediction.label for prediction in teacher.predict(images)]
            share[quality] = len(set(sets[title][1])) / len(teacher.classes)
        figure = Figure(figsize=(11, 0.75 * rows + 0.5), layout="constrained")
        for side, (title, (images, labels)) in zip(figure.subfigures(1, 3, wspace=0.05), sets.items(), strict=True):
            side.suptitle(title)
            grid = side.subplots(rows, columns, squeeze=False)
            for name, row in zip(names, grid, strict=True):
                mine = [index for index, label in enumerate(labels) if label == name][:columns]
                for axes in row:
                    axes.axis("off")
                for axes, index in zip(row, mine, strict=False):
                    axes.imshow(images[index].permute(1, 2, 0).numpy())
        figure.savefig(self._path.with_name(PAGE), dpi=100)
        return {"classes_dreamt": share}

    # Compression

    def _distill(self, name: str, student: str, lesson: Distillation, source: Any) -> Callable[[], dict[str, Any]]:
        def step() -> dict[str, Any]:
            settings = replace(lesson, source=source)
            found, report = distill(self._teacher, student, settings=settings, evaluation=self._test, classes=self._data.names)
            found.save(self._models / f"{name.replace(' ', '-')}.safetensors")
            return {**report.to_dict(), "settings": vars(settings), "stages": None}

        return step

    def _prune(self, eta: float, latency: float | None = None) -> Callable[[], dict[str, Any]]:
        """To the setting's ratio, or to a share of the latency."""

        def step() -> dict[str, Any]:
            s = self._setting
            target = {"ratio": s.prune_ratio} if latency is None else {"latency": latency}
            settings = Pruning(group=s.group, eta=eta, repair=s.repair, **target)
            try:
                found, report = prune(self._teacher, settings, evaluation=self._test, classes=self._data.names)
            except BackboneError as error:
                return {"refused": str(error)}
            found.save(self._models / f"pruned-{eta}{f'-{latency:.2f}' if latency else ''}.safetensors")
            return {**report.to_dict(), "eta": eta, "stages": None}

        return step

    def _prune_to_that_latency(self) -> dict[str, Any]:
        """By importance alone to the latency that the step with the latency term came to: the two differ in accuracy alone."""
        row = self._found["prune by importance and latency"]
        before, after = row.get("table_milliseconds", (1.0, 1 - self._setting.prune_ratio))
        return self._prune(eta=0.0, latency=after / before)()

    def _int8(self, real: bool) -> dict[str, Any]:
        calibration = None
        if real:
            part = self._train_part(0, self._setting.classes)
            calibration = [(part.images[:CALIBRATION], part.targets[:CALIBRATION])]
        path = self._models / f"int8-{'real' if real else 'dreams'}.onnx"
        try:
            report = self._teacher.export(path, "int8", calibration=calibration, evaluation=self._test, classes=self._data.names)
        except ExportError as error:
            return {"refused": str(error)}
        return {**report.to_dict(), "path": path.name}

    # Somebody else's classifier

    def _elsewhere(self) -> dict[str, Any]:
        """A plain PyTorch training, without the SDK, that leaves a state dict."""
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
        module = self._module(classes)
        part = self._train_part(0, classes)
        output = {target: number for number, target in enumerate(self._order[:classes])}
        steps = s.epochs * -(-len(part.images) // s.batch_size)
        optimizer = torch.optim.SGD(module.parameters(), s.learning_rate, 0.9, weight_decay=2e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.learning_rate, total_steps=steps, cycle_momentum=False)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        for _ in range(s.epochs):
            for images, targets in part:
                seen = ((augment(images.float() / 255, s.recipe) - mean) / std).contiguous(memory_format=torch.channels_last)
                loss = F.cross_entropy(module(seen), torch.tensor([output[t] for t in targets.tolist()]))
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
                found = module((images.float() / 255 - mean) / std).argmax(1).tolist()
                right += sum(one == output[t] for one, t in zip(found, targets.tolist(), strict=True))
                total += len(found)
        return right / total

    def _module(self, classes: int) -> nn.Module:
        backbone = build("resnet20" if self._setting is FULL else self._setting.backbone)
        return nn.Sequential(backbone, nn.Linear(64, classes)).to(memory_format=torch.channels_last)

    def _adopt(self, method: str, changes: dict[str, Any]) -> Callable[[], dict[str, Any]]:
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
                recipe=replace(s.recipe, **changes),
                device="cpu",
                seed=s.seed,
            )
            learner.learn_task(self._train_part(s.classes, s.classes + s.new_classes), self._data.names)
            found = learner.evaluate([*self._seen("test", 0, s.classes + s.new_classes)], self._data.names)
            old, new = found.per_task
            return {"old": old, "new": new, "combined": found.accuracy}

        return step


MEANINGS = {  # of what the names of students say
    "by the pixel": "Dreams by the pixel are DeepInversion's own, adaptive ones Adaptive DeepInversion's; the others are a "
    "generator's.",
    "from nothing": "A student from nothing does not begin with the layers that it shares with its teacher; one of "
    "another family shares none.",
}


def describe(found: dict[str, Any], folder: str = "") -> str:
    """The findings as Markdown; `folder` is where the page of dreams lies, as seen from the text, with a slash."""
    told = f"A teacher of {percent(found['teacher']['accuracy'])} % on its classes, trained here."
    if "mirrored answers" in found:
        told += f" With `mirrored_answers` it has {percent(found['mirrored answers']['accuracy'])} %."
    told += " One run of each row: a point more or less is chance."
    parts = [told, _students(found), _pruned(found), _quantised(found), _adopted(found)]
    if "dreams" in found:
        parts += ["Real photographs beside dreams of the same classes:", f"![real and dreamt]({folder}{PAGE})"]
    return "\n\n".join(part for part in parts if part)


def _rows(found: dict[str, Any], part: str, figures: Callable[[dict[str, Any]], list[str]]) -> list[list[str]]:
    """A row for each step of a part: the rest of its name, and its figures or why it was refused."""
    steps = {name.removeprefix(part): row for name, row in found.items() if name.startswith(part)}
    return [[name, row["refused"]] if "refused" in row else [name, *figures(row)] for name, row in steps.items()]


def _students(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[str]:
        before, after = row["accuracy"]
        shares = map(percent, (before, after, after / before, row["agreement"]))
        return [str(row["parameters"][1]), str(row["dreams"]), *shares, f"{row['minutes']:.1f}"]

    head = [
        "student, learnt from",
        "parameters",
        "dreams",
        "teacher, %",
        "student, %",
        "of the teacher's, %",
        "agreement, %",
        "minutes",
    ]
    rows = _rows(found, "distill ", figures)
    told = [meaning for words, meaning in MEANINGS.items() if any(words in name for name, *_ in rows)]
    if len({row[3] for row in rows}) > 1:
        told.append("Teachers that differ were trained alike, in other runs; compare minutes within a teacher.")
    return "\n\n".join([table(head, rows), " ".join(told)]) if told else table(head, rows)


def _pruned(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[str]:
        left = [percent(row[key][1] / row[key][0]) for key in ("filters", "flops", "milliseconds")]
        return [*left, " / ".join(map(percent, row["accuracy"]))]

    head = ["pruned", "filters left, %", "work left, %", "latency left, %", "accuracy before, unrepaired, repaired, %"]
    return table(head, [[f"prune {name}", *cells] for name, *cells in _rows(found, "prune ", figures)])


def _quantised(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[str]:
        accuracy = " / ".join(map(percent, row["accuracy"]["pictures"]))
        size, agreement = percent(row["bytes"] / row["float_bytes"]), percent(row["agreement"]["pictures"])
        return [size, f"{row['speedup']:.2f}", accuracy, agreement]

    head = ["INT8", "size of float, %", "times as fast", "accuracy as float, as INT8, %", "agreement on pictures, %"]
    return table(head, _rows(found, "int8 ", figures))


def _adopted(found: dict[str, Any]) -> str:
    def figures(row: dict[str, Any]) -> list[str]:
        return [percent(row.get(key)) for key in ("old", "new", "combined")]

    rows = _rows(found, "adopt ", figures)
    before = percent(found.get("adopted", {}).get("accuracy"))
    told = f"A classifier trained elsewhere, {before} % on its classes, learns new ones:"
    head = ["method", "old classes, %", "new classes, %", "combined, %"]
    return f"{told}\n\n{table(head, rows)}" if rows else ""
