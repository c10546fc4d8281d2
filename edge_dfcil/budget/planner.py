"""Plans the memory of a long operation by measurement.

A rehearsal runs a few steps of every stage on temporary networks. It is repeated with larger and larger micro-batches, to find
the largest that fits. The last rehearsal, of whole batches in as many micro-batches as they need, gives the plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from edge_dfcil.budget.meter import Meter, show
from edge_dfcil.errors import BudgetError
from edge_dfcil.results import MemoryPlan, StagePlan
from edge_dfcil.training import loop
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.checkpointing import blocks
from edge_dfcil.training.rehearsal import STEPS, Plannable, Rehearsal
from edge_dfcil.training.stage import Stage, StageSpec, Terms

MARGIN = 0.1  # of the budget, left free when choosing the micro-batch: a fragmented heap needs it most
LEAST_MARGIN = 0.05  # left free in any case, both with the fewest images and with whole batches
FEWEST = 4  # images in a micro-batch: BatchNorm's batch statistics are poor with fewer
ENOUGH = 16  # images in a micro-batch; activations are recomputed to allow this many, which takes a third more time
GROWTH = 4  # of the micro-batch, at most, from one rehearsal to the next
REHEARSALS = 8  # at most, for one choice of settings


@dataclass(frozen=True)
class RehearsalSettings:
    """The settings of a rehearsal.

    Attributes
    ----------
    changes
        Values that replace settings of the recipe.
    recompute
        Stages that recompute their activations instead of keeping them; None: all that can.
    limit
        Bytes above the level; the rehearsal of a stage that exceeds it stops.
    """

    changes: dict[str, int]
    recompute: frozenset[str] | None = frozenset()
    limit: float = float("inf")


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal measured for a stage.

    Attributes
    ----------
    at_once, whole
        Images per micro-batch, and per whole step.
    peak
        Peak bytes above the level.
    base
        Bytes above the level without the stage: of the model, and of libraries, which cache data for each tensor size.
    items
        The parts of the peak, in bytes; "scratch" is the rest, which could not be counted.
    can_recompute
        Whether the stage trains blocks that can be recomputed.
    """

    at_once: int
    whole: int
    peak: int
    base: int
    items: dict[str, int]
    can_recompute: bool

    @property
    def own(self) -> int:
        """Bytes of the stage itself: the peak above the base."""
        return self.peak - self.base

    def begun_at(self, base: int) -> Rehearsed:
        """The same, as if the base had been this many bytes."""
        more = base - self.base
        items = self.items | {"scratch": max(0, self.items["scratch"] + more)}
        return replace(self, base=base, peak=self.peak + more, items=items)

    @property
    def least_an_image(self) -> float:
        """Lower estimate of the bytes per additional image: its activations, and half as much for their gradients."""
        return max(1.0, 1.5 * self.items["activations"] / self.at_once)

    @property
    def most_an_image(self) -> float:
        """Upper estimate: as if all scratch grew with the images, up to twice the size of their activations."""
        kept = self.items["activations"]
        return max(1.0, (kept + min(self.items["scratch"], 2 * kept)) / self.at_once)


Stages = dict[str, Rehearsed]


class _Enough(Callback):
    """Ends a stage's rehearsal once it has exceeded the limit, since it cannot fit then."""

    class Reached(Exception):
        pass

    def __init__(self, meter: Meter, limit: float) -> None:
        self._meter, self._limit = meter, limit

    def on_step_end(self, stage: Stage, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        if self._meter.peak > self._limit:
            raise _Enough.Reached


class _AfterWarmUp(Callback):
    """Clears the peak of a stage's first step."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_step_end(self, stage: Stage, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        if step == 1:
            self._meter.reset()


class TooLarge(Exception):
    """No settings fit; `stages` are those of the smallest settings."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages


@dataclass
class Planner:
    """Finds the settings that keep an operation within a budget.

    Attributes
    ----------
    work
        Provides rehearsals of the operation.
    device
        The device on which they run.
    check
        Called between steps; it may raise.
    """

    work: Plannable
    device: torch.device
    meter: Meter
    check: Callable[[], object]

    def plan(self, budget: int | None) -> MemoryPlan:
        """Whole batches if they fit, else micro-batches, else micro-batches with recomputed activations, else a smaller pool or
        generator.

        Raises `TooLarge` when nothing fits.
        """
        room = float("inf") if budget is None else budget
        limit, last = room * (1 - MARGIN), room * (1 - LEAST_MARGIN)
        if not _fit(stages := self.least(), last):
            raise TooLarge(stages)
        for changes in self.work.smaller():
            stages = self._grown(settings := RehearsalSettings(changes, limit=limit))
            tight = frozenset(name for name, s in stages.items() if s.at_once < min(ENOUGH, s.whole) and s.can_recompute)
            if tight:
                stages = self._grown(settings := replace(settings, recompute=tight))
            if not _fit(stages := self._begun_now(stages), last):
                continue
            if _fit(stages := self._in_whole(stages, replace(settings, limit=last)), last):
                break
        else:
            raise TooLarge(stages)
        planned = (StagePlan(name, stage.at_once, name in tight, stage.peak, stage.items) for name, stage in stages.items())
        return MemoryPlan(budget, tuple(planned), changes)

    def plan_or_refuse(self, budget: int | None, others: Iterable[tuple[str, Callable[[], Stages]]]) -> MemoryPlan:
        """As `plan`, but raises a `BudgetError` that states the memory needed, also by `others`: smaller models, by name."""
        try:
            return self.plan(budget)
        except TooLarge as error:
            assert budget is not None
            raise refusal(budget, error.stages, others) from None

    def _in_whole(self, stages: Stages, settings: RehearsalSettings) -> Stages:
        """The stages with whole batches, with smaller micro-batches for stages that still exceed the limit."""
        at_once = {name: stage.at_once for name, stage in stages.items()}
        while True:
            stages = self._begun_now(self.rehearse(settings, at_once, in_whole=True))
            over = [name for name, stage in stages.items() if stage.peak > settings.limit and at_once[name] > FEWEST]
            if not over:
                return stages
            at_once |= {name: max(FEWEST, at_once[name] // 2) for name in over}

    def least(self) -> Stages:
        """The stages with the smallest settings."""
        return self._begun_now(self.rehearse(RehearsalSettings(self.work.smaller()[-1], recompute=None), {}))

    def _grown(self, settings: RehearsalSettings) -> Stages:
        """Every stage with the largest micro-batch that stays below the limit, or the smallest if none does.

        The micro-batch starts small, and grows by the remaining memory divided by the largest measured memory per image.
        """
        best = self.rehearse(settings, {})
        each = {name: stage.most_an_image for name, stage in best.items()}
        ceiling = {name: stage.whole + 1 for name, stage in best.items()}
        for _ in range(REHEARSALS):
            at_once = {name: self._more(stage, each[name], settings.limit, ceiling[name]) for name, stage in best.items()}
            if all(at_once[name] == stage.at_once for name, stage in best.items()):
                break
            for name, stage in self.rehearse(settings, at_once).items():
                grown = stage.at_once - best[name].at_once
                if grown > 0:
                    each[name] = max(stage.least_an_image, (stage.own - best[name].own) / grown)
                if self._expected(stage) <= settings.limit:
                    best[name] = stage
                else:
                    ceiling[name] = stage.at_once
        return best

    def _more(self, stage: Rehearsed, an_image: float, limit: float, ceiling: int) -> int:
        """The micro-batch to try next: the largest of a batch, its half, its quarter and so on that is expected to fit.

        Only these sizes are used, because libraries cache data for each size.
        """
        if limit == float("inf"):
            return stage.whole
        most = stage.at_once + max(0.0, limit - self._expected(stage)) / an_image
        sizes = [-(-stage.whole // 2**half) for half in range(stage.whole.bit_length())]
        fitting = [size for size in sizes if size <= min(most, GROWTH * stage.at_once) and size < ceiling]
        return max([stage.at_once, *fitting])

    def _expected(self, stage: Rehearsed) -> int:
        """The stage's peak if it began now."""
        return stage.own + self.meter.now

    def _begun_now(self, stages: Stages) -> Stages:
        now = self.meter.now
        return {name: stage.begun_at(now) for name, stage in stages.items()}

    def rehearse(self, settings: RehearsalSettings, at_once: Mapping[str, int], in_whole: bool = False) -> Stages:
        """A few steps of each stage, with the micro-batches given, or else the smallest.

        Batches are cut to two micro-batches, which is enough to show what more would take. With `in_whole` they are not cut,
        because many small micro-batches fragment the heap. In the first step of a stage, libraries create data for a size
        (kernels, packed weights, scratch), which they may keep; this step is not measured with the others. What they keep
        remains allocated, so it belongs to the base and not to the stage.
        """
        base = self.meter.now
        found = self._rehearsed(settings, at_once, in_whole, base)
        kept = max(0, self.meter.now - base)  # by the libraries, once
        return {name: replace(stage, base=base + kept, peak=max(stage.peak, base + kept)) for name, stage in found.items()}

    def _rehearsed(self, settings: RehearsalSettings, at_once: Mapping[str, int], in_whole: bool, base: int) -> Stages:
        """The memory of each stage. This is a separate function so that the rehearsal's networks are freed when it returns. Of
        stages with the same name, the one with the highest peak counts."""
        rehearsal = self.work.rehearsal(settings.changes)
        found: Stages = {}
        while True:
            self.meter.reset()
            stage = next(rehearsal.stages, None)
            if stage is None:
                return found
            few = at_once.get(stage.name, FEWEST)
            rehearsal.micro_batches[stage.name] = few
            watch = _Watch(stage, rehearsal, few, in_whole)
            small = watch.stage(recompute=settings.recompute is None or stage.name in settings.recompute)
            made = self.meter.peak  # made for the stage beforehand, such as a pool of generated images
            with contextlib.suppress(_Enough.Reached):
                self._measure(small, settings.limit)
            more = watch.found(max(made, self.meter.peak), base)
            if stage.name not in found or more.peak > found[stage.name].peak:
                found[stage.name] = more

    def _measure(self, stage: Stage, limit: float) -> None:
        """Runs a short stage to measure its peak, without the allocations that libraries make only in the first step."""
        enough = _Enough(self.meter, limit)
        if isinstance(stage, StageSpec) and stage.steps > 1:
            loop.run(stage, self.device, [_AfterWarmUp(self.meter), enough], self.check)
            return
        loop.run(stage, self.device, [enough], self.check)
        if not isinstance(stage, StageSpec):  # one pass is a warm-up; its sums are new in each pass
            self.meter.reset()
            loop.run(stage, self.device, [enough], self.check)


def _fit(stages: Stages, limit: float) -> bool:
    return all(stage.peak <= limit for stage in stages.values())


class _Watch:
    """Observes a stage that is rehearsed: shortens its largest batches to two micro-batches, unless `in_whole`, and counts the
    activations kept for the backward pass."""

    def __init__(self, stage: Stage, rehearsal: Rehearsal, at_once: int, in_whole: bool) -> None:
        self._spec, self._rehearsal, self._at_once, self._in_whole = stage, rehearsal, at_once, in_whole
        self._whole, self._activations = 0, 0
        self._trained = [*stage.trains] if isinstance(stage, StageSpec) else []
        self._optimizer: torch.optim.Optimizer | None = None
        modules = [*rehearsal.networks, *self._trained]
        self._weights = {tensor.untyped_storage().data_ptr() for module in modules for tensor in module.parameters()}

    def stage(self, recompute: bool) -> Stage:
        """A copy of the stage with a few steps, for the rehearsal."""
        spec = self._spec
        if not isinstance(spec, StageSpec):
            return replace(spec, batches=self, micro_batch=self._at_once)
        return replace(
            spec,
            batches=self,
            loss=self._watched,
            optimizer=self._made,
            steps=min(spec.steps, STEPS),
            micro_batch=self._at_once,
            recompute=recompute,
        )

    def _made(self) -> torch.optim.Optimizer:
        assert isinstance(self._spec, StageSpec)
        self._optimizer = self._spec.optimizer()
        return self._optimizer

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._spec.batches):
            self._whole = max(self._whole, len(batch))
            # A batch of another size, such as a loader's last one, is not cut: its micro-batches have other sizes.
            cut = not self._in_whole and (number == 0 or len(batch) == self._whole)
            yield batch[: 2 * self._at_once] if cut else batch

    def _watched(self, part: Any) -> Terms:
        assert isinstance(self._spec, StageSpec)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            terms = self._spec.loss(part)
        self._activations = max(self._activations, sum(kept.values()))
        return terms

    def found(self, peak: int, base: int) -> Rehearsed:
        """The memory of the stage by item, for as many generated images as there are outside the rehearsal."""
        optimizer, student, generated = self._optimizer, self._rehearsal.student, self._rehearsal.generated()
        own = [module for module in self._trained if not _is_of(module, student)]
        groups = optimizer.param_groups if optimizer is not None else []
        states = optimizer.state.values() if optimizer is not None else []
        items = {
            "weights": _bytes_of([student] if student is not None else []),
            "teacher": 0,  # it shares the tensors of the committed model, which are in memory in any case
            "generator": _bytes_of(own),
            "gradients": sum(p.nbytes for group in groups for p in group["params"]),
            "optimiser": sum(value.nbytes for values in states for value in values.values() if isinstance(value, Tensor)),
            "pool of dreams": 0,
            "activations": self._activations,
        }
        if generated.whole:
            items[generated.item] = generated.whole
            peak += generated.whole - generated.now
        items["scratch"] = max(0, peak - sum(items.values()))
        at_once, trained = min(self._at_once, self._whole), own or self._trained
        return Rehearsed(at_once, self._whole, peak, base, items, any(True for m in trained for _ in blocks(m)))


def _is_of(module: nn.Module, network: nn.Module | None) -> bool:
    """Whether a module is a network or a part of it."""
    return network is not None and any(module is part for part in network.modules())


def _bytes_of(modules: Iterable[nn.Module]) -> int:
    return sum(tensor.nbytes for module in modules for tensor in module.state_dict().values())


def refusal(budget: int, stages: Stages, others: Iterable[tuple[str, Callable[[], Stages]]]) -> BudgetError:
    """An error with the memory needed, its parts, and the alternatives that need less, each with its figure."""

    def needed(stages: Stages) -> float:
        return max(stage.peak for stage in stages.values()) / (1 - LEAST_MARGIN)

    least = needed(stages)
    name, worst = max(stages.items(), key=lambda item: item[1].peak)
    takes = ", ".join(f"{item} {show(size)}" for item, size in worst.items.items() if size)
    found = [(text, needed(rehearse())) for text, rehearse in others]
    remedies = [f"{text} needs {show(size)}" for text, size in found if size < least]
    return BudgetError(
        f"memory_budget of {show(budget)} cannot be kept, and nothing was trained: stage {name!r} needs {show(least)} "
        f"even with a micro-batch of {worst.at_once} images ({takes}). What would help: a budget of {show(least)}"
        + "".join(f"; {remedy}" for remedy in remedies)
    )
