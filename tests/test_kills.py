"""A short run of `tests.kills`; longer ones are run by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import kills


@pytest.mark.slow
def test_nothing_is_lost_by_kills(tmp_path: Path) -> None:
    account = kills.run(3, tmp_path)
    assert (account.kills, account.rounds, account.same) == (3, 2, 1)
