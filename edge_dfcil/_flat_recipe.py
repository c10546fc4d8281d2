"""The flat names that a recipe's settings had before there were groups: accepted for one release, with a warning.

Model files of schema 1 contain these names and must remain readable, so the table is kept when the warnings are removed.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from types import FrameType

_SAME = {
    "schedule": (
        "epochs first_epochs min_steps milestones learning_rate momentum weight_decay clip_gradient batchnorm_momentum freeze "
        "drop_incomplete"
    ),
    "augmentation": "brightness contrast flip crop_padding mirrored_answers",
    "generator": "latent width",
    "inversion": "content content_temperature diversity statistics smoothness competition",
    "remember": "dreams pool mu local_cross_entropy head_finetuning importance distil_on",
    "refine": "align_head",
}
_PREFIXED = {
    "generator": ("generator_", "steps batch learning_rate schedule"),
    "pixels": ("pixel_", "steps batch learning_rate statistics first_layer variation l2 competition jitter"),
    "refine": ("refine_", "epochs min_steps learning_rate"),
}
# Old flat name: dotted name.
NAMES = {
    **{name: f"{group}.{name}" for group, names in _SAME.items() for name in names.split()},
    **{f"{prefix}{name}": f"{group}.{name}" for group, (prefix, names) in _PREFIXED.items() for name in names.split()},
    "schedule": "schedule.shape",
    "augment_dreams": "inversion.augment",
}


def warn(dotted: Iterable[str], message: str) -> None:
    """Warns of old names, at the line of the caller's code, not of this module or of `dataclasses`."""
    frame: FrameType | None = sys._getframe()
    level = 0
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "edge_dfcil.recipe", "dataclasses"):
        frame, level = frame.f_back, level + 1
    new = ", ".join(f"'{name}'" for name in dotted)
    warnings.warn(f"{message} {new}; the next release removes the old names", DeprecationWarning, stacklevel=level + 1)
