"""Learner: the face of the package. It holds the current model, the settings and one writer lock, and forwards."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edge_dfcil import devices
from edge_dfcil.budget import meter as memory
from edge_dfcil.budget import schedule
from edge_dfcil.dreaming.work import Dreaming
from edge_dfcil.errors import BackboneError, ModelFileError, SettingError
from edge_dfcil.exporting import Exporting
from edge_dfcil.learning import Learning
from edge_dfcil.methods import Method, find_method
from edge_dfcil.model import backbones, file
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.model import Model
from edge_dfcil.model.network import Network
from edge_dfcil.recipe import Recipe, find_recipe
from edge_dfcil.results import Evaluation, MemoryPlan, Prediction, TaskReport
from edge_dfcil.training.callbacks import Callback, check_callbacks
from edge_dfcil.training.progress import with_progress
from edge_dfcil.training.session import Session, Work
from exporters import ExportReport


class Learner:
    """Learns new classes task by task without keeping an image (ABD, Smith et al., ICCV 2021).

    Parameters
    ----------
    backbone
        A name (`resnet20`, `resnet32`, ...; torchvision's `mobilenet_v3_small`, `resnet18`, ...; timm's as
        `timm:resnet18`; see `list_backbones`), or an `nn.Module` (it is copied) from normalised images (N, 3, S, S) to
        features (N, F). At least three BatchNorm layers are needed, because generated images are made by matching their
        statistics.
    image_size
        S, the side in pixels that the network sees. Images of other sizes are scaled and cropped to it. None takes the
        size that a `timm:` backbone was made for, else 32.
    method
        `abd`, `lda`, a baseline (`finetune`, `lwf`, `lwf_mc`, `deep_inversion`, `lwf_synthetic`), or a `Method`.
    recipe
        "edge" (quick, the default), "paper" (as published), "strict" (`edge` without class statistics), or a `Recipe`.
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
        Pretrained weights of a backbone by name, such as "DEFAULT"; torchvision or timm loads them.
    mean, std
        What images in [0, 1] are normalised with, per channel. None takes what pretrained weights and timm's networks
        expect; else they are measured over all pixels of the first task, because generated images have mean 0 and deviation 1.

    Raises
    ------
    SettingError, BackboneError
        Before anything is built that cannot work.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet32",
        *,
        image_size: int | None = None,
        method: str | Method = "abd",
        recipe: str | Recipe = "edge",
        memory_budget: int | str | None = None,
        device: str | torch.device = "auto",
        seed: int = 0,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        model = Model.new(backbone, image_size=image_size, device=device, seed=seed, weights=weights, mean=mean, std=std)
        self._settle(model, find_method(method), find_recipe(recipe), memory_budget, seed)

    def _settle(self, model: Model, method: Method, recipe: Recipe, memory_budget: int | str | None, seed: int) -> None:
        self.memory_budget, self.seed = memory.parse(memory_budget), devices.check_seed(seed)
        self._method, self._recipe = method, recipe
        self._writing, self._session, self._digests = threading.Lock(), None, {}
        self._adopt(model)

    _session: Session[Any] | None
    _digests: dict[Path, str | None]  # of the model files that were read or written last, by path

    def _adopt(self, model: Model) -> None:
        """Makes a model the current one, with this learner's settings: one assignment, so that readers in other threads
        see the one from before or this one."""
        learning = dict(model.learning) | {"method": self._method.name, "recipe": self._recipe.to_dict(), "seed": self.seed}
        self._model = model.with_learning(learning, self._recipe.augmentation.mirrored_answers)

    @classmethod
    def of(
        cls,
        model: Model,
        *,
        method: str | Method = "abd",
        recipe: str | Recipe = "edge",
        memory_budget: int | str | None = None,
        seed: int = 0,
    ) -> Learner:
        """A learner that goes on from a model."""
        learner = cls.__new__(cls)
        learner._settle(model, find_method(method), find_recipe(recipe), memory_budget, seed)
        return learner

    def __repr__(self) -> str:
        return f"Learner({self._model!r}, method={self._method.name!r}, recipe={self._recipe.preset!r})"

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: locks and a running session stay behind."""
        return {name: value for name, value in vars(self).items() if name not in ("_writing", "_session")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._writing, self._session = threading.Lock(), None

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
        device: str | torch.device = "auto",
        **settings: Any,
    ) -> Learner:
        """Adopts a trained classifier; see `Model.from_classifier`. `settings` are as for `Learner`: method, recipe,
        memory_budget, seed."""
        model = Model.from_classifier(
            module, classes, image_size=image_size, mean=mean, std=std, head=head, backbone=backbone, device=device
        )
        return cls.of(model, **settings)

    # What it holds

    @property
    def model(self) -> Model:
        """The current model: immutable, and enough to serve. A task that is committed puts another in its place."""
        return self._model

    @property
    def network(self) -> Network:
        """The current network, plain pixels to logits. To look at, not to change."""
        return self._model.network

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class name learnt, in the order in which they were learnt."""
        return self._model.classes

    @property
    def tasks(self) -> tuple[tuple[str, ...], ...]:
        """The class names that each task brought."""
        return self._model.tasks

    @property
    def image_size(self) -> int:
        """The side in pixels that the network sees."""
        return self._model.image_size

    @property
    def backbone(self) -> str | None:
        """The backbone's registered name; None for a module of the caller's own."""
        return self._model.backbone

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def running(self) -> Session[Any] | None:
        """The session that runs on this learner now, in any thread."""
        return self._session

    def to(self, device: str | torch.device) -> Learner:
        """Moves the current model to a device, and returns the learner."""
        with self._write_lock():
            self._model = self._model.to(device)
        return self

    @property
    def method(self) -> Method:
        return self._method

    @method.setter
    def method(self, method: str | Method) -> None:
        self._method = find_method(method)
        self._adopt(self._model)

    @property
    def recipe(self) -> Recipe:
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: str | Recipe) -> None:
        self._recipe = find_recipe(recipe)
        self._adopt(self._model)

    # Learning

    def learn_task(
        self,
        loader: Any,
        classes: Classes | None = None,
        *,
        relearn: bool = False,
        time_budget: float | str | None = None,
        checkpoint: str | Path | None = None,
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
        time_budget
            Seconds, or text such as "10min": the schedule is fitted to the measured speed of a step so that it ends in
            time, as a whole schedule with fewer steps. The report says what it was fitted to.
        checkpoint
            A file that is written every few seconds. After the process was killed, the same call goes on from it; on the
            same CPU it ends with the same weights. It holds no image and no generated image, and is removed after the
            commit. Generated images are made again when the task goes on, which takes its time.
        callbacks
            Hooks that are called as learning goes.
        progress
            Whether to show progress on stderr, when that is a terminal or a notebook.

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
        session = self.session(
            loader,
            classes,
            relearn=relearn,
            time_budget=time_budget,
            checkpoint=checkpoint,
            callbacks=callbacks,
            progress=progress,
        )
        while (report := session.run()) is None:  # a callback has paused it: there is nothing else to wait for here
            pass
        session.clear_checkpoint()
        return report

    def session(
        self,
        loader: Any,
        classes: Classes | None = None,
        *,
        relearn: bool = False,
        time_budget: float | str | None = None,
        checkpoint: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Session[TaskReport]:
        """The same as a session, which can be paused, saved (`state_dict`) and resumed; `run()` learns and commits.

        The checkpoint is not removed by `run()`: call `clear_checkpoint()` when the model has been saved.
        """
        before, seconds = self._model, schedule.parse(time_budget)

        def commit(model: Model) -> None:
            if self._model is not before:
                raise SettingError("the learner has another model than when this session was made; make a new session")
            self._model = model

        def begun() -> None:
            for callback in found:
                callback.on_task_begin(self)

        work = Learning(
            before,
            self._method,
            self._recipe,
            loader,
            classes,
            relearn=relearn,
            memory_budget=self.memory_budget,
            seconds=seconds,
            smaller=self._smaller,
            begun=begun,
            commit=commit,
        )
        found = with_progress(check_callbacks(callbacks), progress)
        return self._new_session(work, found, checkpoint=checkpoint, deadline=seconds, writes=True)

    def _new_session(
        self,
        work: Work[Any],
        callbacks: Sequence[Callback],
        *,
        checkpoint: str | Path | None = None,
        deadline: float | None = None,
        writes: bool = False,
        seed: int | None = None,
    ) -> Session[Any]:
        seed = self._seed_of_task() if seed is None else seed
        session: Session[Any] = Session(
            work, device=self.device, seed=seed, callbacks=callbacks, checkpoint=checkpoint, deadline=deadline
        )
        session.guard = lambda: self._running(session, writes)
        return session

    def run(self, work: Work[Any], callbacks: Sequence[Callback] = (), progress: bool = True, seed: int | None = None) -> Any:
        """Runs a long operation on this learner's model, with progress and `cancel()`; returns its result."""
        return self._new_session(work, with_progress(check_callbacks(callbacks), progress), seed=seed).run()

    @contextlib.contextmanager
    def _running(self, session: Session[Any], writes: bool) -> Iterator[None]:
        with self._write_lock() if writes else contextlib.nullcontext():
            self._session = session
            try:
                yield
            finally:
                self._session = None

    @contextlib.contextmanager
    def _write_lock(self) -> Iterator[None]:
        if not self._writing.acquire(blocking=False):
            raise SettingError("this learner is learning a task already, in another thread; wait for it, or cancel() it")
        try:
            yield
        finally:
            self._writing.release()

    def plan(self, loader: Any, classes: Classes | None = None, *, relearn: bool = False, progress: bool = True) -> MemoryPlan:
        """What `learn_task` would need and how it would keep the memory budget; nothing is learnt.

        It rehearses a few steps of each stage on a network that is thrown away. `loader` is as for `learn_task`, or one
        batch of it, a pair of images and targets. Raises `BudgetError` when the budget cannot be kept, and what `learn_task`
        raises for its loader.
        """
        loader = [loader] if isinstance(loader, tuple) and len(loader) == 2 else loader
        work = Learning(
            self._model,
            self._method,
            self._recipe,
            loader,
            classes,
            relearn=relearn,
            memory_budget=self.memory_budget,
            smaller=self._smaller,
            plan_only=True,
        )
        session = self._new_session(work, with_progress((), progress), writes=True)
        session.run()
        assert work.plan is not None
        return work.plan

    def _smaller(self) -> Iterator[tuple[str, Model]]:
        """Models that need less memory for the same task, to be measured: a smaller image, a smaller backbone."""
        half = self.image_size // 2
        choices = [(f"image_size={half}", self.backbone, half)] if self.image_size >= 32 else []
        choices += [(f"backbone={name!r}", name, self.image_size) for name in backbones.smaller(self.backbone)]
        for text, backbone, image_size in choices:
            with contextlib.suppress(BackboneError):  # an own module that does not run on smaller images
                yield text, self._model.untrained(backbone or self.network.backbone, image_size=image_size, seed=self.seed)

    def with_model(self, model: Model) -> Learner:
        """A learner with another model and all else alike."""
        return Learner.of(model, method=self._method, recipe=self._recipe, memory_budget=self.memory_budget, seed=self.seed)

    def _seed_of_task(self) -> int:
        return self.seed * 1009 + len(self.tasks)

    def cancel(self) -> None:
        """Stops what runs in another thread or calls a callback (`learn_task`, `dream`, ...); it raises `Cancelled` there."""
        session = self._session
        if session is not None:
            session.cancel()

    # Answering: all of it by the current model, also while a task is being learnt in another thread

    def predict(self, images: Any, top_k: int = 1) -> list[Prediction]:
        """The most probable classes of each image; see `Model.predict`."""
        return self._model.predict(images, top_k)

    def probabilities(self, images: Any) -> Tensor:
        """Probabilities (N, C) of the classes; see `Model.probabilities`."""
        return self._model.probabilities(images)

    def embed(self, images: Any) -> Tensor:
        """Features (N, F); see `Model.embed`."""
        return self._model.embed(images)

    def evaluate(self, loader: Any, classes: Classes | None = None) -> Evaluation:
        """Accuracy over a loader; see `Model.evaluate`."""
        return self._model.evaluate(loader, classes)

    def check_answering(self) -> None:
        """Raises `NotLearnedError` before the first task."""
        self._model.check_answering()

    def dream(
        self,
        n: int,
        classes: Sequence[str] | None = None,
        *,
        quality: Literal["fast", "best"] = "fast",
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Tensor:
        """Images (n, 3, S, S), uint8, of what the model remembers, sorted by class; fewer where a class is rarely generated.

        Parameters
        ----------
        classes
            Names of the classes, an even share each; None takes all.
        quality
            "fast" trains a fresh generator (ABD), "best" optimises the pixels of every image (DeepInversion).

        Raises `ClassError` for a name that is not known, `NotLearnedError` before the first task, `DivergedError` when
        no generated image is of the classes asked for, `Cancelled` after `cancel()`, `BudgetError` when a step does not fit
        into the memory budget.
        """
        work = Dreaming(self._model, self._recipe, n, classes, quality)
        return self.run(work, callbacks, progress)

    # Class surgery

    def forget(self, names: str | Iterable[str]) -> None:
        """Forgets classes; see `Model.forget`, also for what the weights still carry."""
        self._replace(self._model.forget(names))

    def rename(self, names: Mapping[str, str]) -> None:
        """Calls classes by other names; see `Model.rename`."""
        self._replace(self._model.rename(names))

    def merge(self, names: Sequence[str], into: str) -> None:
        """Takes several classes for one; see `Model.merge`."""
        self._replace(self._model.merge(names, into))

    def _replace(self, model: Model) -> None:
        with self._write_lock():
            self._model = model

    # Files

    def settings(self) -> dict[str, Any]:
        """What the model file holds beside its tensors, as JSON takes it."""
        return self._model.settings()

    def save(self, path: str | Path) -> Path:
        """Writes the current model to one file, all or nothing.

        Raises `ModelFileError` when that fails, and when another process has changed the file since this learner read or
        wrote it: its classes would be lost.
        """
        key, model = Path(path).resolve(), self._model  # read once: a task that commits meanwhile must not mix two models
        written = model.save(path, **({"expected": self._digests[key]} if key in self._digests else {}))
        self._digests[key] = model.digest()
        return written

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
        """Reads a model file and goes on from it; it predicts the same to the bit on the same device.

        `backbone` is as for `Model.load`. `method` None takes the one in the file. `memory_budget` is as for `Learner`; it
        belongs to the device and is not in the file. Raises `ModelFileError`.
        """
        seen = file.digest_of(path)  # before it is read: a change in between must stop the next save
        model = Model.load(path, device, backbone=backbone)
        try:
            saved = {"recipe": Recipe.from_dict(model.learning["recipe"]), "seed": model.learning["seed"]}
            learner = cls.of(model, method=method or model.learning["method"], memory_budget=memory_budget, **saved)
        except (KeyError, TypeError) as error:
            raise ModelFileError(f"{path} does not say how it was learnt ({error}); Model.load(path) serves it") from error
        learner._digests[Path(path).resolve()] = seen
        return learner

    def export(
        self,
        path: str | Path,
        quantize: str | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        **options: Any,
    ) -> ExportReport:
        """Writes the current classifier with its preprocessing, checked against the model before it is written.

        See `edge_dfcil.exporting.Exporting` for `quantize` and the options: `calibration`, `evaluation`, `classes`. Raises
        `ExportError` when the file cannot be made or disagrees with the model; nothing is written then.
        """
        work = Exporting(self._model, self._recipe, path, quantize, seed=self._seed_of_task(), **options)
        return self.run(work, callbacks, progress)
