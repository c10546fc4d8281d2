"""Hooks that are called while a task is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edge_dfcil.results import StageReport, TaskReport
from edge_dfcil.training.stage import Stage


class Callback:
    """Empty hooks, called in this order. Override the ones you want; raise to stop, and nothing is committed."""

    def on_plan_begin(self) -> None:
        """Before a memory budget is planned, which takes some seconds to a minute. Not called without a budget."""

    def on_task_begin(self, task: Any) -> None:
        """Before the first stage."""

    def on_stage_begin(self, stage: Stage) -> None:
        """Before a stage's first step."""

    def on_step_end(self, stage: Stage, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        """After each optimiser step, numbered from 1. `losses` are detached scalars; `images` went through this step."""

    def on_stage_end(self, stage: Stage, report: StageReport) -> None:
        """After a stage's last step."""

    def on_task_end(self, report: TaskReport) -> None:
        """After the commit: the new model answers now."""

    def on_exit(self) -> None:
        """However the task ended, errors included: the place to close what was opened."""
