"""Modules that have moved can be imported by their old names for one release, with a warning that gives the new name.

`edge_dfcil/_deprecated`, which is part of the package's search path, has one file for each old name.
"""

from __future__ import annotations

import importlib
import sys
import warnings


def forward(old: str, *new: str) -> None:
    """Copies the public and private names of the modules `new` into the module `old`, and warns its importer."""
    warnings.warn(
        f"{old} has moved to {' and '.join(new)}; the next release removes the old name", DeprecationWarning, stacklevel=2
    )
    module = sys.modules[old]
    for name in reversed(new):
        vars(module).update({key: value for key, value in vars(importlib.import_module(name)).items() if key[:2] != "__"})
