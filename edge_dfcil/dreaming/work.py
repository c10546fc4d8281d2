"""Works of a session that generate images: their base class, and the work of `Learner.dream`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edge_dfcil.dreaming.inversion import Dreamer, Pool, make_pool
from edge_dfcil.dreaming.pixels import paint
from edge_dfcil.errors import SettingError
from edge_dfcil.model.model import Model
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import MemoryPlan, StageReport
from edge_dfcil.training import rehearsal
from edge_dfcil.training.rehearsal import Generated, Rehearsal
from edge_dfcil.training.session import PlainWork, Session
from edge_dfcil.training.stage import Stage
from exporters.values import is_one_of, whole_number

FEW = 64  # images in memory together as floats


class GeneratingWork(PlainWork):
    """A work that generates images by a recipe; a memory plan may change the recipe, and sets how many are generated together."""

    _recipe: Recipe
    _at_once: int | None = None  # images that are generated together; None: a batch of the generator's

    def keep_to(self, plan: MemoryPlan) -> None:
        self._recipe, self._at_once = self._recipe.changed(plan.changes), plan.at_once("dream")


class Dreaming(GeneratingWork):
    """The work of a session that generates `n` images of some classes.

    Parameters
    ----------
    quality
        "fast" trains a generator, "best" optimises the pixels of every image.
    """

    def __init__(self, model: Model, recipe: Recipe, n: int, classes: Sequence[str] | None, quality: str) -> None:
        model.check_answering()
        chosen = model.known(classes) if classes is not None else set(model.classes)
        if not chosen:
            raise SettingError(f"classes={classes!a:.80}; ask for images of at least one class")
        if not is_one_of(quality, ("fast", "best")):
            raise SettingError(f"quality={quality!a:.80}; choose 'fast' or 'best'")
        self._model, self._recipe, self._n, self._quality = model, recipe, whole_number("n", n), quality
        self._wanted = [output for output, name in enumerate(model.outputs) if name in chosen]
        self._pool: Pool | None = None

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        return self._stages(self._recipe, self._n)

    def _stages(self, recipe: Recipe, n: int) -> Iterator[Stage]:
        device, teacher = self._model.device, self._model.network.frozen()
        wanted = torch.tensor(self._wanted, device=device)
        if self._quality == "best":
            self._pool = Pool(n, teacher, device)
            yield from paint(self._pool, teacher, wanted, recipe)
            return
        dreamer = Dreamer(teacher, wanted, recipe)
        yield dreamer.stage()
        self._pool = make_pool(dreamer, n, self._at_once)

    # For the planner

    def smaller(self) -> list[dict[str, int]]:
        return rehearsal.smaller(self._recipe, "generator.width") if self._quality == "fast" else [{}]

    def rehearsal(self, changes: Mapping[str, int]) -> Rehearsal:
        copied, n = copy.copy(self), min(self._n, rehearsal.POOL)
        copied._wanted = list(range(self._model.network.n_classes))  # all: an untrained generator may give no image of some

        def generated() -> Generated:
            held = copied._pool.nbytes if copied._pool is not None else 0
            an_image = 3 * self._model.image_size**2  # in the result, in addition to the pool
            return Generated(now=held, whole=(held // n + an_image) * self._n)

        return Rehearsal(
            copied._stages(rehearsal.short(self._recipe.changed(changes)), n), [self._model.network], generated=generated
        )

    @property
    def pool(self) -> Pool:
        """The generated images."""
        assert self._pool is not None
        return self._pool

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> Tensor:
        """Images (n, 3, S, S), uint8, on the CPU, sorted by class."""
        pool, side = self.pool, self._model.image_size
        images = torch.empty(len(pool), 3, side, side, dtype=torch.uint8)
        for place, order in zip(images.split(FEW), pool.labels.argsort(stable=True).split(FEW), strict=True):
            place.copy_(self._model.network.denormalize(pool[order].images))
        return images
