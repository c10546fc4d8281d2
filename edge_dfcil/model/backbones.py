"""Backbones by name: a registry of families, each a function that builds a network by its name.

    Learner("resnet32")                      the residual networks for small images, `cifar:resnet32` in full
    Learner("mobilenet_v3_small")            a torchvision classifier, `torchvision:mobilenet_v3_small` in full
    Learner("timm:resnet18.a1_in1k")         any network of timm with BatchNorm (pip install 'edge-dfcil[timm]')
    register_backbone("mine", build)         Learner("mine:NAME") from here on

`contract.py` defines what a backbone must be. The families of the package are at the end of this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from torch import nn

from edge_dfcil.errors import BackboneError, EdgeDfcilError, SettingError
from edge_dfcil.model.cifar import BasicBlock, CifarResNet
from edge_dfcil.model.contract import (
    BATCHNORM,
    MIN_BATCHNORM_LAYERS,
    batchnorm_layers,
    check_backbone,
    check_image_size,
    check_module,
    copied,
)
from edge_dfcil.model.split import split

__all__ = [
    "BATCHNORM",
    "CIFAR_RESNETS",
    "IMAGENET_STATISTICS",
    "MIN_BATCHNORM_LAYERS",
    "TORCHVISION",
    "Backbone",
    "BasicBlock",
    "CifarResNet",
    "batchnorm_layers",
    "build",
    "check_backbone",
    "check_image_size",
    "create",
    "create_or_copy",
    "list_backbones",
    "names",
    "register_backbone",
    "smaller",
]

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # with which torchvision's weights are trained
DEFAULT_IMAGE_SIZE = 32

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Backbone:
    """A network without its last linear layer, and the format of its images.

    Attributes
    ----------
    module
        Normalised images (N, 3, S, S) to features (N, F), with BatchNorm layers.
    mean, std
        Per-channel mean and standard deviation that normalise images in [0, 1]; None: measured on the first task.
    image_size
        S for which the network was made, in pixels; None: any.
    """

    module: nn.Module
    mean: Channels | None = None
    std: Channels | None = None
    image_size: int | None = None

    @property
    def default_image_size(self) -> int:
        return self.image_size or DEFAULT_IMAGE_SIZE


Build = Callable[[str, "str | None"], "nn.Module | Backbone"]


@dataclass(frozen=True)
class _Family:
    build: Build
    names: Callable[[], Iterable[str]]


_FAMILIES: dict[str, _Family] = {}


def register_backbone(
    family: str, build: Build, *, names: Iterable[str] | Callable[[], Iterable[str]] = (), replace: bool = False
) -> None:
    """Makes every network that `build` knows available as the backbone ``family:name``.

    Raises `SettingError` for a family that is already registered or has an invalid name, and for a `build` that is not callable.

    Parameters
    ----------
    family
        Lower-case letters, digits and underscores.
    build
        Called with the name, without the family, and with the learner's `weights` (None: from scratch). It returns an
        `nn.Module` from normalised images (N, 3, S, S) to features (N, F), or a `Backbone` that also states how its images
        are normalised. For one name it must build the same layers each time: a model file contains the name and the tensors.
    names
        The names that `list_backbones` shows; `build` may know more. A function is called each time the names are listed.
    replace
        Whether to replace a family that is already registered; False raises `SettingError`.

    Examples
    --------
    >>> register_backbone("mine", lambda name, weights: MyNetwork(int(name)), names=["18", "34"])
    >>> Learner("mine:18")
    """
    if not isinstance(family, str) or not re.fullmatch("[a-z][a-z0-9_]*", family):
        raise SettingError(f"family={family!r}; it must be lower-case letters, digits and underscores, such as 'mine'")
    if family in _FAMILIES and not replace:
        raise SettingError(f"the family {family!r} is already registered; choose another name, or pass replace=True")
    if not callable(build):
        raise SettingError(f"build={build!r} of the family {family!r} must be a function of a name and weights")
    listed: Callable[[], Iterable[str]]
    if callable(names):
        listed = names
    else:
        fixed = tuple(names)

        def listed() -> Iterable[str]:
            return fixed

    _FAMILIES[family] = _Family(build, listed)


def list_backbones(filter: str = "*") -> list[str]:
    """The full names of backbones (``family:name``) that match `filter`, a shell pattern such as ``"*resnet*"``, sorted.

    A pattern with a colon is matched with the full name, others with the part after the colon. timm's names are listed when
    timm is installed; its networks without BatchNorm are refused when they are built.
    """
    found = [f"{family}:{name}" for family, entry in _FAMILIES.items() for name in entry.names()]
    return sorted(name for name in found if fnmatchcase(name if ":" in filter else name.partition(":")[2], filter))


def names() -> list[str]:
    """The short names to try first."""
    return [*CIFAR_RESNETS, *TORCHVISION]


def create(name: str, weights: str | None = None) -> Backbone:
    """A backbone by name, freshly initialised or with pretrained `weights` (for example ``"DEFAULT"``).

    Raises `BackboneError` for an unknown name, unavailable weights, and networks without a linear layer to remove.
    """
    if not isinstance(name, str):
        raise BackboneError(f"a backbone's name must be a string such as 'resnet32', not {name!r}")
    if weights is not None and not isinstance(weights, str):
        raise BackboneError(f"weights={weights!r}; pass a string such as 'DEFAULT', or None to train from scratch")
    family, short = _parsed(name)
    try:
        made = _FAMILIES[family].build(short, weights)
    except EdgeDfcilError:
        raise
    except Exception as error:  # whatever a family's own code raises
        raise BackboneError(f"{name} could not be built with weights={weights!r}: {error}") from error
    backbone = made if isinstance(made, Backbone) else Backbone(made)
    if not isinstance(backbone.module, nn.Module):
        raise BackboneError(f"the family {family!r} built a {type(made).__name__} for {name}; it must build an nn.Module")
    return backbone


def build(name: str, weights: str | None = None) -> nn.Module:
    """The module of `create`."""
    return create(name, weights).module


def create_or_copy(backbone: Any, weights: str | None = None) -> Backbone:
    """The backbone of a name, or a copy of the caller's module. Raises `BackboneError` for anything else."""
    if isinstance(backbone, str):
        return create(backbone, weights)
    module = check_module(backbone, "backbone")
    if weights is not None:
        raise SettingError(f"weights={weights!r} is for a backbone by name; load a module's weights before you pass it")
    return Backbone(copied(module))


def _parsed(name: str) -> tuple[str, str]:
    """Family and name within it; a name without a family is one of the CIFAR networks, or torchvision's."""
    family, colon, short = name.partition(":")
    if not colon:
        return ("cifar" if name in CIFAR_RESNETS else "torchvision"), name
    if family not in _FAMILIES:
        raise BackboneError(
            f"{name!r}: no family of backbones is called {family!r}; choose one of {', '.join(_FAMILIES)}, or register it with "
            "edge_dfcil.register_backbone first"
        )
    return family, short


def smaller(name: str | None) -> list[str]:
    """The next backbone that takes less memory, if any; for a module of the caller, the smallest one for photographs."""
    sizes = [f"resnet{depth}" for depth in sorted(CIFAR_RESNETS.values())]
    family, short = _parsed(name) if name is not None else ("", "")
    if family == "cifar":
        return sizes[: sizes.index(short)][-1:]
    return [] if short == "mobilenet_v3_small" else ["mobilenet_v3_small"]


# The residual networks for small images

CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56)}


def _cifar(name: str, weights: str | None) -> nn.Module:
    if name not in CIFAR_RESNETS:
        raise BackboneError(f"no backbone is called 'cifar:{name}'; choose one of {', '.join(CIFAR_RESNETS)}")
    if weights is not None:
        raise BackboneError(f"{name} has no pretrained weights; leave weights=None or choose one of {', '.join(TORCHVISION)}")
    return CifarResNet(CIFAR_RESNETS[name])


register_backbone("cifar", _cifar, names=CIFAR_RESNETS)


# torchvision's classifiers

# Known to work at small sizes; any other torchvision classifier with BatchNorm is accepted by name as well.
TORCHVISION = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "resnet18",
    "resnet50",
)
_WITHOUT_BATCHNORM = re.compile(r"alexnet|convnext|squeezenet|swin|vit_|vgg\d+$")
# They have auxiliary heads, for training only, whose outputs nothing here reads.
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")


def _torchvision(name: str, weights: str | None) -> Backbone:
    from torchvision import models

    if name not in models.list_models(module=models):
        raise BackboneError(f"no backbone is called {name!r}; choose one of {', '.join(names())}, or pass an nn.Module")
    settings: dict[str, Any] = {}
    if name in _WITH_AUXILIARY_HEADS:
        settings = {"aux_logits": False, "transform_input": False, **({"init_weights": True} if weights is None else {})}
    try:
        classifier = models.get_model(name, weights=weights, **settings)
        mean, std = _torchvision_statistics(name, weights)
    except Exception as error:  # torchvision raises KeyError, ValueError or URLError here, depending on the cause
        raise BackboneError(f"torchvision could not give {name} with weights={weights!r}: {error}") from error
    return Backbone(split(classifier).backbone, mean, std)


def _torchvision_statistics(name: str, weights: str | None) -> tuple[Channels | None, Channels | None]:
    """Mean and standard deviation that pretrained weights expect."""
    if weights is None:
        return None, None
    if name in _WITH_AUXILIARY_HEADS:
        # They were trained with these. `transform_input`, which converts from ImageNet's, is off: a file does not store it.
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    from torchvision import models

    enum = models.get_model_weights(name)
    transforms = (enum.DEFAULT if weights == "DEFAULT" else enum[weights.rpartition(".")[2]]).transforms()
    return tuple(transforms.mean), tuple(transforms.std)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [name for name in models.list_models(module=models) if not _WITHOUT_BATCHNORM.match(name)]


register_backbone("torchvision", _torchvision, names=_torchvision_names)


# timm's networks


def _timm(name: str, weights: str | None) -> Backbone:
    timm = _import_timm()
    if weights not in (None, "DEFAULT"):
        raise BackboneError(f"weights={weights!r}: timm has its weights in the name (resnet18.a1_in1k); pass 'DEFAULT' or None")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.partition('.')[0][:8]}*")[:5]
        raise BackboneError(f"timm has no model {name!r}{'; ' + ', '.join(close) if close else ''}; see timm.list_models()")
    try:
        module = timm.create_model(name, pretrained=weights is not None, num_classes=0)
    except Exception as error:  # without a network connection, timm raises errors of its download library
        raise BackboneError(
            f"timm could not give {name} with weights={weights!r}: {error}; weights=None builds it without a download"
        ) from error
    config = timm.data.resolve_model_data_config(module)
    channels, *side = config["input_size"]
    if channels != 3:
        raise BackboneError(f"timm:{name} takes images with {channels} channels; choose a network for 3")
    return Backbone(module, tuple(config["mean"]), tuple(config["std"]), max(side))


def _timm_names() -> list[str]:
    return list(_import_timm().list_models()) if importlib.util.find_spec("timm") else []


def _import_timm() -> ModuleType:
    # Its download library sends usage reports unless this is set before the import.
    before = os.environ.get("HF_HUB_DISABLE_TELEMETRY")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        importlib.import_module("timm.data")
        return importlib.import_module("timm")
    except ImportError as error:
        raise BackboneError(f"'timm:...' needs timm ({error}): pip install 'edge-dfcil[timm]'") from error
    finally:
        if before is None:
            del os.environ["HF_HUB_DISABLE_TELEMETRY"]
        else:
            os.environ["HF_HUB_DISABLE_TELEMETRY"] = before


register_backbone("timm", _timm, names=_timm_names)
