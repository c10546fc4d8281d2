"""Checks all of a model file before any of its tensors is used: a correct SHA-256 does not prove that the settings are valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edge_dfcil import devices
from edge_dfcil.errors import SettingError
from edge_dfcil.model import statistics
from edge_dfcil.model.contract import check_image_size, check_values
from edge_dfcil.model.labels import clean_name
from edge_dfcil.model.network import Network, check_statistics

# Types of settings that older files may lack.
_KINDS: dict[str, tuple[type, ...]] = {
    "backbone": (str, type(None)),
    "architecture": (str,),
    "mirrored": (bool,),
    "spread": (bool,),
    "pretrained": (bool,),
    "scales": (list,),
    "statistics": (dict,),
    "calibration": (dict, type(None)),
    "method": (str,),
    "recipe": (dict,),
    "last_task": (str, type(None)),
}


def check(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Checks that each setting is valid, that the head and the class statistics have a row for each output, and that all numbers
    are finite. `adoption.rebuild` and `check_network` check the backbone.

    Raises `SettingError`, `ClassError` or `BackboneError`.
    """
    for name, kinds in _KINDS.items():
        if name in settings and not isinstance(settings[name], kinds):
            raise SettingError(f"its setting {name!r} is {_of(settings[name])}; it must be {_kind(kinds[0])}")
    check_image_size(settings["image_size"])
    _check_pixels(settings["mean"], settings["std"])
    if "seed" in settings:
        devices.check_seed(settings["seed"])
    scales = settings.get("scales", [])
    if not all(isinstance(name, str) for name in scales) or len(set(scales)) < len(scales):
        raise SettingError(f"its scales are {_of(scales)}; they must be names of layers, each once")
    outputs = _check_tasks(settings["tasks"])
    weight, bias = tensors["head.weight"], tensors["head.bias"]
    if weight.dim() != 2 or len(weight) != outputs or not weight.shape[1] or bias.shape != (outputs,):
        shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise SettingError(f"its head has the shapes {shapes}; its tasks have {outputs} outputs")
    check_values(tensors)
    statistics.check_stored(tensors, settings.get("statistics", {}), outputs)


def check_network(tensors: Mapping[str, Tensor], network: Network, kept: statistics.Statistics) -> None:
    """Raises `SettingError` unless the tensors have the network's dtypes, and the statistics its number of features."""
    for name, own in network.state_dict().items():
        if name in tensors and tensors[name].dtype != own.dtype:
            raise SettingError(f"{name} is {tensors[name].dtype}; it must be {own.dtype}")
    for name, statistic in kept.items():
        if not any(statistics.is_of(statistic, features) for features in (network.own_features, network.all_features)):
            shape = tuple(statistic.values.shape)
            raise SettingError(
                f"the statistic {name!r} has the shape {shape}, but the network has {network.all_features} features"
            )


def _check_pixels(mean: Any, std: Any) -> None:
    given = [*mean, *std] if isinstance(mean, list) and isinstance(std, list) else [mean, std]
    if given == [None, None]:
        return
    if not all(type(value) in (int, float) for value in given):
        raise SettingError(f"its mean and std are {_of([mean, std])}; they must be three numbers each, one per channel")
    check_statistics(mean, std)


def _check_tasks(tasks: Any) -> int:
    """The number of outputs."""
    if not isinstance(tasks, list) or not all(isinstance(task, list) and task for task in tasks):
        raise SettingError(f"its tasks are {_of(tasks)}; they must be lists of class names")
    names = [name for task in tasks for name in task]
    for name in names:
        clean_name(name)  # older files may contain one in Unicode's decomposed form
    return len(names)


def _of(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(kind: type) -> str:
    return {str: "a string", bool: "true or false", list: "a list", dict: "an object"}[kind]
