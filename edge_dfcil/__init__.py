"""edge_dfcil: teach a deployed image classifier new classes on the device, without keeping a sample.

Names are imported when they are first used, so that `import edge_dfcil` is fast and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edge_dfcil._version import __version__

__path__.append(f"{__path__[0]}/_deprecated")  # modules that have moved, at their old names

if TYPE_CHECKING:
    from edge_dfcil.errors import (
        BackboneError,
        BudgetError,
        Cancelled,
        ClassError,
        DataError,
        DivergedError,
        EdgeDfcilError,
        ExportError,
        HubError,
        ModelFileError,
        NotLearnedError,
        SettingError,
        SignatureError,
    )
    from edge_dfcil.learner import Learner
    from edge_dfcil.methods.base import Method
    from edge_dfcil.model.backbones import list_backbones, register_backbone
    from edge_dfcil.model.model import Model
    from edge_dfcil.model.statistics import Statistic
    from edge_dfcil.recipe import RECIPES, Recipe
    from edge_dfcil.results import Commit, Evaluation, MemoryPlan, Prediction, StageReport, TaskReport
    from edge_dfcil.training.callbacks import Callback
    from edge_dfcil.training.session import Session

_HOMES = {
    "edge_dfcil.learner": ("Learner",),
    "edge_dfcil.methods.base": ("Method",),
    "edge_dfcil.model.model": ("Model",),
    "edge_dfcil.model.statistics": ("Statistic",),
    "edge_dfcil.training.session": ("Session",),
    "edge_dfcil.model.backbones": ("list_backbones", "register_backbone"),
    "edge_dfcil.recipe": ("RECIPES", "Recipe"),
    "edge_dfcil.results": ("Commit", "Evaluation", "MemoryPlan", "Prediction", "StageReport", "TaskReport"),
    "edge_dfcil.training.callbacks": ("Callback",),
    "edge_dfcil.errors": (
        "BackboneError",
        "BudgetError",
        "Cancelled",
        "ClassError",
        "DataError",
        "DivergedError",
        "EdgeDfcilError",
        "ExportError",
        "HubError",
        "ModelFileError",
        "NotLearnedError",
        "SettingError",
        "SignatureError",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "RECIPES",
    "BackboneError",
    "BudgetError",
    "Callback",
    "Cancelled",
    "ClassError",
    "Commit",
    "DataError",
    "DivergedError",
    "EdgeDfcilError",
    "Evaluation",
    "ExportError",
    "HubError",
    "Learner",
    "MemoryPlan",
    "Method",
    "Model",
    "ModelFileError",
    "NotLearnedError",
    "Prediction",
    "Recipe",
    "Session",
    "SettingError",
    "SignatureError",
    "StageReport",
    "Statistic",
    "TaskReport",
    "__version__",
    "list_backbones",
    "register_backbone",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edge_dfcil' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
