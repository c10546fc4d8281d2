"""Hooks that are called while a session runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from edge_dfcil.errors import SettingError
from edge_dfcil.results import Commit, StageReport, TaskReport
from edge_dfcil.training.stage import Stage


class Callback:
    """Empty hooks, called in this order. Override those you need. An exception stops the session; nothing more is committed."""

    def on_plan_begin(self) -> None:
        """Once, before a memory budget is planned or the speed of a step is measured, which takes some seconds to a minute.
        Not called if neither is needed."""

    def on_task_begin(self, learner: Any) -> None:
        """Before the first stage. Until a commit, `learner` answers with the model from before the task."""

    def on_stage_begin(self, stage: Stage) -> None:
        """Before a stage's first step, and when a stage continues after a pause or from a checkpoint."""

    def on_step_end(self, stage: Stage, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        """After each step, numbered from 1. `losses` are detached scalars; `images` went through this step."""

    def on_epoch_end(self, stage: Stage, epoch: int, losses: Mapping[str, float]) -> None:
        """After each pass over a training stage's batches, numbered from 1, with the means of its losses."""

    def on_stage_end(self, stage: Stage, report: StageReport) -> None:
        """After a stage's last step."""

    def on_commit(self, commit: Commit) -> None:
        """After each commit: the learner answers with the new model. A task may have two, an instant and an adapted one."""

    def on_task_end(self, report: TaskReport) -> None:
        """After the last commit."""

    def on_exit(self) -> None:
        """When the session pauses or ends, even by an error: close here what the hooks have opened."""


def check_callbacks(callbacks: Iterable[Callback] | None) -> Sequence[Callback]:
    """The callbacks as a list. Raises `SettingError` for an object that is not a callback."""
    found = [] if callbacks is None else list(callbacks) if isinstance(callbacks, Iterable) else [callbacks]
    for callback in found:
        missing = [
            name for name in vars(Callback) if name.startswith("on_") and not callable(getattr(type(callback), name, None))
        ]
        if missing:
            raise SettingError(
                f"callbacks has a {type(callback).__name__} without {missing[0]}; pass a list of edge_dfcil.Callback objects"
            )
    return found
