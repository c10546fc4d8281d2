"""Everything that a model keeps, by role: the data that `edge-dfcil inspect` prints, for the page."""

from __future__ import annotations

from typing import Any

from edge_dfcil import Model
from edge_dfcil.privacy.account import Kept, account


def tensors(model: Model) -> list[Kept]:
    """Every tensor of a model, in the order of their names."""
    return account(model.tensors(), model.settings())


def by_role(model: Model) -> dict[str, Any]:
    """`bytes` of all tensors, and `roles`: name, bytes, number of tensors, whether they are derived from pictures."""
    kept = tensors(model)
    roles = [
        {
            "role": kind.replace("_", " "),
            "bytes": sum(one.bytes for one in kept if one.kind == kind),
            "tensors": sum(one.kind == kind for one in kept),
            "from_data": any(one.from_data for one in kept if one.kind == kind),
        }
        for kind in dict.fromkeys(one.kind for one in kept)
    ]
    return {"bytes": sum(one.bytes for one in kept), "roles": sorted(roles, key=lambda role: -role["bytes"])}
