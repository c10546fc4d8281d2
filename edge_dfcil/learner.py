"""Learner: the main class of the package. It has the current model, the settings and one writer lock, and delegates the work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from edge_dfcil import devices
from edge_dfcil.budget import schedule
from edge_dfcil.dreaming.work import Dreaming
from edge_dfcil.errors import ModelFileError, SettingError
from edge_dfcil.exporting import Exporting, ExportOptions
from edge_dfcil.learning import Learning
from edge_dfcil.methods import Method, find_method
from edge_dfcil.model import file
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.model import Model
from edge_dfcil.model.serving import Serving
from edge_dfcil.publishing import Publishing
from edge_dfcil.recipe import DEFAULT, Recipe, find_recipe
from edge_dfcil.results import MemoryPlan, TaskReport
from edge_dfcil.running import LIMITS, RunsSessions
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.session import Session
from exporters import ExportReport
from exporters.texts import shown


class Learner(Serving, RunsSessions, Publishing):
    """Learns new classes task by task without keeping an image (ABD, Smith et al., ICCV 2021). Raises `SettingError` and
    `BackboneError`.

    Parameters
    ----------
    backbone
        A name (`resnet32`, torchvision's `mobilenet_v3_small`, `timm:resnet18`, ...; see `list_backbones`), or an `nn.Module`
        (it is copied) from normalised images (N, 3, S, S) to features (N, F), with at least three BatchNorm layers:
        generated images are made by matching their statistics.
    image_size
        S, the side in pixels that the network sees; images are scaled and cropped to it. None: a `timm:` network's own, or 32.
    method
        `abd`, `lda`, a baseline (`finetune`, `lwf`, `lwf_mc`, `deep_inversion`, `lwf_synthetic`), or a `Method`.
    recipe
        "frozen" (a backbone is trained in the first task, or not at all when it is pretrained; later tasks are one pass),
        "edge" (trained at every task), "strict" (as "frozen", without class statistics), "paper" (as published), or a `Recipe`.
    memory_budget
        The most that a long operation may add to the memory in use when it is called (the process's resident set; on CUDA and
        MPS what torch reserves): bytes, or a string such as "128MB". Memory of a loader is not counted. A plan is made first.
    precision
        "float32", "bfloat16", or "auto": the device's default, or on a CPU the one that a long task measures to be faster. With
        "float32" nothing is measured, and two runs on a CPU are bit-identical; with "auto" if both chose the same (see report).
    device
        "auto" (CUDA, else MPS, else CPU) or a torch device.
    seed
        Of all draws. CPU runs with the same `precision` are bit-identical, unless another thread draws from torch's generator.
    weights
        Pretrained weights of a backbone by name, such as "DEFAULT"; torchvision or timm loads them.
    multiscale
        Whether features come from several scales of the backbone, not only its last layer. None: if the head is closed-form.
    mean, std
        Per-channel statistics to normalise images in [0, 1]. None: those that the weights expect, or measured on the first task.
    """

    def __init__(
        self,
        backbone: str | nn.Module = "resnet32",
        *,
        image_size: int | None = None,
        method: str | Method = "abd",
        recipe: str | Recipe = DEFAULT,
        memory_budget: int | str | None = None,
        precision: str = "auto",
        device: str | torch.device = "auto",
        seed: int = 0,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        multiscale: bool | None = None,
    ) -> None:
        method, recipe = find_method(method), find_recipe(recipe)
        options: Any = {"image_size": image_size, "device": device, "seed": seed, "weights": weights, "mean": mean, "std": std}
        model = Model.new(backbone, multiscale=method.closed_form(recipe) if multiscale is None else multiscale, **options)
        self._settle(model, method, recipe, seed, memory_budget=memory_budget, precision=precision)

    def _settle(self, model: Model, method: Method, recipe: Recipe, seed: int = 0, **limits: Any) -> None:
        self.seed, self._method, self._recipe = devices.check_seed(seed), method, recipe
        self._digests: dict[Path, str | None] = {}  # of model files when they were last read or written, by path
        RunsSessions.__init__(self, **limits)
        self._adopt(model)

    def _adopt(self, model: Model) -> None:
        """Makes a model the current one, with this learner's settings: other threads see the old model or the new one."""
        learning = dict(model.learning) | {"method": self._method.name, "recipe": self._recipe.to_dict(), "seed": self.seed}
        self._model = model.with_learning(learning, self._recipe.augmentation.mirrored_answers)

    @classmethod
    def of(cls, model: Model, *, method: str | Method = "abd", recipe: str | Recipe = DEFAULT, **settings: Any) -> Learner:
        """A learner that continues from a model. `settings` are those of `Learner`: memory_budget, precision, seed."""
        learner = cls.__new__(cls)
        learner._settle(model, find_method(method), find_recipe(recipe), **settings)
        return learner

    def __repr__(self) -> str:
        return f"Learner({self._model!r}, method={self._method.name!r}, recipe={self._recipe.preset!r})"

    @classmethod
    def from_classifier(cls, module: nn.Module, classes: Sequence[str], **options: Any) -> Learner:
        """Adopts a trained classifier; the module is copied, not changed.

        `options` are those of `Model.from_classifier` (image_size, mean, std, head, backbone, device), and of `Learner`
        (method, recipe, memory_budget, precision, seed). Raises `BackboneError`, `ClassError` and `SettingError`."""
        settings = {name: options.pop(name) for name in options.keys() & {"method", "recipe", "seed", *LIMITS}}
        return cls.of(Model.from_classifier(module, classes, **options), **settings)

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

    def learn_task(
        self,
        loader: Any,
        classes: Classes | None = None,
        *,
        relearn: bool = False,
        instant: bool = True,
        time_budget: float | str | None = None,
        checkpoint: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> TaskReport:
        """Learns the classes of a loader and keeps those known before. All or nothing: until a commit, and after an error or
        Ctrl-C, the old model answers. Parameters and errors are those of `session`; a checkpoint is removed at the end."""
        options: Any = {"relearn": relearn, "instant": instant, "time_budget": time_budget, "checkpoint": checkpoint}
        session = self.session(loader, classes, callbacks=callbacks, progress=progress, **options)
        while (report := session.run()) is None:  # a callback has paused it, and nothing here could resume it later
            pass
        session.clear_checkpoint()
        return report

    def session(
        self,
        loader: Any,
        classes: Classes | None = None,
        *,
        relearn: bool = False,
        instant: bool = True,
        time_budget: float | str | None = None,
        checkpoint: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Session[TaskReport]:
        """A session that learns a task, and can be paused, saved (`state_dict`) and resumed; `run()` learns and commits.

        `run()` raises what the loader raises, `DataError` and `ClassError` for images, targets or names that cannot be learnt,
        `BudgetError` when the memory budget cannot be kept, `DivergedError` when a loss is not finite, and `Cancelled`.

        Parameters
        ----------
        loader
            Anything that can be iterated over repeatedly (a DataLoader, a list) and yields pairs of images (N, 3, H, W), uint8
            or float in [0, 1], and targets (N,), or dicts of these: the real half of each step. It is checked in one pass before
            training, and never read after the task has ended.
        classes
            Names by target value: a list, or a mapping. None takes `loader.dataset.classes`.
        relearn
            Whether classes that are already known are refreshed with these images; otherwise they raise `ClassError`.
        instant
            Whether a task that trains the network first commits head rows from class statistics, within seconds, if its method
            can; `on_commit` is then called. They stay if the adapted model is expected to be worse, or if time runs out.
        time_budget
            Seconds, or a string such as "10min": by the measured speed of a step, the schedule gets fewer steps, so that the
            whole of it ends in time. The report gives the fitted schedule.
        checkpoint
            A file that is written every few seconds. After a kill, the same call continues from it, to the same weights on the
            same CPU. It contains no image; dreams are generated again. `run()` does not remove it: see `clear_checkpoint()`.
        callbacks, progress
            Hooks; and whether to show progress on stderr, if it is a terminal, or in a notebook.
        """
        before, seconds = self._model, schedule.parse(time_budget)

        def commit(model: Model) -> None:
            nonlocal before
            if self._model is not before:
                raise SettingError("the learner has another model than when this session was made; make a new session")
            self._model = before = model

        work = self._learning(loader, classes, relearn=relearn, instant=instant, seconds=seconds, learner=self, commit=commit)
        limits: Any = {"checkpoint": checkpoint, "deadline": seconds}
        return self._new_session(work, callbacks, progress, writes=True, seed=self._seed_of_task(), **limits)

    def _learning(self, loader: Any, classes: Classes | None, **options: Any) -> Learning:
        options |= {**self.limits, "smaller": lambda: self._model.smaller(self.seed)}
        return Learning(self._model, self._method, self._recipe, loader, classes, **options)

    def plan(self, loader: Any, classes: Classes | None = None, *, relearn: bool = False, progress: bool = True) -> MemoryPlan:
        """How `learn_task` would keep the memory budget, by a rehearsal of a few steps; nothing is learnt.

        `loader` is as for `session`, or one batch of it. Raises `BudgetError`, and what `session` raises for its loader."""
        loader = [loader] if isinstance(loader, tuple) and len(loader) == 2 else loader
        work = self._learning(loader, classes, relearn=relearn, plan_only=True)
        self._new_session(work, (), progress, writes=True, seed=self._seed_of_task()).run()
        assert work.plan is not None
        return work.plan

    def with_model(self, model: Model) -> Learner:
        """A learner with another model and the same settings."""
        return Learner.of(model, method=self._method, recipe=self._recipe, seed=self.seed, **self.limits)

    def _seed_of_task(self) -> int:
        return self.seed * 1009 + len(self.tasks)

    def dream(
        self,
        n: int,
        classes: Sequence[str] | None = None,
        *,
        quality: Literal["fast", "best"] = "fast",
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Tensor:
        """Images (n, 3, S, S), uint8, of what the model remembers, sorted by class; fewer if a class is rarely generated.

        `classes` are names, an even share each; None takes all. `quality` "fast" trains a fresh generator (ABD), "best"
        optimises the pixels of every image (DeepInversion). Raises `ClassError` for a name that is not known,
        `NotLearnedError` before the first task, `DivergedError` when no generated image is of the classes asked for."""
        return self.run(Dreaming(self._model, self._recipe, n, classes, quality), callbacks, progress, seed=self._seed_of_task())

    def _replace(self, model: Model) -> None:
        with self._write_lock():
            self._model = model

    def save(self, path: str | Path) -> Path:
        """Writes the current model to one file, all or nothing. Raises `ModelFileError` when that fails, and when another
        process has changed the file since this learner last read or wrote it."""
        key, model = file.resolved(path), self._model  # read once: a task that commits during the call must not mix two models
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
        precision: str = "auto",
    ) -> Learner:
        """Reads a model file and continues from it; `backbone` is as for `Model.load`. `method` None takes the file's;
        `memory_budget` and `precision` belong to the device and are not in it. Raises `ModelFileError`."""
        seen = file.digest_of(path)  # before it is read: a change in between must stop the next save
        model = Model.load(path, device, backbone=backbone)
        given = None if method is None else find_method(method)
        try:
            found = given or find_method(model.learning["method"])
            recipe, seed = Recipe.from_dict(model.learning["recipe"]), devices.check_seed(model.learning["seed"])
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            reason = shown(error)[:300]
            raise ModelFileError(f"{path} does not say how it was learnt ({reason}); Model.load(path) can open it") from error
        learner = cls.of(model, method=found, recipe=recipe, seed=seed, memory_budget=memory_budget, precision=precision)
        learner._digests[file.resolved(path)] = seen
        return learner

    def export(
        self,
        path: str | Path,
        quantize: str | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
        **options: Unpack[ExportOptions],
    ) -> ExportReport:
        """Writes the current classifier with its preprocessing, checked against the model before it is written.

        `quantize` and the options are those of `edge_dfcil.exporting.Exporting`. Raises `ExportError` when the file cannot be
        made or disagrees with the model; nothing is written then."""
        work = Exporting(self._model, self._recipe, path, quantize, seed=self._seed_of_task(), **options)
        return self.run(work, callbacks, progress, seed=self._seed_of_task())
