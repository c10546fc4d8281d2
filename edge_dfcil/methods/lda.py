"""LDA on a frozen backbone (SLDA, Hayes and Kanan, CVPR workshops 2020): the baseline that every trained method must beat.

The backbone is trained in the first task (or adopted) and frozen after it. The head is linear discriminant analysis from
class means and one shared within-class covariance; learning a later task is one pass over its images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from edge_dfcil.errors import SettingError
from edge_dfcil.methods._class_statistics import STATE, stays_frozen
from edge_dfcil.methods._lda_head import lda_stage
from edge_dfcil.methods._own_head import train_own_features
from edge_dfcil.methods.base import Method
from edge_dfcil.methods.task import Task
from edge_dfcil.recipe import Recipe
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Stage, Terms


class LDA(Method):
    name = "lda"
    state: ClassVar[Mapping[str, str]] = STATE

    def closed_form(self, recipe: Recipe) -> bool:
        return True

    def stages(self, task: Task) -> Iterator[Stage]:
        if not task.recipe.remember.class_statistics:
            raise SettingError(
                "the method 'lda' keeps class means and a covariance, which this recipe does not allow; set "
                "remember.class_statistics, or choose another method"
            )
        if task.teacher is None and not stays_frozen(task):
            train_own_features(task)
            yield from super().stages(task)
        yield from lda_stage(task, moves=False)

    def loss(self, task: Task, batch: Batch) -> Terms:
        raise AssertionError("later tasks are learnt in closed form")
