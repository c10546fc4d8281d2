"""Generating images on request: the work of `Learner.dream`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from edge_dfcil.dreaming.inversion import Dreamer, Pool, make_pool
from edge_dfcil.dreaming.pixels import paint
from edge_dfcil.errors import SettingError
from edge_dfcil.model import labels
from edge_dfcil.model.model import Model
from edge_dfcil.recipe import Recipe
from edge_dfcil.results import StageReport
from edge_dfcil.training.session import PlainWork, Session
from edge_dfcil.training.stage import Stage


class Dreaming(PlainWork):
    """The work of a session that generates `n` images of some classes.

    Parameters
    ----------
    quality
        "fast" trains a generator, "best" optimises the pixels of every image.
    """

    def __init__(self, model: Model, recipe: Recipe, n: int, classes: Sequence[str] | None, quality: str) -> None:
        model.check_answering()
        chosen = list(dict.fromkeys(classes)) if classes is not None else list(model.classes)
        if not isinstance(n, int) or n < 1 or not chosen:
            raise SettingError(f"n={n}, classes={classes}; ask for at least one image of one class")
        if quality not in ("fast", "best"):
            raise SettingError(f"quality={quality!r}; choose 'fast' or 'best'")
        labels.outputs_of({name: name for name in chosen}, model.classes)
        self._model, self._recipe, self._n, self._quality = model, recipe, n, quality
        self._wanted = [output for output, name in enumerate(model.outputs) if name in chosen]
        self._pool: Pool | None = None

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        teacher, wanted = self._model.network.frozen(), torch.tensor(self._wanted, device=session.device)
        if self._quality == "best":
            self._pool = Pool(self._n, teacher, session.device)
            yield from paint(self._pool, teacher, wanted, self._recipe)
            return
        dreamer = Dreamer(teacher, wanted, self._recipe)
        yield dreamer.stage()
        self._pool = make_pool(dreamer, self._n)

    @property
    def pool(self) -> Pool:
        """What has been generated."""
        assert self._pool is not None
        return self._pool

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> Tensor:
        """Images (n, 3, S, S), uint8, on the CPU, sorted by class."""
        pool = self.pool
        return self._model.network.denormalize(pool[pool.labels.argsort(stable=True)].images).cpu()
