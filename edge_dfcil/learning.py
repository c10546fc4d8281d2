"""One task, from a loader to the model that is committed: the work of `Learner.session`."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from edge_dfcil import devices
from edge_dfcil.budget import schedule, speed
from edge_dfcil.budget.allocator import bounded
from edge_dfcil.budget.hold import hold
from edge_dfcil.budget.meter import Meter
from edge_dfcil.budget.planner import Planner
from edge_dfcil.errors import BudgetError, ClassError
from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.model import labels, statistics
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.model import Model
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import Commit, Computing, MemoryPlan, StagePlan, StageReport, TaskReport
from edge_dfcil.training import rehearsal
from edge_dfcil.training.data import RealBatches, Scan, scan
from edge_dfcil.training.loop import check_finite
from edge_dfcil.training.rehearsal import Generated, Rehearsal
from edge_dfcil.training.session import Enough, Session
from edge_dfcil.training.stage import Stage, StageSpec

LEAST_SHARE = 0.05  # of a schedule: if there is less time, a task that has an instant model ends with that model
WORSE = 1.5  # the instant model stays if the expected error of the adapted one is more than this many times as large
LEAST_ERROR = 1e-6  # expected errors below this are compared as if they were this: the tails of a normal model say no more


def is_worse(first: float | None, last: float | None) -> bool:
    """Whether the instant model stays instead of the adapted one, by their expected errors; False if one is unknown."""
    return first is not None and last is not None and last > WORSE * max(first, LEAST_ERROR)


class Assignment:
    """What is to be learnt: a model, a method, and the images and names that a loader gives.

    Attributes
    ----------
    new, known
        Names that are learnt for the first time, and those that are refreshed.
    """

    def __init__(
        self, model: Model, method: Method, recipe: Recipe, loader: Any, scanned: Scan, classes: Classes | None, relearn: bool
    ) -> None:
        self.model, self.method, self.recipe, self.loader, self.scanned = model, method, recipe, loader, scanned
        names = labels.match_known(labels.name_targets(scanned.counts, loader, classes), model.classes)
        self._names, self.instant = names, False
        self.known = tuple(name for name in names.values() if name in model.classes)
        if self.known and not relearn:
            shown = ", ".join(map(repr, self.known))
            raise ClassError(f"{shown} is known already; leave it out, or refresh it with relearn=True (--relearn)")
        self.new = tuple(name for name in names.values() if name not in model.classes)
        self.tasks = (*model.tasks, self.new) if self.new else model.tasks
        outputs = [*model.outputs, *self.new]
        self.outputs = {target: outputs.index(name) for target, name in names.items()}  # a merged class learns its first output

    def on(self, model: Model) -> Assignment:
        """The same for another model of the same classes."""
        other = copy.copy(self)
        other.model = model
        return other

    def task(self) -> Task:
        """The task with its own copies of the networks, which may be discarded."""
        device, scanned = self.model.device, self.scanned
        before = devices.reordered(self.model.network, device)
        student = before.grown(len(self.new))
        if not self.model.normalizes:
            student.set_statistics(scanned.mean, scanned.std)
        counts = torch.zeros(student.n_classes, device=device)
        for target, output in self.outputs.items():
            counts[output] = scanned.counts[target]
        return Task(
            student=student,
            teacher=before.frozen() if self.model.tasks else None,
            current=torch.nonzero(counts).flatten(),
            old=torch.arange(before.n_classes, device=device),
            counts=counts,
            batches=RealBatches(self.loader, scanned, self.outputs, student, self.recipe, self._names),
            recipe=self.recipe,
            device=device,
            statistics=self.model.statistics,
            pretrained=self.model.pretrained,
        )

    # For the planner

    def smaller(self) -> list[dict[str, int]]:
        return rehearsal.smaller(self.recipe, "remember.pool", "generator.width") if self.task().remembers else [{}]

    def rehearsal(self, changes: Mapping[str, int]) -> Rehearsal:
        instant = self.instant and next(self.method.instant(self.task()), None) is not None
        task, method = self.task(), copy.deepcopy(self.method)
        whole = task.recipe.changed(changes)
        task.make_short(whole, rehearsal.STEPS, rehearsal.POOL)

        def generated() -> Generated:
            held = task.dreams.nbytes if task.dreams is not None else 0
            if not whole.remember.pool:
                return Generated("generator", held, held)
            return Generated(now=held, whole=held * whole.remember.pool // task.recipe.remember.pool)

        networks = [task.student, *([task.teacher] if task.teacher is not None else [])]
        stages = method.stages(task)
        if instant:
            first = self.task()
            first.make_short(whole, rehearsal.STEPS, rehearsal.POOL)
            stages = itertools.chain(method.instant(first), stages)
            networks.append(first.student)  # it answers while the task runs
        return Rehearsal(stages, networks, task.student, generated, task.micro_batches)

    def fingerprint(self) -> dict[str, Any]:
        """What distinguishes this task from others: everything but the images, which are represented by their numbers."""
        return {
            "method": self.method.name,
            "recipe": self.recipe.to_dict(),
            "new classes": list(self.new),
            "refreshed classes": list(self.known),
            "images": sorted([self.outputs[target], count] for target, count in self.scanned.counts.items()),
            "batches": sorted([size, count] for size, count in self.scanned.batch_sizes.items()),
        }


def task_id(fingerprint: Mapping[str, Any]) -> str:
    """A short identifier of a task. A model file records that of its last task."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]


class Learning:
    """The work of a session that learns one task."""

    def __init__(
        self,
        model: Model,
        method: Method,
        recipe: Recipe,
        loader: Any,
        classes: Classes | None,
        *,
        relearn: bool = False,
        instant: bool = True,
        memory_budget: int | None = None,
        precision: str = "auto",
        seconds: float | None = None,
        smaller: Callable[[], Iterator[tuple[str, Model]]] = lambda: iter(()),
        learner: Any = None,
        commit: Callable[[Model], None] = lambda model: None,
        plan_only: bool = False,
    ) -> None:
        self.model, self.method, self.recipe, self.loader = model, method, recipe, loader
        self._classes, self._relearn, self._smaller, self._learner, self._commit = classes, relearn, smaller, learner, commit
        self._budget, self._seconds, self._plan_only = memory_budget, seconds, plan_only
        self._precision, self._instant = precision, instant
        self.computing = devices.usual(model.device, precision if recipe.schedule.mixed_precision else "float32")
        self._meter, self._peaks = Meter(model.device), list[int]()
        self._digest = model.digest()
        self.network: nn.Module | None = None
        self.task: Task | None = None
        self.plan: MemoryPlan | None = None
        self.first: Task | None = None  # that of the instant model, if there is one
        self._last: Model = model  # the last that was committed
        self._commits: list[Commit] = []
        self._has_begun = self._adapted = self._complete = False
        self._left_out = 0
        self.fitted: dict[str, Any] | None = None

    # The contract of `Work`

    @contextlib.contextmanager
    def context(self, session: Session[Any]) -> Iterator[None]:
        with bounded(self._meter, session.device, self._budget), contextlib.ExitStack() as self._computes:
            self._computes.enter_context(devices.computing(self.computing))
            yield

    def prepare(self, session: Session[Any]) -> None:
        scanned = scan(self.loader, lambda: session.cancelled)
        self._meter.exclude()  # what the loader keeps
        self.assignment = Assignment(self.model, self.method, self.recipe, self.loader, scanned, self._classes, self._relearn)
        self.assignment.instant = self._instant

    def close(self) -> None:
        self.task = self.first = self.network = self.loader = self.assignment.loader = None

    def fingerprint(self) -> dict[str, Any]:
        settings = {"budget": self._budget, "time budget": self._seconds, "precision": self._precision}
        settings["instant"] = self._instant
        return {"model": self._digest, **settings, **self.assignment.fingerprint()}

    def decided(self) -> dict[str, Any]:
        plan = asdict(self.plan) if self.plan is not None else None
        return {"plan": plan, "fitted": self.fitted, "computing": asdict(self.computing)}

    def restore(self, decided: Mapping[str, Any]) -> None:
        plan = decided["plan"]
        if plan is not None:
            self.plan = MemoryPlan(plan["budget"], tuple(StagePlan(**stage) for stage in plan["stages"]), plan["changes"])
        self.fitted, self.computing = decided["fitted"], Computing(**decided["computing"])

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        if not session.resumed:
            self._plan(session)
        if self._instant and not self._plan_only:
            yield from self._instant_stages(session)
        if not session.resumed:
            self._decide(session)
        if self._plan_only or self._has_no_time():
            return
        self._computes.enter_context(devices.computing(self.computing))
        task = self.task = self.assignment.task()
        self.network, self._left_out = task.student, task.batches.left_out
        changes = dict(self._changes())
        if self.fitted is not None:
            task.share = self.fitted["share"]
            changes |= self.fitted["changes"]
        task.recipe, task.compared = task.recipe.changed(changes), self.first is not None
        self._begin(session)
        yield from self._held(session, self.method.stages(task), task)
        self._complete = True

    def _instant_stages(self, session: Session[Any]) -> Iterator[Stage]:
        """The stages of an instant model, which is committed and answers while the task runs; none if the method has none."""
        random, task = devices.random_state(session.device), self.assignment.task()
        task.recipe, task.compared = task.recipe.changed(self._changes()), True
        for stage in self._held(session, self.method.instant(task), task):
            self._begin(session)
            yield stage
            self.first = task
        devices.set_random_state(random, session.device)  # the task continues as without an instant model
        if self.first is not None:
            self._put(session, task, self.model.learning)
            session.has_result = True

    def _held(self, session: Session[Any], stages: Iterator[Stage], task: Task) -> Iterator[Stage]:
        for stage in hold(stages, self.plan, self._meter, self._peaks):
            yield stage
            task.micro_batches[stage.name] = session.reports[-1].at_once
            self._adapted = self._adapted or (isinstance(stage, StageSpec) and stage.resumable)

    def _begin(self, session: Session[Any]) -> None:
        if not self._has_begun:
            self._has_begun = True
            for callback in session.callbacks:
                callback.on_task_begin(self._learner)

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> TaskReport | None:
        if self._plan_only:
            return None
        self._computes.close()
        # A model file records the last task that ended; one saved after an instant commit does not record this task yet.
        ended = dict(self.model.learning) | {"last_task": task_id(self.fingerprint())}
        if self._complete and not self._first_is_better():
            assert self.task is not None
            self._put(session, self.task, ended)
        else:
            self._commit(replace(self._last, learning=ended))
        model, assignment = self._last, self.assignment
        report = TaskReport(
            task=len(model.tasks),
            method=self.method.name,
            new_classes=assignment.new,
            relearned_classes=assignment.known,
            classes=model.classes,
            images=assignment.scanned.images,
            seconds=session.seconds,
            stages=tuple(replace(stage, peak_bytes=peak) for stage, peak in zip(reports, self._peaks, strict=True)),
            plan=self.plan,
            peak_bytes=self._meter.highest,
            left_out=self._left_out,
            resumed=session.resumed,
            fitted=self.fitted,
            computing=self.computing,
            commits=tuple(self._commits),
        )
        for callback in session.callbacks:
            callback.on_task_end(report)
        return report

    def _first_is_better(self) -> bool:
        """Whether the instant model stays, because the adapted one is expected to be less accurate."""
        first, last = (None if task is None else task.expected_error for task in (self.first, self.task))
        return is_worse(first, last)

    def _put(self, session: Session[Any], task: Task, learning: Mapping[str, Any]) -> None:
        """Commits the model of a task."""
        network: Any = task.student.eval().requires_grad_(False)
        network.to(memory_format=devices.memory_format(session.device))
        check_finite(network)
        statistics.check(task.kept, self.method.state, network.n_classes, task.recipe.remember.min_images)
        found = statistics.rounded(task.kept)
        made = replace(self.model, network=network, tasks=self.assignment.tasks, normalizes=True, statistics=found)
        self._last = replace(made, learning=learning).calibrated(task.calibration)
        self._commit(self._last)
        commit = Commit("adapted" if self._adapted else "instant", session.seconds)
        self._commits.append(commit)
        for callback in session.callbacks:
            callback.on_commit(commit)

    # Decisions

    def _plan(self, session: Session[Any]) -> None:
        """Plans the memory, on copies and with a separate random state."""
        if self._budget is None and not self._plan_only:
            return
        session.announce_plan()
        with devices.seeded(None, session.device):
            self.plan = plan_memory(self.assignment, self._budget, self._meter, self._checks(session), self._smaller())

    def _decide(self, session: Session[Any]) -> None:
        """Measures the fastest computing setting, and fits the schedule."""
        check = self._checks(session)
        with devices.seeded(None, session.device):
            measures = self._precision == "auto" and speed.is_worth_measuring(self.assignment.task, self.method, session.device)
            if measures or self._seconds is not None:
                session.announce_plan()
            if measures:
                self._measure(check)
            if self._seconds is not None:
                left = self._seconds - session.seconds
                with devices.computing(self.computing):
                    self.fitted = schedule.fit(self.assignment.task, self.method, left, self._changes(), check)

    def _has_no_time(self) -> bool:
        """Whether the time that is left is too short to adapt the network, and there is an instant model to end with."""
        return self.first is not None and self.fitted is not None and self.fitted["share"] < LEAST_SHARE

    def _checks(self, session: Session[Any]) -> Callable[[], None]:
        def check() -> None:
            if session.cancelled:  # a pause waits for the first step: planning is not interrupted by it
                session.check()
            if self.first is not None and self._seconds is not None and session.seconds >= self._seconds:
                raise Enough

        return check

    def _changes(self) -> dict[str, int]:
        return self.plan.changes if self.plan is not None else {}

    def _measure(self, check: Callable[[], object]) -> None:
        """Chooses the fastest setting, with a plan of its own; the usual one if the budget is too small for that plan."""
        usual, recipe = self.computing, self.recipe.changed(self._changes())
        plan = self.plan if self._budget is not None else None
        self.computing = speed.choose(self.assignment.task, self.method, recipe, usual, plan, self._seconds, check)
        if self.plan is None or str(self.computing) == str(usual):
            return
        try:
            with devices.computing(self.computing):
                self.plan = plan_memory(self.assignment, self._budget, self._meter, check, iter(()))
        except BudgetError:
            self.computing = replace(usual, measured=self.computing.measured)


def plan_memory(
    assignment: Assignment,
    budget: int | None,
    meter: Meter,
    check: Callable[[], object],
    smaller: Iterator[tuple[str, Model]],
) -> MemoryPlan:
    """A plan within the budget. Raises `BudgetError` when there is none, with what smaller models would need."""

    def planner(assignment: Assignment) -> Planner:
        return Planner(assignment, assignment.model.device, meter, check)

    others = ((text, planner(assignment.on(model)).least) for text, model in smaller)
    return planner(assignment).plan_or_refuse(budget, others)
