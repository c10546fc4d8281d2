"""Runs sessions on a current model, one writer at a time: the part of `Learner` for long operations."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from edge_dfcil import devices
from edge_dfcil.budget.meter import parse
from edge_dfcil.budget.within import PlannedWork, Within
from edge_dfcil.errors import SettingError
from edge_dfcil.training.callbacks import Callback, check_callbacks
from edge_dfcil.training.progress import with_progress
from edge_dfcil.training.session import Session, Work

LIMITS = ("memory_budget", "precision")  # settings of a learner that belong to the device and not to the model


class RunsSessions:
    """Has one writer lock and the running session; neither is copied or pickled with it."""

    _session: Session[Any] | None = None
    _memory_budget: int | None = None
    _precision = "auto"

    @property
    def device(self) -> torch.device:
        """The device on which sessions compute."""
        raise NotImplementedError

    def __init__(self, memory_budget: int | str | None = None, precision: str = "auto") -> None:
        self._writing = threading.Lock()
        self.memory_budget, self.precision = memory_budget, precision

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_writing", "_session")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._writing = threading.Lock()

    @property
    def memory_budget(self) -> int | None:
        """The most bytes that a long operation may add to memory; set it to a number, or to a string such as "128MB"."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: int | str | None) -> None:
        self._memory_budget = parse(budget)

    @property
    def precision(self) -> str:
        """ "auto", "float32" or "bfloat16": what training stages compute in, if the recipe allows it."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._precision = devices.check_precision(precision)

    @property
    def limits(self) -> dict[str, Any]:
        """The settings that belong to the device and not to the model, by name."""
        return {name: getattr(self, name) for name in LIMITS}

    @property
    def running(self) -> Session[Any] | None:
        """The session that runs now, in any thread."""
        return self._session

    def cancel(self) -> None:
        """Stops the running operation (`learn_task`, `dream`, ...), which then raises `Cancelled`. To be called from another
        thread or from a callback."""
        session = self._session
        if session is not None:
            session.cancel()

    def run(self, work: PlannedWork, callbacks: Sequence[Callback] = (), progress: bool = True, *, seed: int) -> Any:
        """Runs a long operation on the current model, with progress and `cancel()`, within the memory budget if there is
        one, and in the precision that was asked for; "auto" takes the default of the device. Returns its result."""
        if self.memory_budget is not None:
            work = Within(work, self.memory_budget, self.device)
        with devices.computing(devices.usual(self.device, self.precision)):
            return self._new_session(work, callbacks, progress, seed=seed).run()

    def _new_session(
        self, work: Work[Any], callbacks: Sequence[Callback], progress: bool, writes: bool = False, **settings: Any
    ) -> Session[Any]:
        found = with_progress(check_callbacks(callbacks), progress)
        session: Session[Any] = Session(work, device=self.device, callbacks=found, **settings)
        session.guard = lambda: self._running(session, writes)
        return session

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
