"""Progress bars by rich, on a terminal's stderr or in a notebook; none elsewhere."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_dfcil.results import StageReport
from edge_dfcil.training.callbacks import Callback

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn
    from torch import Tensor

    from edge_dfcil.training.stage import Stage


class Progress(Callback):
    """A bar for each stage: epoch, step, losses, images per second and remaining time."""

    def __init__(self) -> None:
        notebook = in_notebook()
        self._bars = _notebook_bars() if notebook else _terminal_bars()
        self._seconds = 0.5 if notebook else 0.25  # between two updates; a notebook draws all bars each time
        self._shown = 0.0

    def on_plan_begin(self) -> None:
        self._bars.start()
        self._bar = self._bars.add_task("plan", total=None, detail="measuring memory and speed")

    def on_task_begin(self, learner: Any) -> None:
        if self._bars.tasks:
            self._bars.update(self._bar, total=1, completed=1)

    def on_stage_begin(self, stage: Stage) -> None:
        self._bars.start()
        self._bar = self._bars.add_task(stage.name, total=stage.steps or None, detail="")
        self._begin, self._images = time.perf_counter(), 0

    def on_step_end(self, stage: Stage, step: int, losses: Mapping[str, Tensor], images: int) -> None:
        self._images += images
        now = time.perf_counter()
        if now - self._shown < self._seconds and step < stage.steps:  # reading losses waits for the device
            return
        self._shown = now
        epoch = -(-step * stage.epochs // stage.steps) if stage.steps else 1
        values = " ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
        rate = self._images / max(now - self._begin, 1e-9)
        detail = f"epoch {epoch}/{stage.epochs}  {values}  {rate:.0f} images/s"
        self._bars.update(self._bar, completed=step, detail=detail)

    def on_stage_end(self, stage: Stage, report: StageReport) -> None:
        self._bars.update(self._bar, completed=stage.steps or report.steps)

    def on_exit(self) -> None:
        self._bars.stop()


def _columns() -> tuple[ProgressColumn, ...]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    detail = TextColumn("{task.fields[detail]}")
    return TextColumn("{task.description:>7}"), BarColumn(24), MofNCompleteColumn(), detail, TimeRemainingColumn(compact=True)


def _terminal_bars() -> Bars:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*_columns(), console=Console(stderr=True))


def _notebook_bars() -> Bars:
    """Bars as HTML in the output of a cell, updated in place. rich's own would need ipywidgets."""
    from IPython.display import display
    from rich.console import Console
    from rich.progress import Progress

    class NotebookBars(Progress):
        handle: Any = None

        def start(self) -> None:
            self.handle = self.handle or display(self._drawn(), raw=True, display_id=True)

        def stop(self) -> None:
            self.refresh()

        def update(self, task_id: Any, **fields: Any) -> None:
            super().update(task_id, **fields)
            self.refresh()

        def refresh(self) -> None:
            if self.handle is not None:
                self.handle.update(self._drawn(), raw=True)

        def _drawn(self) -> dict[str, str]:
            console = Console(file=io.StringIO(), record=True, width=140, force_jupyter=False)
            console.print(self.get_renderable())
            html = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>", clear=False)
            return {"text/html": html, "text/plain": console.export_text()}

    return NotebookBars(*_columns())


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook (Jupyter, Colab), where rich draws although stderr is not a terminal."""
    shell = getattr(sys.modules.get("builtins"), "get_ipython", None)
    return callable(shell) and type(shell()).__name__ in ("ZMQInteractiveShell", "Shell")


def is_watched() -> bool:
    """Whether progress would be visible. Without a console (pythonw, a daemon) there is no stderr at all."""
    isatty = getattr(sys.stderr, "isatty", None)
    try:
        return in_notebook() or (callable(isatty) and bool(isatty()))
    except ValueError:  # a stream that has been closed
        return False


def with_progress(callbacks: Sequence[Callback], progress: bool) -> Sequence[Callback]:
    """The callbacks, and a progress display if it would be visible."""
    return [*callbacks, Progress()] if progress and is_watched() else list(callbacks)
