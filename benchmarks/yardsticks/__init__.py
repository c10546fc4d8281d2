"""Methods that keep what the product promises not to: images, or a generator. They show what that promise costs.

They use the same interface and the same training loop as the product's methods; only the sample rule is lifted.
"""

from __future__ import annotations

from benchmarks.yardsticks.base import Yardstick
from benchmarks.yardsticks.bic import BiC
from benchmarks.yardsticks.coreset import CoresetMethod
from benchmarks.yardsticks.dgr import DGR
from benchmarks.yardsticks.e2e import E2E
from benchmarks.yardsticks.icarl import ICaRL
from benchmarks.yardsticks.lwf_coreset import LwFCoreset
from benchmarks.yardsticks.rehearsal import Rehearsal
from benchmarks.yardsticks.rehearsal_jpeg import RehearsalJpeg
from benchmarks.yardsticks.upper_bound import UpperBound
from edge_dfcil.errors import SettingError
from edge_dfcil.methods import names as product_names

KINDS: tuple[type[Yardstick], ...] = (Rehearsal, RehearsalJpeg, LwFCoreset, E2E, BiC, ICaRL, DGR, UpperBound)
YARDSTICKS = {kind.name: kind for kind in KINDS}


def find(name: str) -> str | Yardstick:
    """A method by name: the product's as they are; a yardstick as a new instance.

    A coreset's size may follow: "bic-400" keeps 400 images, "bic-1MB" one megabyte of pixels; without a size, 2,000 images.
    Raises `SettingError` for an unknown name or an invalid size.
    """
    if name in product_names():
        return name
    kind, _, size = name.partition("-")
    made = YARDSTICKS.get(kind)
    if made is not None and not size:
        return made()
    if made is not None and issubclass(made, (CoresetMethod, RehearsalJpeg)) and made is not UpperBound:
        return made(size)
    if made is not None:
        raise SettingError(f"{kind} takes no size; pass {kind!r} instead of {name!r}")
    raise SettingError(f"no method is called {name!r}; choose one of {', '.join([*product_names(), *YARDSTICKS])}")


__all__ = ["YARDSTICKS", "Yardstick", "find"]
