"""The actions of the page, without HTTP: one learner, the task that is being collected, and one long operation at a time."""

from __future__ import annotations

import base64
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demos.teach.feed import Feed
from demos.teach.kept import by_role
from demos.teach.measuring import Measured
from demos.teach.pictures import Ready, decode, square
from edge_dfcil import Callback, Cancelled, ClassError, Commit, DataError, EdgeDfcilError, Learner, Model
from edge_dfcil.demo import Batches

logger = logging.getLogger("edge_dfcil.teach")

MAX_CLASSES = 20  # of one task
MAX_PICTURES = 600  # of one task, of the page's own classes
MAX_NAME = 60  # characters
DREAMS_FOR_ONE = 4  # generated for each one that is shown: some classes are generated rarely
BATCH = 32


class Busy(Exception):
    """A long operation is already running."""


@dataclass
class Job:
    """The long operation that is running, as the page shows it.

    Attributes
    ----------
    kind
        "teach", "dream" or "export".
    names
        The classes that it handles.
    stage, step, steps
        The current stage and step, and the number of steps: "" before the first stage, 0 steps if the number is not known.
    done
        Stages that have ended.
    commits
        Kinds of the commits so far: "instant", "adapted".
    """

    kind: str
    names: tuple[str, ...] = ()
    stage: str = ""
    step: int = 0
    steps: int = 0
    done: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def to_dict(self) -> dict[str, Any]:
        shown = ("kind", "names", "stage", "step", "steps", "done", "commits")
        values = {name: getattr(self, name) for name in shown}
        return values | {"seconds": time.monotonic() - self.began, "cancelling": self.cancelled.is_set()}


class Watch(Callback):
    """Writes a session's progress to a job, and ends the session when the job is cancelled."""

    def __init__(self, job: Job, changed: Callable[[], None], committed: Callable[[str], None]) -> None:
        self._job, self._changed, self._committed = job, changed, committed

    def on_plan_begin(self) -> None:
        self._job.stage, self._job.step, self._job.steps = "plan", 0, 0
        self._changed()

    def on_stage_begin(self, stage: Any) -> None:
        self._job.stage, self._job.step, self._job.steps = stage.name, 0, stage.steps
        self._changed()

    def on_step_end(self, stage: Any, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        if self._job.cancelled.is_set():
            raise Cancelled("cancelled; the model is that of the last commit")
        self._job.step = step
        self._changed()

    def on_stage_end(self, stage: Any, report: Any) -> None:
        self._job.done.append(stage.name)
        self._changed()

    def on_commit(self, commit: Commit) -> None:
        self._job.commits.append(commit.kind)
        self._committed(commit.kind)


class Teacher:
    """A learner as the page uses it. Its methods may be called from any thread.

    Pictures of the page's own classes are kept, scaled to the model's size, until their task has been learnt, is cancelled or is
    discarded. Nothing else of them is kept: neither the file nor its name.

    Parameters
    ----------
    learner
        The learner that is taught.
    ready
        Pictures that come with the server.
    """

    def __init__(self, learner: Learner, ready: Ready | None = None) -> None:
        self.learner = learner
        self._ready = ready if ready is not None else Ready()
        self.feed = Feed(self.state)
        self._lock = threading.RLock()
        self._draft: dict[str, list[Tensor]] = {}
        self._job: Job | None = None
        self._session: Any = None  # of the job, if it is a task
        self._outcome: dict[str, str] | None = None
        self._seen, self._version = learner.model, 0  # a number that changes whenever the model's answers change
        self._measured = Measured(self._ready.test)
        self._folder = tempfile.TemporaryDirectory(prefix="edge-dfcil-teach-", ignore_cleanup_errors=True)
        self._exported: int | None = None  # the version of the model in the ONNX file

    # The state that the page shows

    def state(self) -> dict[str, Any]:
        """Everything that the page shows, as a JSON object."""
        with self._lock:
            # Before the model: a reader that sees a commit must also find its classes.
            job = self._job.to_dict() if self._job is not None else None
            model, version = self._current()
            known = model.classes
            return {
                "version": version,
                "model": {
                    "backbone": model.architecture,
                    "image_size": model.image_size,
                    "pretrained": model.pretrained,
                    "can_adapt": self._can_adapt,
                },
                "classes": known,
                "tasks": model.tasks,
                "ready": {
                    "title": self._ready.title,
                    "classes": [{"name": n, "count": len(i)} for n, i in self._ready.train.items() if n not in known],
                    "samples": self._measured.has_samples,
                },
                "draft": [{"name": name, "count": len(images)} for name, images in self._draft.items()],
                "job": job,
                "outcome": self._outcome,
                "history": self._measured.history,
                "kept": by_role(model),
                "held": {
                    "task": _size(self._draft.values()),
                    "ready": _size([*self._ready.train.values(), *self._ready.test.values()]),
                },
                "exported": self._exported == version,
            }

    # Collecting a task

    def add_picture(self, name: str, content: bytes) -> int:
        """Adds a picture to a class of the task that is being collected, and returns how many pictures the class has now.

        Raises `DataError` if it is not a picture or exceeds the limits of a task, `ClassError` for a name that cannot be used,
        `Busy` while something runs.
        """
        name = _clean(name)
        if name in self.learner.classes:
            raise ClassError(f"{name!r} is already known; choose another name, or forget that class first")
        if name in self._ready.train:
            raise ClassError(f"{name!r} is the name of a class with ready pictures; choose another name")
        image = square(content, self.learner.image_size)
        with self._lock:
            self._check_idle()
            if name not in self._draft and len(self._draft) >= MAX_CLASSES:
                raise DataError(f"a task takes at most {MAX_CLASSES} classes here; teach these first")
            if sum(map(len, self._draft.values())) >= MAX_PICTURES:
                raise DataError(f"a task takes at most {MAX_PICTURES} pictures here; teach these first")
            self._draft.setdefault(name, []).append(image)
            count = len(self._draft[name])
        self.feed.notify()
        return count

    def discard(self, name: str) -> None:
        """Discards a collected class. Raises `ClassError` if there is none of that name, `Busy` while something runs."""
        with self._lock:
            self._check_idle()
            if self._draft.pop(name, None) is None:
                raise ClassError(f"no pictures of {name!r} have been collected; add some first")
        self.feed.notify()

    # Teaching

    def teach(self, ready: Sequence[str] = (), adapt: bool = False) -> None:
        """Starts to learn the collected classes and some ready ones as one task, in a thread of its own.

        `adapt` trains the network after an instant commit; otherwise a later task is one pass over its pictures. Raises
        `DataError` if there is no class, `ClassError` for a name that is not ready, `Busy` while something else runs. A later
        error is stored in the state's `outcome`.
        """
        with self._lock:
            self._check_idle()
            if missing := [name for name in ready if name not in self._ready.train]:
                raise ClassError(f"no pictures of {missing[0]!r} are ready; choose a ready class, or add pictures of your own")
            images = {name: torch.stack(own) for name, own in self._draft.items()}
            images |= {name: self._ready.train[name] for name in ready}
            if not images:
                raise DataError("there is no class to teach; choose a ready one, or add pictures of your own")
            names = tuple(images)
            self._set_adapting(adapt)
            job = Job("teach", names)
            watch = Watch(job, self.feed.notify, self._on_commit)
            self._session = self.learner.session(_batches(images), names, callbacks=[watch], progress=False)
            self._measured.taught = tuple(ready)
            self._begin(job)
        threading.Thread(target=self._run_task, args=(self._session, job), daemon=True).start()

    @property
    def _can_adapt(self) -> bool:
        """Whether adapting is optional in the recipe: with a closed-form head the network need not be trained."""
        return self.learner.recipe.refine.head == "lda"

    def _set_adapting(self, adapt: bool) -> None:
        if self._can_adapt:
            self._current()
            self.learner.recipe = self.learner.recipe.changed({"schedule.adapt": "always" if adapt else "first"})
            self._seen = self.learner.model  # other settings, the same answers

    def _run_task(self, session: Any, job: Job) -> None:
        try:
            with self._reported():
                report = session.run()
                seconds = ", ".join(f"{commit.kind} after {commit.seconds:.1f} s" for commit in report.commits)
                self._outcome = {"kind": "done", "text": f"Learnt {', '.join(job.names)} ({seconds})."}
        finally:
            # After an error the pictures are kept for another try; after a commit or a cancel they are discarded.
            keep_draft = self._outcome is not None and self._outcome["kind"] == "error" and not job.commits
            with self._lock:
                if not keep_draft:
                    self._draft.clear()
            self._end()

    def _on_commit(self, kind: str) -> None:
        self._model_changed(kind if len(self.learner.tasks) > 1 else "learnt")

    def cancel(self) -> None:
        """Ends the running operation at its next step. Commits already made are kept. Does nothing if nothing runs."""
        with self._lock:
            if self._job is not None:
                self._job.cancelled.set()
            if self._session is not None:
                self._session.cancel()
        self.feed.notify()

    # Using and changing the model

    def predict(self, content: bytes) -> dict[str, Any]:
        """The answer for a picture: `probabilities` of `classes`, `label` (None: of no known class), and `version`."""
        picture = decode(content)
        model, version = self._current()
        prediction = model.predict(picture, reject=bool(model.thresholds))[0]
        return {
            "version": version,
            "classes": model.classes,
            "probabilities": model.probabilities(picture)[0].tolist(),
            "label": prediction.label,
        }

    def sample(self) -> tuple[str, bytes]:
        """The name of a known class, and a held-back picture of it, as PNG. Raises `DataError` if there is none."""
        return self._measured.sample()

    def forget(self, name: str) -> None:
        """Forgets a class. Raises `ClassError` for an unknown name and for the last class, `Busy` while something runs."""
        with self._lock:
            self._check_idle()
            self.learner.forget(name)
            self._measured.forget(name)
        self._model_changed(f"forgot {name}")

    def rename(self, old: str, new: str) -> None:
        """Renames a class. Raises `ClassError` for a name that is unknown or cannot be used, `Busy` while something runs."""
        with self._lock:
            self._check_idle()
            new = _clean(new)
            self.learner.rename({old: new})
            self._measured.rename(old, new)
        self.feed.notify()

    def dream(self, per_class: int) -> list[dict[str, Any]]:
        """Generated images of each class: `name`, and `images`, each as base64 of uint8 RGB (S, S, 3). None is kept.

        A class that the generator rarely produces has fewer images, or none. Raises `NotLearnedError` before the first task,
        `Cancelled`, `Busy` while something else runs.
        """
        with self._running(Job("dream", self.learner.classes)) as job:
            learner = self.learner.with_model(self.learner.model)  # a separate learner, which learns no task
            watch = Watch(job, self.feed.notify, lambda kind: None)
            n = DREAMS_FOR_ONE * per_class * max(1, len(learner.classes))
            images = learner.dream(n, callbacks=[watch], progress=False)
            labels = [prediction.label for prediction in learner.predict(images)]
        found: dict[str | None, list[str]] = {name: [] for name in learner.classes}
        for image, label in zip(images, labels, strict=True):
            found[label].append(_pixels(image))
        return [{"name": name, "images": some[:per_class]} for name, some in found.items()]

    # Files

    def export(self) -> int:
        """Writes the ONNX file of the current model, unless it exists already, and returns the model's version.

        It takes pictures of any size and has been checked against the model. Raises `NotLearnedError`, `ExportError` and `Busy`.
        """
        if not self.is_exported:
            with self._running(Job("export")):
                model, version = self._current()
                self.learner.with_model(model).export(self.onnx_path, input="any", progress=False)
                self._exported = version
        return self._current()[1]

    @property
    def onnx_path(self) -> Path:
        return Path(self._folder.name) / "model.onnx"

    @property
    def is_exported(self) -> bool:
        """Whether the ONNX file belongs to the current model."""
        return self._exported == self._current()[1]

    def saved(self) -> Path:
        """Writes the current model to a model file, and returns its path. Raises `ModelFileError` if that fails."""
        return self.learner.model.save(Path(self._folder.name) / "model.safetensors")

    def close(self) -> None:
        """Ends the running operation and removes the files."""
        self.cancel()
        self._folder.cleanup()

    # One long operation at a time

    def _check_idle(self) -> None:
        if self._job is not None:
            doing = {"teach": "the model is being taught", "dream": "dreams are being made", "export": "the file is being made"}
            raise Busy(f"{doing[self._job.kind]}; wait for it, or cancel it")

    def _begin(self, job: Job) -> None:
        self._check_idle()
        self._job, self._outcome = job, None
        self.feed.notify()

    def _end(self) -> None:
        with self._lock:
            self._job = self._session = None
        self.feed.notify()

    @contextmanager
    def _running(self, job: Job) -> Iterator[Job]:
        with self._lock:
            self._begin(job)
        try:
            yield job
        finally:
            self._end()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Stores the message of an error as the sentence that the page shows."""
        try:
            yield
        except Cancelled as error:
            self._outcome = {"kind": "cancelled", "text": str(error)}
        except EdgeDfcilError as error:
            self._outcome = {"kind": "error", "text": str(error)}
        except Exception:
            logger.exception("a task has failed")
            self._outcome = {
                "kind": "error",
                "text": "the task has failed; the cause is in the server's log. The model is that of the last commit",
            }

    def _current(self) -> tuple[Model, int]:
        """The model that answers, and its version."""
        with self._lock:
            if self.learner.model is not self._seen:
                self._seen, self._version = self.learner.model, self._version + 1
            return self._seen, self._version

    def _model_changed(self, label: str) -> None:
        self._measured.measure(self.learner.model, label)
        self.feed.notify()


def _clean(name: str) -> str:
    """A class name with single spaces inside and none at its ends. Raises `ClassError` for a name that cannot be used."""
    name = " ".join(name.split())
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ClassError(f"{name[:MAX_NAME]!r} cannot name a class; use 1 to {MAX_NAME} characters that can be printed")
    return name


def _batches(images: Mapping[str, Tensor]) -> Batches:
    """All images in shuffled batches, with the position of their class's name as target."""
    targets = [torch.full((len(own),), place) for place, own in enumerate(images.values())]
    return Batches(torch.cat(list(images.values())), torch.cat(targets), BATCH)


def _pixels(image: Tensor) -> str:
    return base64.b64encode(image.permute(1, 2, 0).numpy().tobytes()).decode()


def _size(pictures: Iterable[Sequence[Tensor] | Tensor]) -> dict[str, int]:
    """The number of the pictures of all classes, and their bytes."""
    found = list(pictures)
    bytes_ = sum(image.numel() for images in found for image in images)
    return {"pictures": sum(map(len, found)), "bytes": bytes_}
