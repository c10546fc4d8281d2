"""Enforces a memory plan: stages get the planned micro-batch, and a smaller one when a step comes near the budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edge_dfcil.budget.meter import Meter
from edge_dfcil.results import MemoryPlan
from edge_dfcil.training.stage import Stage, StageSpec, StageState

NEAR = 0.97  # of the budget: above this the micro-batch is halved, before the budget is passed


def hold(stages: Iterator[Stage], plan: MemoryPlan | None, meter: Meter, peaks: list[int]) -> Iterator[Stage]:
    """The stages under a plan. The peak of each is added to `peaks`, including what is made for the stage beforehand, such as
    a pool of generated images."""
    planned = {stage.name: stage for stage in plan.stages} if plan is not None else {}
    budget = plan.budget if plan is not None else None

    def over_budget(state: StageState) -> bool:
        """Whether the step must be repeated. A step that came near the budget is kept, and later ones take half the images."""
        assert budget is not None
        if meter.peak <= NEAR * budget:
            return False
        over = meter.peak > budget
        meter.reset()
        if not over and state.micro_batch is not None:
            state.micro_batch = max(2, state.micro_batch // 2)
        return over

    while True:
        meter.reset()
        stage = next(stages, None)
        if stage is None:
            return
        if stage.name in planned:
            found = planned[stage.name]
            stage = replace(stage, micro_batch=found.at_once)
            if isinstance(stage, StageSpec):
                stage = replace(stage, recompute=found.recompute, over_budget=over_budget if budget is not None else None)
        yield stage
        peaks.append(meter.peak)
