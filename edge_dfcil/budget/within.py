"""Any long operation under a memory budget: planned by a rehearsal, enforced while it runs, and reported."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from edge_dfcil import devices
from edge_dfcil.budget.allocator import bounded
from edge_dfcil.budget.hold import hold
from edge_dfcil.budget.meter import Meter, show
from edge_dfcil.budget.planner import Planner
from edge_dfcil.results import MemoryPlan, StageReport
from edge_dfcil.training.rehearsal import Plannable
from edge_dfcil.training.session import PlainWork, Session, Work
from edge_dfcil.training.stage import Stage

logger = logging.getLogger("edge_dfcil")


class PlannedWork(Work[Any], Plannable, Protocol):
    """What can run within a memory budget."""

    def keep_to(self, plan: MemoryPlan) -> None:
        """Called before `stages` with the changes of the recipe and the micro-batch of each stage."""


class Within(PlainWork):
    """A work whose stages take at most `budget` bytes above the memory in use when it starts.

    Its result has the peak of each stage. Work outside the stages (such as writing and checking an ONNX file) cannot be
    planned; the log has a warning if it took more.
    """

    def __init__(self, work: PlannedWork, budget: int, device: torch.device) -> None:
        self.work, self._budget = work, budget
        self._meter, self._peaks = Meter(device), list[int]()

    @contextlib.contextmanager
    def context(self, session: Session[Any]) -> Iterator[None]:
        with bounded(self._meter, session.device, self._budget), self.work.context(session):
            yield

    def prepare(self, session: Session[Any]) -> None:
        self.work.prepare(session)
        self._meter.exclude()

    def close(self) -> None:
        self.work.close()
        super().close()

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        session.announce_plan()
        with devices.seeded(None, session.device):
            plan = Planner(self.work, session.device, self._meter, session.check).plan_or_refuse(self._budget, ())
        self.work.keep_to(plan)
        yield from hold(self.work.stages(session), plan, self._meter, self._peaks)

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> Any:
        with_peaks = [replace(report, peak_bytes=peak) for report, peak in zip(reports, self._peaks, strict=True)]
        result = self.work.finish(session, with_peaks)
        highest = self._meter.highest
        say = logger.info if highest <= self._budget else logger.warning
        say("took at most %s, of a memory budget of %s", show(highest), show(self._budget))
        return result
