"""Descriptions of what a model file contains, for `edge-dfcil inspect` and for model cards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edge_dfcil.errors import SettingError
from edge_dfcil.privacy.account import Kept
from edge_dfcil.recipe import Recipe


def bytes_by_kind(kept: Iterable[Kept]) -> dict[str, int]:
    """The bytes of all tensors of a kind, by kind."""
    total: dict[str, int] = {}
    for one in kept:
        total[one.kind] = total.get(one.kind, 0) + one.bytes
    return total


def recipe_line(values: dict[str, Any]) -> str:
    """A file's recipe: its preset, the settings that differ, and which class statistics it may store."""
    try:
        recipe = Recipe.from_dict(values)
    except SettingError as error:
        return f"recipe of another version: {error}"
    remember, changes = recipe.remember, recipe.differences()
    changed = "".join(f", {name} {value}" for name, value in changes.items())
    stored = f"of at least {remember.min_images} pictures" if remember.class_statistics else "none"
    return f"recipe {recipe.preset} (version {recipe.version}){changed}; class statistics that may be stored: {stored}"


def calibration_line(values: dict[str, Any]) -> str:
    """A file's calibration: on how many pictures, the temperature, and whether there are thresholds."""
    rejects = f"thresholds that reject {values['false_rejections']:.1%} of them" if values["thresholds"] else "no thresholds"
    return f"calibrated on {values['images']} pictures: temperature {values['temperature']:.3f}, {rejects}"
