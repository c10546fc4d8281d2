"""Class names: which strings are valid, when two are the same, and which name a loader's target value has."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from torch import Tensor

from edge_dfcil.errors import ClassError, DataError
from exporters.texts import BLANKS, problem

Classes = Sequence[str] | Mapping[Any, str]

_VARIATIONS = {"\ufe0e", "\ufe0f"}  # a character as text or as emoji
_SHOWN = 20  # names in a message, at most


# Single names


def clean_name(name: Any, owner: str = "a class") -> str:
    """A class name in Unicode's composed form (NFC).

    Raises `ClassError` for a name that is not a string, is empty or blank, begins or ends with a space, or contains a character
    that cannot be seen or stored: control and format characters, terminal escapes, halves of surrogate pairs.
    """
    if not isinstance(name, str) or not name.strip():
        raise ClassError(f"the name of {owner} is {name!r}; it must be a string that is not empty")
    name = str(name)  # also for NumPy's string type
    if name != name.strip():
        raise ClassError(f"the name of {owner} is {name!r}, with a space at its beginning or end; make it {name.strip()!r}")
    for place in range(len(name)):
        found = problem(name, place)
        if found:
            raise ClassError(f"the name of {owner} is {_visible(name)}, with {found} at position {place}; rename it")
    return unicodedata.normalize("NFC", name)


def _visible(name: str) -> str:
    """A name for a message; invisible characters are escaped."""
    return "".join(ascii(c)[1:-1] if c in _VARIATIONS or c in BLANKS else c for c in repr(name))


def same_name(a: str, b: str) -> bool:
    """Whether two names are equal in Unicode's composed form (macOS stores folder names in the decomposed form)."""
    return unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)


def folded(name: str) -> str:
    """A key that is equal for names that differ only by likely typos: in case, spaces or invisible characters.

    Single letters keep their case, because "a" and "A" are two classes of handwriting.
    """
    seen = "".join(c for c in name if c not in _VARIATIONS and c not in BLANKS and unicodedata.category(c) not in ("Cc", "Cf"))
    words = " ".join((seen if seen.strip() else name).split())
    return unicodedata.normalize("NFC", words if len(words) == 1 else words.lower())


# Several names


def check_names(names: Iterable[Any], owner: str = "a class") -> tuple[str, ...]:
    """Names as `clean_name` returns them. Raises `ClassError` for a name that is invalid, repeats, or looks like a typo of
    another one, and for anything but a list of names."""
    if isinstance(names, (str, bytes, int, Set)) or not isinstance(names, Iterable):
        names = _ordered(names)
    cleaned = tuple(clean_name(name, owner) for name in names)
    _check_distinct(cleaned)
    return cleaned


def match_known(names: Mapping[Any, str], known: Sequence[str]) -> dict[Any, str]:
    """Each known name in its known spelling; new names are unchanged.

    Raises `ClassError` for a new name that differs from a known one only in case, spaces or invisible characters.
    """
    exact = set(known)
    spellings = {_composed(name): name for name in reversed(known)}  # an old model may have two such names: the first one counts
    slips = {folded(name): name for name in known}
    matched = {}
    for key, name in names.items():
        spelling = name if name in exact else spellings.get(_composed(name))
        if spelling is None and folded(name) in slips:
            raise ClassError(
                f"{name!r} differs from the known class {slips[folded(name)]!r} only in case, spaces or invisible characters; "
                "use that spelling to refresh the class, or choose another name"
            )
        matched[key] = name if spelling is None else spelling
    return matched


def outputs_of(names: Mapping[Any, str], known: Sequence[str]) -> dict[Any, int]:
    """The output of each target's name. Raises `ClassError` for a name that is not known."""
    exact = {name: output for output, name in enumerate(known)}
    spelt = {_composed(name): output for output, name in reversed([*enumerate(known)])}
    outputs = {key: exact.get(name, spelt.get(_composed(name))) for key, name in names.items()}
    unknown = [name for key, name in names.items() if outputs[key] is None]
    if unknown:
        raise ClassError(f"the learner does not know {_listed(unknown)}{_meant(unknown, known)}; it knows {_listed(known)}")
    return {key: output for key, output in outputs.items() if output is not None}


def _composed(name: Any) -> Any:
    return unicodedata.normalize("NFC", name) if isinstance(name, str) else name


def _meant(unknown: Sequence[Any], known: Sequence[str]) -> str:
    slips = {folded(name): name for name in known}
    meant = [slips[folded(name)] for name in unknown if isinstance(name, str) and folded(name) in slips]
    return f" (is {_listed(meant)} meant?)" if meant else ""


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(name) for name in names[:_SHOWN]) + more


def _check_distinct(names: Iterable[Any], repeated: bool = False) -> None:
    """Raises `ClassError` when a name repeats (unless `repeated`), or when two names look like typos of each other."""
    same: set[Any] = set()
    alike: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            continue
        composed = unicodedata.normalize("NFC", name)
        if composed in same and not repeated:
            raise ClassError(f"the class name {name!r} appears twice in classes; names must differ")
        other = alike.setdefault(folded(name), name)
        if other is not name:
            raise ClassError(
                f"the class names {_visible(other)} and {_visible(name)} differ only in case, spaces or invisible characters; "
                "if they are one class, use one name, else choose names that differ more"
            )
        same.add(composed)


def asked(names: Any) -> list[str]:
    """The class names in an argument, each once: one string, or several. Raises `ClassError` for anything else."""
    some = [names] if isinstance(names, str) else names
    if not isinstance(some, Iterable) or isinstance(some, bytes):
        raise ClassError(f"{names!a:.80} is a {type(names).__name__}; pass a list of class names")
    found = list(some)
    for name in found:
        if not isinstance(name, str):
            raise ClassError(f"{name!a:.80} is a {type(name).__name__}; class names are strings")
    return list(dict.fromkeys(found))


# Names of targets


def outputs_of_targets(targets: Sequence[Any], loader: Any, classes: Classes | None, known: Sequence[str]) -> list[int]:
    """The output of each image's class, among the known ones. Several targets may share a name: that of a merged class.

    Raises the errors of `name_targets`, and `ClassError` for an unknown class.
    """
    outputs = outputs_of(name_targets(set(targets), loader, classes, repeated=True), known)
    return [outputs[target] for target in targets]


def name_targets(targets: Iterable[Any], loader: Any, classes: Classes | None, *, repeated: bool = False) -> dict[Any, str]:
    """The name of each target value that a loader gave, in the order of the values.

    Parameters
    ----------
    repeated
        Whether several targets may have one name.
    classes
        A list indexed by target, or a mapping from target; None takes the names of the loader's data set (`classes`, or a
        label's `names` in Hugging Face's `features`), also through subsets. String targets are their own names.

    Raises `ClassError` for a repeated or unusable name, `DataError` for a target without one.
    """
    values = sorted(targets, key=lambda value: (str(type(value)), value))
    if classes is None and values and all(isinstance(value, str) for value in values):
        classes = {value: value for value in values}
    lookup = _lookup(_dataset_classes(loader) if classes is None else classes)
    _check_distinct(lookup.values(), repeated)
    own = {name: name for name in lookup.values() if isinstance(name, str)}
    names = {}
    for target in values:
        name = lookup.get(target, own.get(target) if isinstance(target, str) else None)
        if name is None and target not in lookup:
            raise DataError(_nameless(target, lookup))
        names[target] = clean_name(name, f"target {target!r}")
    return names


def _lookup(classes: Any) -> dict[Any, Any]:
    """Names by target value. Raises `ClassError` for anything but a list or a mapping."""
    if isinstance(classes, Mapping):
        return {plain_value(key): name for key, name in classes.items()}
    return dict(enumerate(_ordered(classes)))


def _ordered(classes: Any) -> list[Any]:
    if isinstance(classes, (str, bytes)):
        raise ClassError(f"classes={classes!r} is one string; pass a list of names, [{classes!r}]")
    if isinstance(classes, Set):
        raise ClassError(
            f"classes is a {type(classes).__name__}, whose order is arbitrary; pass a list whose order is that of the targets"
        )
    if isinstance(classes, Iterable) and hasattr(classes, "__len__") and not isinstance(classes, Tensor):
        return [name.item() if isinstance(name, np.generic) else name for name in classes]
    raise ClassError(f"classes={classes!r} is a {type(classes).__name__}; pass a list of names, or a mapping from target to name")


def plain_value(value: Any) -> Any:
    """A number as a Python number: a 0-dimensional tensor or array does not hash like its value. Other values are unchanged."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    return int(value) if isinstance(value, bool) else value


def _nameless(target: Any, lookup: Mapping[Any, Any]) -> str:
    if lookup and all(isinstance(key, str) and isinstance(name, int) for key, name in lookup.items()):
        return (
            f"target {target!r} has no name: classes maps names to targets; invert it: "
            "{target: name for name, target in classes.items()}"
        )
    known = ", ".join(repr(key) for key in list(lookup)[:8])
    return f"target {target!r} has no name; classes names the targets {known}{', ...' if len(lookup) > 8 else ''}"


def _dataset_classes(loader: Any) -> Any:
    dataset = getattr(loader, "dataset", None)
    while dataset is not None:
        found = _own_classes(dataset)
        if found is not None:
            return found
        parts = getattr(dataset, "datasets", None)  # torch's ConcatDataset
        if parts:
            named = [_own_classes(part) for part in parts]
            if named[0] is not None and all(list(other or ()) == list(named[0]) for other in named):
                return named[0]
        dataset = getattr(dataset, "dataset", None)  # torch's Subset and similar
    raise ClassError("the loader's data set does not name its classes; pass classes=[...], a name for each target value")


def _own_classes(dataset: Any) -> Any:
    """The class names that a data set of torchvision or Hugging Face states."""
    if getattr(dataset, "classes", None) is not None:
        return dataset.classes
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        for key in ("label", "labels", "target", "targets"):
            if getattr(features.get(key), "names", None) is not None:
                return features[key].names
    return None
