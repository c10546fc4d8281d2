"""Progress is shown as bars on a terminal, as HTML that is updated in place in a notebook, and not at all elsewhere."""

from __future__ import annotations

import builtins
import re
import sys
from typing import Any

import IPython.display
import pytest

from edge_dfcil import Learner
from edge_dfcil.demo import Batches
from tests.conftest import NAMES


class ZMQInteractiveShell:
    """Has the name of the shell class of a notebook's kernel."""


@pytest.fixture
def displays(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a notebook would show: the last state of each display."""
    shown: list[dict[str, str]] = []

    class Handle:
        def __init__(self, place: int) -> None:
            self.place = place

        def update(self, data: dict[str, str], raw: bool) -> None:
            shown[self.place] = data

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        shown.append(data)
        return Handle(len(shown) - 1)

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    return shown


@pytest.mark.slow
def test_a_notebook_has_one_display_a_task_with_every_stage(
    learnt: Learner, train: Batches, displays: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    report = learnt.learn_task(train.of(("2", "3")), NAMES)
    (last,) = displays
    bars = dict(re.findall(r"^ *(\w+) \S+ (\d+/\d+) ", last["text/plain"], re.M))
    assert bars == {stage.name: f"{stage.steps}/{stage.steps}" for stage in report.stages}
    assert last["text/html"].startswith("<pre>") and "dream" in last["text/html"]
    assert capfd.readouterr() == ("", ""), "nothing besides the display"


def test_a_notebook_shows_nothing_when_asked_not_to(learnt: Learner, displays: Any) -> None:
    learnt.dream(8, progress=False)
    assert displays == []


def test_it_is_quiet_where_nobody_watches(learnt: Learner, capfd: pytest.CaptureFixture[str]) -> None:
    assert not sys.stderr.isatty()
    learnt.dream(8)
    assert capfd.readouterr() == ("", "")
