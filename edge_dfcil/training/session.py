"""Session: one long operation, from its first stage to its result. It can be cancelled, paused, saved and resumed.

A `Work` defines what is done; a session has its progress: the stage, the step, the optimizer, the random state, the deadline.
A checkpoint contains this and the weights of the network that is learning, and nothing else: no image, no feature and no
generated image. Stages that generate images are run again, from the same random state.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from edge_dfcil import devices
from edge_dfcil.errors import Cancelled, EdgeDfcilError, ModelFileError, SettingError
from edge_dfcil.model import file
from edge_dfcil.privacy.traces import overwritten
from edge_dfcil.results import MemoryPlan, StageReport
from edge_dfcil.training import loop
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.rehearsal import Rehearsal
from edge_dfcil.training.stage import Stage, StageSpec, StageState
from exporters.texts import shown

logger = logging.getLogger("edge_dfcil")

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)

CHECKPOINT_EVERY = 2.0  # seconds between two checkpoints, at least
CHECKPOINT_SHARE = 0.02  # of the time may be spent on writing them


class Enough(Exception):
    """Ends the stages of a work that already has a result."""


class Work(Protocol[Result_co]):
    """What a session does.

    Attributes
    ----------
    network
        The network that resumable stages train; its weights are in a checkpoint. None where no stage is resumable.
    """

    network: nn.Module | None

    def context(self, session: Session[Any]) -> contextlib.AbstractContextManager[object]:
        """Entered while the session runs."""

    def prepare(self, session: Session[Any]) -> None:
        """Checks the input, before a checkpoint is compared with it. Raises for input that cannot be used."""

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        """The stages in order, each made when the one before has been run.

        Making a stage may draw random numbers and read what earlier stages have left in memory, but not the weights of
        `network`: a session that resumes has those of a later step.
        """

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> Result_co:
        """The result, committed, after the last stage."""

    def close(self) -> None:
        """Releases what the work has read and made, after `finish`: a caller may keep the session, and with it the work."""

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed: the model, the settings, the numbers of images."""

    def decided(self) -> dict[str, Any]:
        """What has been measured and decided before the first stage, as JSON; a session that resumes gets it back."""

    def restore(self, decided: Mapping[str, Any]) -> None:
        """The inverse of `decided`, called before `stages`."""


class PlainWork:
    """Base of works that cannot be resumed in another process: they have no network to save."""

    network: nn.Module | None = None

    def context(self, session: Session[Any]) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def prepare(self, session: Session[Any]) -> None:
        """There is no input to check."""

    def close(self) -> None:
        """Drops every attribute: each may hold an image, a feature or a network."""
        vars(self).clear()

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def decided(self) -> dict[str, Any]:
        return {}

    def restore(self, decided: Mapping[str, Any]) -> None:
        """Nothing was decided."""

    # For the planner

    def smaller(self) -> Sequence[dict[str, int]]:
        return [{}]

    def rehearsal(self, changes: Mapping[str, int]) -> Rehearsal:
        """Nothing to plan: it has no stages."""
        return Rehearsal(iter(()))

    def keep_to(self, plan: MemoryPlan) -> None:
        """Applies a plan's changes of the recipe and its micro-batches; called before `stages` if there is a memory budget."""


class _Paused(Exception):
    """Leaves the loop between two steps."""


class Session(Generic[Result]):
    """One long operation.

    Parameters
    ----------
    work
        The operation.
    device, seed
        Where it runs, and the seed of all its draws.
    callbacks
        Called while it runs.
    checkpoint
        A file that is written every `checkpoint_every` seconds (0: at every step), or less often if writing is slow, and from
        which an interrupted session continues; None writes none. `clear_checkpoint` removes it. Whether it can be written is
        checked at the start; if the disk fills up later, the session continues without a new one, and logs a warning.
    deadline
        Seconds that `run` may take in all: then it finishes with what has been learnt, as after `finish_now()`.
    guard
        Returns a context manager, for example a lock, that is entered while the session runs.

    Attributes
    ----------
    result
        What `run` returned; None before.
    """

    def __init__(
        self,
        work: Work[Result],
        *,
        device: torch.device,
        seed: int,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | Path | None = None,
        checkpoint_every: float = CHECKPOINT_EVERY,
        deadline: float | None = None,
        guard: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        if checkpoint is not None and not isinstance(checkpoint, (str, Path)):
            raise SettingError(
                f"checkpoint={checkpoint!a:.80} is a {type(checkpoint).__name__}; pass the path of a file, or None"
            )
        self.work, self.device, self.callbacks, self.deadline = work, device, callbacks, deadline
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        self.result: Result | None = None
        self.resumed = False
        self.checkpoint_every, self.guard = checkpoint_every, guard
        self._cancelled, self._paused, self._finishing = threading.Event(), threading.Event(), threading.Event()
        with devices.seeded(seed, device):
            self._random = devices.random_state(device)
        self._stages: Iterator[Stage] | None = None
        self._stage: Stage | None = None
        self._state: StageState | None = None
        self._reports: list[StageReport] = []
        self._randoms: list[dict[str, Tensor]] = []  # after each finished stage
        self._loaded: dict[str, Any] | None = None
        self._tensors: Mapping[str, Tensor] = {}
        self._written, self._write_seconds, self._spent = 0.0, 0.0, 0.0
        self._running, self._began = False, 0.0
        self._warned = False  # whether the log says that the checkpoint cannot be written
        self._announced = False  # whether `on_plan_begin` has been called
        self._begun: dict[str, Tensor] | None = None  # the random state before a closed-form stage
        self.has_result = False  # whether the work has committed something, and may end at any time
        self._network_done = False  # whether a stage that trains the network has ended

    # Control, from any thread or callback

    def cancel(self) -> None:
        """Stops at the next step; `run` raises `Cancelled` and nothing is committed. A checkpoint stays."""
        self._cancelled.set()

    def pause(self) -> None:
        """Stops at the next step; `run` returns None, and continues when it is called again."""
        self._paused.set()

    def finish_now(self) -> None:
        """Finishes with what has been learnt: training stages end at the next step, closed-form stages are run.

        Before the network's first step there is nothing to finish with, and `run` raises `Cancelled`.
        """
        self._finishing.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()

    @property
    def reports(self) -> Sequence[StageReport]:
        """The reports of the stages that have ended."""
        return self._reports

    @property
    def seconds(self) -> float:
        """Time spent in `run`, including the process from which this session was resumed."""
        return self._spent + (time.perf_counter() - self._began if self._running else 0.0)

    def check(self) -> None:
        """Called between steps: raises when the session is to stop, and writes a checkpoint when one is due."""
        if self._cancelled.is_set():
            raise Cancelled("the session was cancelled; the model is that of the last commit")
        if self._paused.is_set():
            raise _Paused
        if self.deadline is not None and self.seconds >= self.deadline:
            self._finishing.set()
        if self._finishing.is_set() and isinstance(self._stage, StageSpec):
            if self._has_learnt():
                raise loop.StageEnded
            if self.has_result:
                raise Enough
            if self.deadline is None:
                raise Cancelled("there is nothing to finish with: the network has made no step; nothing was committed")
        if self.checkpoint is not None and self._resumable():
            now = time.perf_counter()
            share = self._write_seconds / CHECKPOINT_SHARE if self.checkpoint_every else 0.0
            if now - self._written >= max(self.checkpoint_every, share):
                self._try_checkpoint()

    def _has_learnt(self) -> bool:
        return self._network_done or (self._resumable() and self._state is not None and self._state.step > 0)

    def _resumable(self) -> bool:
        return isinstance(self._stage, StageSpec) and self._stage.resumable

    def announce_plan(self) -> None:
        """Calls `on_plan_begin`, once per session: a work calls this before the first decision that takes time."""
        if not self._announced:
            self._announced = True
            for callback in self.callbacks:
                callback.on_plan_begin()

    # Running

    def run(self) -> Result | None:
        """Runs to the end and returns the result, or None when it was paused.

        Raises what a stage raises; the session then cannot continue, and nothing has been committed.
        """
        if self.result is not None:
            return self.result
        self._paused.clear()
        with contextlib.ExitStack() as stack:
            if self.guard is not None:
                stack.enter_context(self.guard())
            for callback in self.callbacks:
                stack.callback(lambda callback: callback.on_exit(), callback)
            self._running, self._began = True, time.perf_counter()
            stack.callback(self._stop_clock)
            with devices.own_context(self.device), self.work.context(self), overwritten():
                devices.set_random_state(self._random, self.device)
                try:
                    with contextlib.suppress(Enough):
                        self._run_stages()
                    self.result = self.work.finish(self, self._reports)
                    self._stages = None  # the generator refers to what its stages have made
                    self.work.close()
                except _Paused:
                    logger.info("paused in stage %s", self._stage.name if self._stage else "")
                finally:
                    self._random = devices.random_state(self.device)
        return self.result

    def _stop_clock(self) -> None:
        self._spent, self._running = self.seconds, False

    def _run_stages(self) -> None:
        if self._stages is None:
            if self.checkpoint is not None:
                file.check_writable(self.checkpoint)
            self.work.prepare(self)
            if self._loaded is None and self.checkpoint is not None:
                self._load_checkpoint()
            if self._loaded is not None:
                self._check_loaded()
                with self._trusting():
                    self.work.restore(self._loaded["decided"])
            self._stages = self.work.stages(self)
        while (stage := self._stage or next(self._stages, None)) is not None:
            self._stage = stage
            self._reports.append(self._run_stage(stage))
            self._randoms.append(devices.random_state(self.device))
            trained = self._resumable()
            self._network_done = self._network_done or trained
            self._stage = self._state = self._begun = None
            if trained and self.checkpoint is not None and self._loaded is None:
                self._try_checkpoint()

    def _run_stage(self, stage: Stage) -> StageReport:
        if not isinstance(stage, StageSpec):
            # After an interruption it is run again from its start, with the same random numbers.
            self._begun = self._begun or devices.random_state(self.device)
            devices.set_random_state(self._begun, self.device)
            return loop.run(stage, self.device, self.callbacks, self.check)
        number = len(self._reports)
        if self._loaded is not None and stage.resumable:
            with self._trusting():
                self._load_network()
                done = self._loaded["reports"]
                if number < len(done):  # the loaded weights are from its end, or from later
                    devices.set_random_state(self._random_of("after", number), self.device)
                    return _report(done[number])
                self._state = self._load_state(stage)
                self._loaded = None
        if self._state is None:
            self._state = StageState.at_start(stage)
        logger.info("stage %s: %d steps, at step %d", stage.name, stage.steps, self._state.step)
        return loop.fit(stage, self.device, self.callbacks, self.check, self._state)

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """The session's progress: `{"position": JSON, "tensors": {name: tensor}}`; the tensors are copies on the CPU."""
        stage, state = self._stage, self._state
        position: dict[str, Any] = {
            "fingerprint": self.work.fingerprint(),
            "decided": self.work.decided(),
            "reports": [asdict(report) for report in self._reports],
            "seconds": self.seconds,
            "stage": None,
        }
        now = devices.random_state(self.device) if self._running else self._random
        tensors = {f"random.now.{name}": value for name, value in now.items()}
        for number, random in enumerate(self._randoms):
            tensors |= {f"random.after{number}.{name}": value for name, value in random.items()}
        if self.work.network is not None:
            tensors |= {f"network.{name}": value for name, value in self.work.network.state_dict().items()}
        if stage is not None and state is not None and self._resumable():
            position["stage"], found = _packed(stage.name, state)
            tensors |= found
        return {"position": position, "tensors": {name: value.detach().cpu().clone() for name, value in tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Makes `run` continue from a `state_dict()`, which must be of the same model, settings and images.

        Raises `SettingError` when the session has been started; `run` raises it when the state is of another operation.
        """
        if self._stages is not None:
            raise SettingError("this session has been started; make a new one and load the state into it")
        position = state["position"]
        self._loaded, self._tensors = dict(position), dict(state["tensors"])
        self._spent, self.resumed = position["seconds"], True

    def _check_loaded(self) -> None:
        """Raises `SettingError` when what was loaded is of another operation."""
        assert self._loaded is not None
        ours, theirs = json.loads(json.dumps(self.work.fingerprint())), self._loaded["fingerprint"]
        other = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if other:
            raise SettingError(f"the state is of an operation with another {', '.join(other)}; start again without it")

    def save_checkpoint(self) -> None:
        """Writes the checkpoint now. Raises `ModelFileError` when it cannot be written."""
        assert self.checkpoint is not None
        begin, state = time.perf_counter(), self.state_dict()
        file.write(self.checkpoint, state["tensors"], state["position"], kind="checkpoint")
        self._written = time.perf_counter()
        self._write_seconds = self._written - begin

    def _try_checkpoint(self) -> None:
        """Writes the checkpoint if possible: a disk that fills up during the session must not end it."""
        try:
            self.save_checkpoint()
            self._warned = False
        except ModelFileError as error:
            self._written = time.perf_counter()
            if not self._warned:
                logger.warning("the session continues without a new checkpoint: %s", error)
            self._warned = True

    def _load_checkpoint(self) -> None:
        """Continues from the checkpoint, if there is one of this operation; any other is ignored."""
        assert self.checkpoint is not None
        if not self.checkpoint.exists():
            return
        try:
            tensors, position = file.read(self.checkpoint, kind="checkpoint")
            _check_position(position, tensors)
            self.load_state_dict({"position": position, "tensors": tensors})
            self._check_loaded()
            logger.info("resuming from %s", self.checkpoint)
        except (ModelFileError, SettingError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._loaded, self._tensors, self._spent, self.resumed = None, {}, 0.0, False
            logger.warning("%s is not resumed: %s", self.checkpoint, error)

    def clear_checkpoint(self) -> None:
        """Removes the checkpoint; call it once the result is saved."""
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)

    # Resuming

    @contextlib.contextmanager
    def _trusting(self) -> Iterator[None]:
        """Turns errors into `ModelFileError`: a state of the right operation that cannot be continued from was modified."""
        try:
            yield
        except EdgeDfcilError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, ArithmeticError) as error:
            where = "the state" if self.checkpoint is None else self.checkpoint
            reason = shown(" ".join(str(error).split()))[:200]
            raise ModelFileError(f"{where} cannot be continued from ({reason}); remove it to start again") from error

    def _random_of(self, which: str, number: int | None = None) -> dict[str, Tensor]:
        prefix = f"random.{which}{'' if number is None else number}."
        return {name.removeprefix(prefix): value for name, value in self._tensors.items() if name.startswith(prefix)}

    def _load_network(self) -> None:
        assert self.work.network is not None
        self.work.network.load_state_dict(
            {name.removeprefix("network."): value for name, value in self._tensors.items() if name.startswith("network.")}
        )

    def _load_state(self, stage: StageSpec) -> StageState:
        """The progress of the stage; its start, if the checkpoint was written between two stages."""
        assert self._loaded is not None
        state, position = StageState.at_start(stage), self._loaded["stage"]
        if position is not None:
            devices.set_random_state(self._random_of("now"), self.device)
            _unpack(state, position, self._tensors)
        return state


def _check_position(position: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raises `SettingError` unless a checkpoint's JSON has the types that `state_dict` gives, and its weights are finite."""
    kinds: dict[str, Any] = {"fingerprint": dict, "decided": dict, "reports": list, "seconds": (int, float)}
    for name, kind in kinds.items():
        if not isinstance(position[name], kind):
            raise SettingError(f"its {name!r} cannot be {ascii(position[name])[:80]}")
    if not 0 <= position["seconds"] < 1e12:
        raise SettingError(f"its seconds are {position['seconds']}")
    for values in position["reports"]:
        _report(values)
    stage = position["stage"]
    counts = ("step", "consumed", "halvings", "images")
    if stage is not None and not all(type(stage[name]) is int and 0 <= stage[name] < 2**53 for name in counts):
        raise SettingError(f"its stage counts {[ascii(stage[name])[:20] for name in counts]}, which must be whole numbers")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SettingError(f"{name!a} contains NaN or infinite numbers")


def _packed(name: str, state: StageState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A stage's state as JSON and tensors."""
    assert state.optimizer is not None
    position: dict[str, Any] = {
        "name": name,
        "sums": {key: float(value) for key, value in state.sums.items()},
        "losses": {key: float(value) for key, value in state.losses.items()},
        "scheduler": _plain(state.scheduler.state_dict()) if state.scheduler is not None else None,
    }
    for field in ("step", "consumed", "micro_batch", "halvings", "images", "seconds", "history"):
        position[field] = getattr(state, field)
    tensors = {f"pass.{key}": value for key, value in state.pass_random.items()}
    optimizer = state.optimizer.state_dict()
    position["groups"] = [_plain(group) for group in optimizer["param_groups"]]
    position["numbers"] = {}
    for index, values in optimizer["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                position["numbers"].setdefault(str(index), {})[key] = value
    return position, tensors


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer or scheduler that JSON can represent; their constructors set the rest."""
    kinds = (int, float, str, bool, list, tuple, type(None))
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if isinstance(value, kinds) and key not in ("_initial_step",)
    }


def _unpack(state: StageState, position: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    assert state.optimizer is not None
    for field in ("step", "consumed", "micro_batch", "halvings", "images", "seconds"):
        setattr(state, field, position[field])
    state.history, state.sums = list(position["history"]), dict(position["sums"])
    state.losses = {key: torch.tensor(value) for key, value in position["losses"].items()}
    state.pass_random = {key.removeprefix("pass."): value for key, value in tensors.items() if key.startswith("pass.")}
    saved: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            saved.setdefault(int(index), {})[key] = value
    for index, values in position["numbers"].items():
        saved.setdefault(int(index), {}).update(values)
    groups = [
        {**group, **loaded}
        for group, loaded in zip(state.optimizer.state_dict()["param_groups"], position["groups"], strict=True)
    ]
    state.optimizer.load_state_dict({"state": saved, "param_groups": groups})
    if state.scheduler is not None:
        state.scheduler.load_state_dict({**state.scheduler.state_dict(), **position["scheduler"]})


def _report(values: Mapping[str, Any]) -> StageReport:
    return StageReport(**{**values, "history": tuple(values["history"])})
