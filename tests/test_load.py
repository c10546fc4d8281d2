"""Short runs of `tests.load`; longer ones are run by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import load

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked, and memory is read from /proc")


@on_linux
@pytest.mark.slow
def test_answers_are_of_one_version_while_it_is_learnt_and_replaced(tmp_path: Path) -> None:
    account = load.run(1000, tmp_path)
    assert account.versions >= load.COMMITS and sum(account.calls.values()) >= 1000


@on_linux
@pytest.mark.slow
def test_memory_is_constant_over_tasks(tmp_path: Path) -> None:
    assert len(load.soak(20, tmp_path).resident) == 20


def test_a_wrong_a_late_and_a_missing_answer_are_found() -> None:
    right: list[list[load.Answer]] = [[((("0", 0.9),),)], [((("1", 0.8),),)]]
    calls = load.Calls(3)
    replies = iter([right[0][0], right[1][0]])
    calls.ask(lambda chunk: next(replies), lambda: 0)
    assert len(calls.failed) == 1 and calls.made == 3
    with pytest.raises(AssertionError, match="threads: StopIteration"):
        calls.check("threads", right)
    calls.failed.clear()
    calls.seen = {(0, right[0][0]): 0, (0, right[1][0]): 1}
    assert calls.check("threads", right) == 2
    calls.note(0, right[0][0], 1)
    with pytest.raises(AssertionError, match="version 0 answered after version 1 was committed"):
        calls.check("threads", right)
    with pytest.raises(AssertionError, match="is of no version"):
        calls.check("threads", right[1:])
