"""Modules that have moved answer at their old names for one release, with a warning that names the new place.

The old names lie in `edge_dfcil/_deprecated`, a file each, which is part of the package's search path.
"""

from __future__ import annotations

import importlib
import sys
import warnings


def forward(old: str, *new: str) -> None:
    """Makes the module `old` show the public and private names of the modules `new`, and warns whoever imports it."""
    warnings.warn(
        f"{old} has moved to {' and '.join(new)}; the old name goes with the next release", DeprecationWarning, stacklevel=2
    )
    module = sys.modules[old]
    for name in reversed(new):
        vars(module).update({key: value for key, value in vars(importlib.import_module(name)).items() if key[:2] != "__"})
