"""Learner: a classifier that learns class after class on the device and keeps no image."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edge_dfcil import devices, metrics
from edge_dfcil._version import __version__
from edge_dfcil.budget import meter as memory
from edge_dfcil.budget import planner as planning
from edge_dfcil.dreaming.inversion import Dreamer, Pool, make_pool
from edge_dfcil.dreaming.pixels import paint
from edge_dfcil.errors import BackboneError, ClassError, DataError, ExportError, ModelFileError, NotLearnedError, SettingError
from edge_dfcil.methods import Method, find_method
from edge_dfcil.methods.task import Task
from edge_dfcil.model import backbones, labels
from edge_dfcil.model import file as storage
from edge_dfcil.model.inputs import check_images, read
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe, find_recipe
from edge_dfcil.results import Evaluation, MemoryPlan, Prediction, TaskReport
from edge_dfcil.training import loop as training
from edge_dfcil.training.augment import augment
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.data import RealBatches, Scan, scan
from edge_dfcil.training.progress import with_progress
from edge_dfcil.training.stage import Stage
from exporters import ExportReport, Int8, export_onnx


@dataclass(frozen=True)
class Committed:
    """The model that answers. A task replaces it whole, in one assignment, so that readers in other threads see
    either the model from before or the one after."""

    network: Network
    tasks: tuple[tuple[str, ...], ...] = ()
    normalizes: bool = False  # whether the network's mean and std are settled

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(name for task in self.tasks for name in task)


class Learner:
    """Learns new classes task by task without keeping a sample (ABD, Smith et al., ICCV 2021).

    Parameters
    ----------
    backbone
        A registered name (`resnet20`, `resnet32`, ...), the name of a torchvision classifier (`mobilenet_v3_small`,
        `resnet18`, ...), or an `nn.Module` (it is copied) from normalised images (N, 3, S, S) to features (N, F). At
        least three BatchNorm layers are needed, for dreams are made by matching their statistics.
    image_size
        S, the side in pixels that the network sees. Images of other sizes are scaled and cropped to it.
    method
        `abd`, a baseline (`finetune`, `lwf`, `lwf_mc`, `deep_inversion`, `lwf_synthetic`), or a `Method`.
    recipe
        "edge" (quick, the default), "paper" (as published), or a `Recipe`.
    memory_budget
        The most that `learn_task` may add to the memory held when it is called: bytes, or text such as "128MB"; None for
        no bound. On the CPU that is the process's resident set, on CUDA and MPS what torch reserves on the device; what the
        loader holds is not counted. A plan is measured before anything is trained, and refused if it cannot be kept.
    device
        "auto" (CUDA, else MPS, else CPU) or a torch device.
    seed
        All draws of a task follow it and the task's number; on the CPU two runs are equal to the bit, unless another
        thread draws from torch's global generator meanwhile.
    weights
        Pretrained torchvision weights, such as "DEFAULT"; torchvision loads them.
    mean, std
        What images in [0, 1] are normalised with, per channel. None takes ImageNet's with pretrained weights; else they
        are measured over all pixels of the first task, because dreams are made with mean 0 and deviation 1.

    Attributes
    ----------
    classes, tasks
        The names learnt, in the order of the outputs; and task by task.
    device, backbone, method, recipe, seed
        As given; `device` is the one found, `backbone` is None for an own module.

    Raises
    ------
    SettingError, BackboneError
        Before anything is built that cannot work.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet32",
        *,
        image_size: int = 32,
        method: str | Method = "abd",
        recipe: str | Recipe = "edge",
        memory_budget: int | str | None = None,
        device: str | torch.device = "auto",
        seed: int = 0,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.memory_budget = memory.parse(memory_budget)
        self.device = devices.find_device(device)
        self.method, self.recipe, self.seed = find_method(method), find_recipe(recipe), seed
        name = backbone if isinstance(backbone, str) else None
        if not isinstance(image_size, int) or image_size < 8:
            raise SettingError(f"image_size={image_size!r}; it is the side in pixels, 8 or more")
        if weights is not None and mean is None and std is None:
            mean, std = backbones.IMAGENET_STATISTICS
        with devices.seeded(seed, self.device):
            module = backbones.build(backbone, weights) if isinstance(backbone, str) else copy.deepcopy(backbone)
            features = backbones.check_backbone(module, image_size)
            network = Network(module, features, image_size)
        self._adopt(name, network, (), _set_statistics(network, mean, std))

    def _adopt(self, name: str | None, network: Network, tasks: tuple[tuple[str, ...], ...], normalizes: bool) -> None:
        self.backbone = name
        network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        network.mirrored = self.recipe.augmentation.mirrored_answers
        self._committed = Committed(network.eval(), tasks, normalizes)
        self._learning, self._cancel = threading.Lock(), threading.Event()

    @classmethod
    def from_classifier(
        cls,
        module: nn.Module,
        classes: Sequence[str],
        *,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head: str | None = None,
        backbone: str | None = None,
        **settings: Any,
    ) -> Learner:
        """Adopts a classifier that somebody else trained, and goes on from there. The module is copied, not changed.

        Parameters
        ----------
        module
            Normalised images (N, 3, S, S) to logits (N, len(classes)), with BatchNorm layers and a final `nn.Linear`.
        classes
            The names of its outputs, in order.
        mean, std
            What its images were normalised with, for images in [0, 1]; None takes ImageNet's.
        head
            The dotted name of the final linear layer; None takes the last one there is.
        backbone
            The registered name of the module's architecture, if it has one: its file then loads by itself, while that of
            a nameless module needs `Learner.load(path, backbone=module)`.
        **settings
            As for `Learner`: method, recipe, memory_budget, device, seed.

        Raises
        ------
        BackboneError
            When the module does not end in that linear layer, has too few BatchNorm layers, or is not what it is named.
        ClassError
            When the names repeat, or are not as many as the outputs.
        """
        parts = backbones.split(module, head)
        backbones.check_split(module, parts, image_size)
        if backbone is not None:
            backbones.check_name(parts.backbone, backbone)
        names = tuple(labels.name_targets(range(len(classes)), None, list(classes)).values())
        if len(names) != parts.head.out_features:
            raise ClassError(f"{len(names)} names were given for a classifier with {parts.head.out_features} outputs")
        if mean is None and std is None:
            mean, std = backbones.IMAGENET_STATISTICS
        learner = cls(parts.backbone, image_size=image_size, mean=mean, std=std, **settings)
        network = learner._committed.network.grown(len(names))
        with torch.no_grad():
            network.head.weight.copy_(parts.head.weight)
            network.head.bias.copy_(parts.head.bias if parts.head.bias is not None else torch.zeros(len(names)))
        learner._adopt(backbone, network, (names,), normalizes=True)
        return learner

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class name learnt, in the order of the outputs."""
        return self._committed.classes

    @property
    def tasks(self) -> tuple[tuple[str, ...], ...]:
        """The class names that each task brought."""
        return self._committed.tasks

    @property
    def image_size(self) -> int:
        """The side in pixels that the network sees."""
        return self._committed.network.image_size

    @property
    def network(self) -> Network:
        """The committed classifier, plain pixels to logits. To look at, not to change."""
        return self._committed.network

    # Learning

    def learn_task(
        self,
        loader: Any,
        classes: Classes | None = None,
        *,
        relearn: bool = False,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> TaskReport:
        """Learns the classes of a loader and keeps those known before. All or nothing: until it returns, the model
        that answers is the one from before, and an error or Ctrl-C leaves it so.

        Parameters
        ----------
        loader
            Anything that can be iterated over again and again (a DataLoader, a list) and yields pairs of images
            (N, 3, H, W), uint8 or float in [0, 1], and targets (N,). Its batches are the real half of each step.
            It is read once before training, to check it, and never after the call returns.
        classes
            Names by target value: a list, or a mapping. None takes `loader.dataset.classes`.
        relearn
            Whether classes that are known already are refreshed with these images; else they are refused.
        callbacks
            Hooks that are called as learning goes.
        progress
            Whether to show progress on stderr, when that is a terminal.

        Raises
        ------
        DataError
            For images, targets or a loader that cannot be learnt from.
        ClassError
            For names that repeat, or are known already.
        BudgetError
            When the memory budget cannot be kept; with what is needed and what would help.
        DivergedError, Cancelled
            When a loss is not finite; after `cancel()`.
        """
        if not self._learning.acquire(blocking=False):
            raise SettingError("this learner is learning a task already, in another thread; wait for it, or cancel() it")
        callbacks = with_progress(callbacks, progress)
        try:
            self._cancel.clear()
            begin = time.perf_counter()
            with self._measuring() as meter, devices.seeded(self._seed_of_task(), self.device):
                scanned = scan(loader)
                meter.exclude()  # what the loader keeps
                plan = None
                if self.memory_budget is not None:
                    for callback in callbacks:
                        callback.on_plan_begin()
                    plan = self._plan(lambda learner: learner._begin(loader, scanned, classes, relearn)[0], meter)
                task, committed, report = self._begin(loader, scanned, classes, relearn)
                for callback in callbacks:
                    callback.on_task_begin(task)
                stages = memory.run(task, self.method, callbacks, self._cancel.is_set, meter, plan)
            network = task.student.eval().requires_grad_(False)
            training.check_finite(network)
            seconds = time.perf_counter() - begin
            report = replace(report, stages=tuple(stages), plan=plan, peak_bytes=meter.highest, seconds=seconds)
            self._committed = replace(committed, network=network)
            for callback in callbacks:
                callback.on_task_end(report)
            return report
        finally:
            for callback in callbacks:
                callback.on_exit()
            self._learning.release()

    def plan(self, loader: Any, classes: Classes | None = None, *, relearn: bool = False, progress: bool = True) -> MemoryPlan:
        """What `learn_task` would need and how it would keep the memory budget; nothing is learnt.

        It rehearses a few steps of each stage on a network that is thrown away. `loader` is as for `learn_task`, or one
        batch of it, a pair of images and targets.

        Raises `BudgetError` when the budget cannot be kept, and what `learn_task` raises for its loader.
        """
        if isinstance(loader, tuple) and len(loader) == 2:
            loader = [loader]
        if not self._learning.acquire(blocking=False):
            raise SettingError("this learner is learning a task in another thread, and its memory cannot be told apart; wait")
        callbacks = with_progress((), progress)
        try:
            self._cancel.clear()
            for callback in callbacks:
                callback.on_plan_begin()
            with self._measuring() as meter, devices.seeded(self._seed_of_task(), self.device):
                scanned = scan(loader)
                meter.exclude()
                return self._plan(lambda learner: learner._begin(loader, scanned, classes, relearn)[0], meter)
        finally:
            for callback in callbacks:
                callback.on_exit()
            self._learning.release()

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[memory.Meter]:
        with memory.returned_at_once(self.memory_budget), memory.Meter(self.device) as meter:
            yield meter

    def _plan(self, begin: Callable[[Learner], Task], meter: memory.Meter) -> MemoryPlan:
        """A plan within the budget; `begin` lays out the task for a learner, which for remedies is a smaller one."""

        def planner(learner: Learner) -> planning.Planner:
            return planning.Planner(lambda: begin(learner), self.method, meter, self._cancel.is_set)

        with devices.seeded(self._seed_of_task(), self.device):
            try:
                return planner(self).plan(self.memory_budget)
            except planning.TooLarge as error:
                assert self.memory_budget is not None
                others = ((text, planner(learner).least) for text, learner in self._smaller())
                raise planning.refusal(self.memory_budget, error.stages, others) from None

    def _smaller(self) -> Iterator[tuple[str, Learner]]:
        """Learners that need less memory for the same task, to be measured: a smaller image, a smaller backbone."""
        half = self.image_size // 2
        choices = [(f"image_size={half}", self.backbone, half)] if self.image_size >= 32 else []
        choices += [(f"backbone={name!r}", name, self.image_size) for name in backbones.smaller(self.backbone)]
        for text, backbone, image_size in choices:
            with contextlib.suppress(BackboneError):  # an own module that does not run on smaller images
                yield text, self.sibling(backbone or self.network.backbone, image_size=image_size)

    def sibling(self, backbone: str | nn.Module, *, image_size: int | None = None) -> Learner:
        """A learner with another backbone, untrained, and all else alike, the classes included."""
        settings: Any = {"method": self.method, "recipe": self.recipe, "device": self.device, "seed": self.seed}
        new, before = Learner(backbone, image_size=image_size or self.image_size, **settings), self.network
        with devices.seeded(self.seed, self.device):
            network = new.network.grown(len(self.classes))
        network.set_statistics(before.mean.flatten().tolist(), before.std.flatten().tolist())
        return self.having(network, new.backbone)

    def having(self, network: Network, backbone: str | None) -> Learner:
        """A learner that answers with this network, whose backbone has this registered name, and all else alike."""
        learner = copy.copy(self)
        learner._adopt(backbone, network.requires_grad_(False), self.tasks, self._committed.normalizes)
        return learner

    def _begin(self, loader: Any, scanned: Scan, classes: Classes | None, relearn: bool) -> tuple[Task, Committed, TaskReport]:
        """Lays out the task of a loader; the model that would be committed still has the old network."""
        before = self._committed
        names = labels.name_targets(scanned.counts, loader, classes)
        known = [name for name in names.values() if name in before.classes]
        if known and not relearn:
            raise ClassError(f"{', '.join(map(repr, known))} is known already; leave it out, or pass relearn=True to refresh it")
        new = tuple(name for name in names.values() if name not in known)
        after = replace(before, tasks=(*before.tasks, new) if new else before.tasks, normalizes=True)
        outputs = labels.outputs_of(names, after.classes)

        student = before.network.grown(len(new))
        if not before.normalizes:
            student.set_statistics(scanned.mean, scanned.std)
        counts = torch.zeros(student.n_classes, device=self.device)
        for target, output in outputs.items():
            counts[output] = scanned.counts[target]
        task = Task(
            student=student,
            teacher=before.network.frozen() if before.classes else None,
            current=torch.nonzero(counts).flatten(),
            old=torch.nonzero(counts[: len(before.classes)] == 0).flatten(),
            counts=counts,
            batches=RealBatches(loader, scanned, outputs, student, self.recipe),
            recipe=self.recipe,
            device=self.device,
        )
        report = TaskReport(len(after.tasks), self.method.name, new, tuple(known), after.classes, scanned.images, 0.0, ())
        return task, after, report

    def _seed_of_task(self) -> int:
        return self.seed * 1009 + len(self._committed.tasks)

    def cancel(self) -> None:
        """Stops a `learn_task` that runs in another thread or calls a callback; it raises `Cancelled` there."""
        self._cancel.set()

    # Answering

    def check_answering(self) -> None:
        """Raises `NotLearnedError` before the first task."""
        self._answering()

    def _answering(self) -> Committed:
        committed = self._committed
        if not committed.classes:
            raise NotLearnedError("nothing has been learnt yet; call learn_task(loader) first")
        return committed

    def predict(self, images: Any, top_k: int = 1) -> list[Prediction]:
        """Names images (N, 3, H, W), uint8 or float in [0, 1]; also while a task is being learnt in another thread.

        Raises `DataError` for images that are none, `NotLearnedError` before the first task.
        """
        committed = self._answering()
        if top_k < 1:
            raise SettingError(f"top_k={top_k}; it must be 1 or more")
        images = check_images(images)
        predictions = []
        for chunk in images.split(256):
            scores, outputs = _probabilities(committed.network, chunk).topk(min(top_k, len(committed.classes)))
            for row_scores, row_outputs in zip(scores.tolist(), outputs.tolist(), strict=True):
                top = tuple((committed.classes[o], s) for s, o in zip(row_scores, row_outputs, strict=True))
                predictions.append(Prediction(top[0][0], top[0][1], top))
        return predictions

    def evaluate(self, loader: Any, classes: Classes | None = None) -> Evaluation:
        """Accuracy over a loader, every known class competing. `loader` and `classes` are as for `learn_task`.

        Raises `DataError` for a loader without images, `ClassError` for a class that is not known.
        """
        committed = self._answering()
        names = list(committed.classes)
        confusion = torch.zeros(len(names), len(names), dtype=torch.long)
        for images, targets in read(loader):
            named = labels.name_targets(set(targets), loader, classes)
            outputs = labels.outputs_of(named, names)
            true = torch.tensor([outputs[target] for target in targets])
            predicted = _probabilities(committed.network, images).argmax(1).cpu()
            confusion.index_put_((true, predicted), torch.ones(len(true), dtype=torch.long), accumulate=True)
        if not confusion.sum():
            raise DataError("the loader gave no image to evaluate on")
        return metrics.evaluation(confusion.tolist(), names, committed.tasks)

    def dream(
        self,
        n: int,
        classes: Sequence[str] | None = None,
        *,
        quality: Literal["fast", "best"] = "fast",
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Tensor:
        """`n` images (n, 3, S, S), uint8, of what the model remembers, sorted by class.

        There are fewer when the classes asked for are rarely come upon.

        Parameters
        ----------
        classes
            Names to dream of, an even share each; None dreams of all.
        quality
            "fast" trains a fresh generator (ABD), "best" optimises the pixels of every image (DeepInversion).

        Raises `ClassError` for a name that is not known, `NotLearnedError` before the first task, `DivergedError` when
        no dream is of the classes asked for.
        """
        committed = self._answering()
        chosen = list(dict.fromkeys(classes)) if classes is not None else list(committed.classes)
        if n < 1 or not chosen:
            raise SettingError(f"n={n}, classes={classes}; ask for at least one image of one class")
        if quality not in ("fast", "best"):
            raise SettingError(f"quality={quality!r}; choose 'fast' or 'best'")
        wanted = labels.outputs_of({name: name for name in chosen}, committed.classes)
        callbacks = with_progress(callbacks, progress)
        try:
            with devices.seeded(self._seed_of_task(), self.device):
                outputs = torch.tensor(sorted(wanted.values()), device=self.device)
                pool = self._dreamt(n, committed.network.frozen(), outputs, quality, callbacks)
        finally:
            for callback in callbacks:
                callback.on_exit()
        order = pool.labels.argsort(stable=True)
        return committed.network.denormalize(pool[order].images).cpu()

    def _dreamt(self, n: int, teacher: Network, wanted: Tensor, quality: str, callbacks: Sequence[Callback]) -> Pool:
        def fit(stage: Stage) -> None:
            training.fit(stage, self.device, callbacks, cancelled=lambda: False)

        if quality == "best":
            pool = Pool(n, teacher, self.device)
            for stage in paint(pool, teacher, wanted, self.recipe):
                fit(stage)
            return pool
        dreamer = Dreamer(teacher, wanted, self.recipe)
        fit(dreamer.stage())
        return make_pool(dreamer, n)

    # Files

    def settings(self) -> dict[str, Any]:
        """What the model file holds beside its tensors, as JSON takes it."""
        return self._settings_of(self._committed)

    def _settings_of(self, committed: Committed) -> dict[str, Any]:
        network = committed.network
        return {
            "version": __version__,
            "backbone": self.backbone,
            "architecture": type(network.backbone).__qualname__,
            "image_size": network.image_size,
            "mean": network.mean.flatten().tolist() if committed.normalizes else None,
            "std": network.std.flatten().tolist() if committed.normalizes else None,
            "method": self.method.name,
            "recipe": self.recipe.to_dict(),
            "seed": self.seed,
            "tasks": [list(task) for task in committed.tasks],
        }

    def save(self, path: str | Path) -> Path:
        """Writes the committed model to one file, all or nothing. Raises `ModelFileError` when that fails."""
        committed = self._committed  # read once: a task that commits meanwhile must not mix two models in one file
        return storage.write(path, committed.network.state_dict(), self._settings_of(committed))

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        *,
        backbone: nn.Module | None = None,
        method: str | Method | None = None,
        memory_budget: int | str | None = None,
    ) -> Learner:
        """Reads a model file back; it predicts the same to the bit on the same device.

        Parameters
        ----------
        backbone
            For a file whose backbone was the caller's own module (adopted ones included): that module, built anew. Its
            weights are replaced by the file's.
        method
            None takes the one in the file.
        memory_budget
            As for `Learner`. It belongs to the device and is not in the file.

        Raises `ModelFileError` for a file that is missing, damaged, foreign, or does not fit the backbone.
        """
        tensors, settings = storage.read(path)
        try:
            name = settings["backbone"]
            if name is None and backbone is None:
                raise ModelFileError(
                    f"{path} was made with a backbone of its own ({settings['architecture']}); build that module and pass "
                    "Learner.load(path, backbone=module)"
                )
            module = copy.deepcopy(backbone) if backbone is not None else backbones.build(name)
            backbones.narrow(module, {key.removeprefix("backbone."): tensor for key, tensor in tensors.items()})
            learner = cls(
                module,
                image_size=settings["image_size"],
                method=method or settings["method"],
                recipe=Recipe.from_dict(settings["recipe"]),
                memory_budget=memory_budget,
                device=device,
                seed=settings["seed"],
                mean=settings["mean"],
                std=settings["std"],
            )
            tasks = tuple(tuple(task) for task in settings["tasks"])
            network = learner._committed.network.grown(sum(map(len, tasks)))
            network.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            first_lines = " ".join(str(error).split())[:200]
            raise ModelFileError(f"{path} does not fit this version or backbone: {first_lines}") from error
        learner._adopt(name, network.requires_grad_(False), tasks, settings["mean"] is not None)
        return learner

    def export(
        self,
        path: str | Path,
        quantize: str | None = None,
        *,
        calibration: Any | None = None,
        evaluation: Any | None = None,
        classes: Classes | None = None,
        progress: bool = True,
    ) -> ExportReport:
        """Writes the committed classifier as ONNX with its preprocessing, checked against the model before it is written.

        Parameters
        ----------
        quantize
            None for floats; "int8" for a static quantization (QDQ, a scale a channel), calibrated on dreams and checked on
            other dreams. It takes a quarter of the space, and dreaming takes its time.
        calibration
            A loader, as for `learn_task`, to calibrate on instead. Nothing of it is kept.
        evaluation
            A loader of known classes, on which the INT8 file is checked as well; the report has both accuracies.
        classes
            Names by target value for `evaluation`; None takes its data set's.

        Raises `ExportError` when the file cannot be made or disagrees with the model; nothing is written then.
        """
        if quantize not in (None, "int8"):
            raise ExportError(f"quantize={quantize!r} is no form of quantization; pass None or 'int8'")
        if quantize is None and (calibration is not None or evaluation is not None):
            raise ExportError("calibration and evaluation are for quantize='int8'; a float file is checked without them")
        committed = self._answering()
        if not Path(path).parent.is_dir():
            raise ExportError(f"{Path(path).parent} is not a folder; make it first")
        int8 = None if quantize is None else self._int8(calibration, evaluation, classes, progress)
        network = copy.deepcopy(committed.network).cpu()
        return export_onnx(
            network,
            path,
            classes=committed.classes,
            image_size=network.image_size,
            source_sha256=storage.digest(network.state_dict(), self._settings_of(committed)),
            version=__version__,
            int8=int8,
        )

    def _int8(self, calibration: Any | None, evaluation: Any | None, classes: Classes | None, progress: bool) -> Int8:
        """Images to quantize with: dreams, half to calibrate on and half to check, and what was given besides."""
        pictures = self._pictures(calibration)[0] if calibration is not None else None
        checks, targets = {}, {}
        if evaluation is not None:
            checks["pictures"], found = self._pictures(evaluation)
            outputs = labels.outputs_of(labels.name_targets(set(found), evaluation, classes), self.classes)
            targets["pictures"] = np.array([outputs[target] for target in found])
        # In turns, so that both halves have every class: dreams come sorted.
        dreams = self.dream(max(MIN_CALIBRATION, 8 * len(self.classes)), progress=progress)
        checks["dreams"] = dreams[1::2].numpy()
        if pictures is not None:
            return Int8(pictures, checks, targets)
        return Int8(self._varied(dreams[::2]), checks, targets, widening=DREAMS_WIDENING)

    def _varied(self, dreams: Tensor) -> Any:
        """Dreams (N, 3, S, S), uint8, each twice, with the brightness, contrast and place of real images in training.

        Dreams have the mean and the spread of real activations, but not their tails, and ranges are made of those.
        """
        with devices.seeded(self._seed_of_task(), torch.device("cpu")):
            varied = augment(torch.cat([dreams, dreams]).float() / 255, self.recipe)
        return (255 * varied).round().to(torch.uint8).contiguous().numpy()

    def _pictures(self, loader: Any) -> tuple[Any, list[Any]]:
        """All images of a loader as an app feeds them to the file (N, 3, S, S), uint8, and their targets."""
        network = self._committed.network
        chunks, targets = [], []
        for images, found in read(loader):
            chunks.append((255 * network.pixels(images)).round().to(torch.uint8).cpu().numpy())
            targets += found
        if not targets:
            raise DataError("the loader gave no image")
        return np.concatenate(chunks), targets


MIN_CALIBRATION = 1024  # dreams for an INT8 export, at least: half to calibrate on, half to check
# Real images reach further than dreams. Chosen on training images of a resnet32 (the answers of 1.0, 1.1, 1.25 and 1.5 times
# the range agreed with the float ones for 96.3, 98.5, 98.9 and 98.8 %).
DREAMS_WIDENING = 1.25


def _set_statistics(network: Network, mean: Sequence[float] | None, std: Sequence[float] | None) -> bool:
    """Sets what was given, and whether anything was."""
    if mean is None and std is None:
        return False
    if mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise SettingError(f"mean={mean}, std={std}; give both, three numbers each, one a channel, and std above 0")
    network.set_statistics(mean, std)
    return True


@torch.inference_mode()
def _probabilities(network: Network, images: Tensor) -> Tensor:
    return network(images).float().softmax(1)
