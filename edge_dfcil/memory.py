"""The memory budget: one place that says what it takes."""

from __future__ import annotations

from edge_dfcil.errors import BudgetError


def check_budget(budget: int | str | None) -> None:
    """Refuses every budget: planning is not in this version, and a budget that is only a word is worse than none."""
    if budget is not None:
        raise BudgetError(
            f"memory_budget={budget!r} cannot be kept: this version does not plan memory; pass None. "
            "Smaller batches, images and backbones need less"
        )
