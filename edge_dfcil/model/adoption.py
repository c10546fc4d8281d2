"""Networks of the caller: a classifier is split into backbone and head, and checked.

`adopt` is for a classifier that was trained elsewhere, `rebuild` for a model file whose backbone is not registered, and
`load_callable` for the command line, which takes the name of a module.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edge_dfcil.errors import BackboneError, ClassError, EdgeDfcilError, ModelFileError
from edge_dfcil.model import backbones, labels
from edge_dfcil.model.contract import (
    BATCHNORM,
    batchnorm_layers,
    check_backbone,
    check_image_size,
    check_layers,
    check_module,
    check_tensors,
    copied,
    features_of,
    probe,
    untouched,
    with_versions,
)
from edge_dfcil.model.network import check_statistics
from edge_dfcil.model.split import SAME, check_split, remove, split
from exporters.texts import shown


@dataclass(frozen=True)
class Adopted:
    """A classifier split in two: ``classifier(x) == head(backbone(x))``.

    Attributes
    ----------
    backbone
        A copy in eval mode, normalised images (N, 3, S, S) to features (N, F).
    head
        Features (N, F) to logits (N, K).
    classes
        The K names, in the order of the outputs.
    image_size
        S.
    mean, std
        What images in [0, 1] are normalised with, per channel.
    name
        The registered name of the backbone; None for a module of the caller.
    """

    backbone: nn.Module
    head: nn.Linear
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str | None


def adopt(
    module: Any,
    classes: Any,
    *,
    image_size: Any = 224,
    mean: Any = None,
    std: Any = None,
    head: str | None = None,
    backbone: str | None = None,
) -> Adopted:
    """Splits a classifier that was trained elsewhere; the parameters are those of `Learner.from_classifier`.

    `module` is copied; it is not changed or switched to another mode. BatchNorm statistics that were never learnt (all means 0
    and variances 1) cause a `UserWarning`.

    Raises
    ------
    BackboneError
        For anything but a module that can be split, inverted, saved and loaded.
    ClassError
        For names that are not a list of strings, that repeat, or whose number is not that of the outputs.
    SettingError
        For an invalid image size, mean or standard deviation.
    """
    module, size = check_module(module), check_image_size(image_size)
    mean, std = check_statistics(mean, std) or backbones.IMAGENET_STATISTICS
    names = _check_names(classes)
    parts = split(module, head)
    check_layers(parts.backbone)
    check_tensors(module)
    check_split(copied(module), parts, size)
    check_backbone(parts.backbone, size)
    if parts.head.out_features == 1:
        raise BackboneError(
            "the classifier has one output, as with a sigmoid; it must have one for each class, as with a softmax. A linear "
            "layer with two outputs, zeros for the first class and the old weights for the second, gives the same probabilities"
        )
    if len(names) != parts.head.out_features:
        raise ClassError(f"{len(names)} names were given for a classifier with {parts.head.out_features} outputs")
    if backbone is not None:
        check_name(parts.backbone, backbone, size)
    _warn_of_untouched(parts.backbone)
    return Adopted(parts.backbone, parts.head, names, size, mean, std, backbone)


def _check_names(classes: Any) -> tuple[str, ...]:
    expected = "pass a list of names in the order of the outputs, such as ['cat', 'dog']"
    if isinstance(classes, (str, bytes, Mapping, Set)) or not isinstance(classes, Iterable):
        kind = "a string" if isinstance(classes, (str, bytes)) else f"a {type(classes).__name__}"
        raise ClassError(f"classes={classes!r} is {kind}; {expected}")
    listed = [str(name) if isinstance(name, str) else name for name in classes]  # NumPy's strings are a subclass of str
    if not listed:
        raise ClassError(f"classes is empty; {expected}")
    return tuple(labels.name_targets(range(len(listed)), None, listed).values())


def check_name(backbone: nn.Module, name: str, image_size: int) -> None:
    """Raises `BackboneError` unless the registered architecture of that name gives the same features with the same tensors.

    Comparing tensors is not enough: the epsilon of a BatchNorm layer, or torchvision's `transform_input`, is in no state dict.
    """
    advice = "leave backbone=None, and pass the module to load()"
    registered = backbones.build(name).eval()
    tensors = backbone.state_dict()
    if {key: value.shape for key, value in tensors.items()} != {k: v.shape for k, v in registered.state_dict().items()}:
        raise BackboneError(f"the classifier's tensors are not those of {name}; {advice}")
    registered.load_state_dict(with_versions(tensors, registered))
    images = probe(registered, image_size)
    expected = features_of(backbone, images.to(next(backbone.parameters()).device)).cpu()
    if float((features_of(registered, images) - expected).abs().max()) > SAME * float(expected.abs().max()):
        raise BackboneError(f"the classifier has the tensors of {name}, but computes something else with them; {advice}")


def _warn_of_untouched(backbone: nn.Module) -> None:
    layers, without = batchnorm_layers(backbone), untouched(backbone)
    if without:
        warnings.warn(
            f"{len(without)} of {len(layers)} BatchNorm layers have statistics that were never learnt (mean 0, variance 1): "
            "there is nothing to invert in them, and the classes may be forgotten with the next task. Check that the network "
            "was trained, and that its buffers were loaded with its weights",
            UserWarning,
            stacklevel=_frames_inside() + 1,
        )


def _frames_inside() -> int:
    """Number of frames from the caller up to the first one outside this package, so that a warning names the user's line."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("edge_dfcil."):
        frame, depth = frame.f_back, depth + 1
    return depth - 1


# Model files


def rebuild(backbone: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The backbone of a model file, with the file's tensors. Layers of a pruned network get the width of their tensors.

    Parameters
    ----------
    backbone
        A registered name, the module that was given to `Learner.from_classifier` or `Learner` (a classifier may still have its
        head, for any number of classes), or the backbone alone. It is copied.
    tensors
        The file's tensors, by their names in the backbone's state dict.

    Raises `ModelFileError` when the tensors of the module and the file differ in names or shapes.
    """
    if isinstance(backbone, str):
        # First without memory, because a name may mean gigabytes. What cannot be built this way is checked below.
        with suppress(BackboneError), _Weightless():
            _check_tensor_names(backbones.build(backbone), tensors)
        module = backbones.build(backbone)
    else:
        module = copied(check_module(backbone, "backbone"))
        head = _head_left_on(module, tensors)
        if head is not None:
            remove(module, head)
    _check_tensor_names(module, tensors)
    narrow(module, tensors)
    try:
        module.load_state_dict(with_versions(tensors, module))
    except (RuntimeError, ValueError) as error:
        raise ModelFileError(
            f"the file does not fit the backbone {type(module).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    return module


class _Weightless(TorchFunctionMode):
    """Layers made inside have no values. `torch.device("meta")` would also remove values of tensors used to define layers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


def _check_tensor_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = set(module.state_dict())
    if own != set(tensors):
        missing, surplus = sorted(own - set(tensors)), sorted(set(tensors) - own)
        whole = type(module).__name__
        parts = [f"lacks {_some(missing)}" if missing else "", f"also has {_some(surplus)}" if surplus else ""]
        raise ModelFileError(
            f"the file does not fit the backbone {whole}: it {' and '.join(filter(None, parts))}. Pass the module "
            "that the model was made with"
        )


def _head_left_on(module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the linear layer that a classifier has and the file's backbone lacks."""
    surplus = set(module.state_dict()) - set(tensors)
    for name, layer in module.named_modules():
        if name and isinstance(layer, nn.Linear) and surplus == {f"{name}.{key}" for key in layer.state_dict()}:
            return name
    return None


def _some(names: list[str]) -> str:
    return shown(", ".join(names[:3]))[:200] + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def narrow(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives each layer the width of its tensors, if they are smaller: a pruned network has the layers of the whole one.

    The values of these layers are to be loaded afterwards. Tensors with other names or numbers of dimensions are ignored.
    """
    for name, layer in backbone.named_modules():
        weight = tensors.get(f"{name}.weight")
        own = getattr(layer, "weight", None)
        if weight is None or own is None or weight.shape == own.shape or weight.dim() != own.dim():
            continue
        if any(new > old for new, old in zip(weight.shape, own.shape, strict=True)):
            continue
        layer.weight = nn.Parameter(own.new_zeros(weight.shape))
        if layer.bias is not None:
            layer.bias = nn.Parameter(own.new_zeros(len(weight)))
        if isinstance(layer, nn.Conv2d):
            depthwise = layer.groups > 1 and layer.groups == layer.in_channels
            layer.groups = len(weight) if depthwise else layer.groups
            layer.out_channels, layer.in_channels = len(weight), weight.shape[1] * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        elif isinstance(layer, BATCHNORM):
            layer.num_features = len(weight)
            layer.running_mean, layer.running_var = own.new_zeros(len(weight)), own.new_ones(len(weight))


# The command line


def load_callable(text: str) -> nn.Module:
    """The module that ``package.module:callable`` returns. It is called without arguments, unless it is itself a module.

    The working directory is searched too. Raises `BackboneError` when it cannot be imported or called, or returns no module.
    """
    path, colon, attribute = text.partition(":")
    if not path or not colon or not attribute:
        raise BackboneError(f"{text!r} does not name a callable; write package.module:callable, such as my_networks:build")
    with _importing_from_here():
        try:
            found: Any = importlib.import_module(path)
            for part in attribute.split("."):
                found = getattr(found, part)
        except Exception as error:  # the import runs the caller's code
            raise BackboneError(f"{text!r} cannot be imported: {type(error).__name__}: {error}") from error
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise BackboneError(f"{text!r} is a {type(found).__name__}; name a function or class that returns an nn.Module")
            try:
                found = found()
            except EdgeDfcilError:
                raise
            except Exception as error:  # as above
                raise BackboneError(f"{text!r} raised {type(error).__name__} when called: {error}") from error
    return check_module(found, text)


@contextmanager
def _importing_from_here() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
