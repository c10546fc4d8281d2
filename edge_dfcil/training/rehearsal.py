"""Rehearsals: short versions of long operations, on temporary copies, for the planner to measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from torch import nn

from edge_dfcil.recipe import Recipe
from edge_dfcil.training.stage import Stage

STEPS = 3  # of each stage
POOL = 16  # generated images

# The last resort, in order: divisors of the recipe's settings.
SMALLER: tuple[dict[str, int], ...] = (
    {},
    {"remember.pool": 2},
    {"remember.pool": 4},
    {"remember.pool": 4, "generator.width": 2},
    {"remember.pool": 4, "generator.width": 4},
)


@dataclass(frozen=True)
class Generated:
    """Bytes of the generated images that a stage works with: those of the rehearsal, and those of the whole operation.

    `item` is the line of the plan in which they are counted.
    """

    item: str = "pool of dreams"
    now: int = 0
    whole: int = 0


@dataclass
class Rehearsal:
    """A short version of an operation.

    Attributes
    ----------
    stages
        A few steps each, with batches of the whole size.
    networks
        The networks whose weights are in memory anyway, so that they are not counted as activations.
    student
        Of these, the copy that becomes the model; None if the operation makes no model.
    generated
        Called after each stage.
    micro_batches
        Filled by the planner: the micro-batch of each stage, by its name.
    """

    stages: Iterator[Stage]
    networks: Sequence[nn.Module] = ()
    student: nn.Module | None = None
    generated: Callable[[], Generated] = Generated
    micro_batches: dict[str, int | None] = field(default_factory=dict)


class Plannable(Protocol):
    """What the planner can keep within a memory budget."""

    def smaller(self) -> Sequence[dict[str, int]]:
        """Changes of the recipe to try in order; the first is empty."""

    def rehearsal(self, changes: Mapping[str, int]) -> Rehearsal:
        """A short version of the operation with these changes of its recipe."""


def short(recipe: Recipe, steps: int = STEPS, pool: int = POOL) -> Recipe:
    """A recipe with the same sizes, and few steps and generated images."""
    return recipe.changed(
        {
            "schedule.epochs": 1,
            "schedule.first_epochs": 1,
            "schedule.min_steps": steps,
            "generator.steps": steps,
            "pixels.steps": steps,
            "remember.pool": min(recipe.remember.pool, pool),
            "refine.epochs": min(recipe.refine.epochs, 1),
            "refine.min_steps": steps,
        }
    )


def smaller(recipe: Recipe, *names: str) -> list[dict[str, int]]:
    """Changes that make these settings of a recipe smaller, one for each step of `SMALLER`."""
    found = [
        {name: max(1, value // by) for name, by in step.items() if name in names and (value := attrgetter(name)(recipe))}
        for step in SMALLER
    ]
    return [changes for number, changes in enumerate(found) if changes not in found[:number]]
