"""Labels are names; the learner owns the mapping from a loader's target values to names, and from names to outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edge_dfcil.errors import ClassError, DataError

Classes = Sequence[str] | Mapping[Any, str]


def name_targets(targets: Iterable[Any], loader: Any, classes: Classes | None) -> dict[Any, str]:
    """The name of each target value that a loader gave, in the order of the values.

    Parameters
    ----------
    classes
        A list indexed by target, or a mapping from target; None takes ``loader.dataset.classes``, through subsets too.

    Raises `ClassError` for a repeated or unusable name, `DataError` for a target without one.
    """
    if classes is None:
        classes = _dataset_classes(loader)
    if isinstance(classes, str):
        raise ClassError(f"classes={classes!r} is one text; pass a list of names, [{classes!r}]")
    lookup = dict(classes) if isinstance(classes, Mapping) else dict(enumerate(classes))
    repeated = _repeated(lookup.values())
    if repeated is not None:
        raise ClassError(f"the class name {repeated!r} appears twice in classes; names must differ")
    names = {}
    for target in sorted(targets, key=lambda value: (str(type(value)), value)):
        if target not in lookup:
            known = ", ".join(repr(key) for key in list(lookup)[:8])
            raise DataError(
                f"target {target!r} has no name; classes names the targets {known}{', ...' if len(lookup) > 8 else ''}"
            )
        name = lookup[target]
        if not isinstance(name, str) or not name.strip():
            raise ClassError(f"the name of target {target!r} is {name!r}; it must be a text that is not empty")
        names[target] = name
    return names


def _dataset_classes(loader: Any) -> Classes:
    dataset = getattr(loader, "dataset", None)
    while dataset is not None:
        if getattr(dataset, "classes", None) is not None:
            found: Classes = dataset.classes
            return found
        dataset = getattr(dataset, "dataset", None)  # torch's Subset and its like
    raise ClassError("the loader's data set does not name its classes; pass classes=[...], a name for each target value")


def _repeated(names: Iterable[str]) -> str | None:
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def outputs_of(names: Mapping[Any, str], known: Sequence[str]) -> dict[Any, int]:
    """The output of each target's name. Raises `ClassError` for a name that is not known."""
    index = {name: output for output, name in enumerate(known)}
    unknown = [name for name in names.values() if name not in index]
    if unknown:
        raise ClassError(f"the learner does not know {', '.join(map(repr, unknown))}; it knows {', '.join(map(repr, known))}")
    return {target: index[name] for target, name in names.items()}
