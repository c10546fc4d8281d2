"""Backbones: modules that turn normalised images (N, 3, S, S) into features (N, F).

Three kinds, one contract: the CIFAR residual networks below, torchvision's classifiers by name with their last linear
layer taken off, and any `nn.Module` of the caller's own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil.errors import BackboneError

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what torchvision's weights are trained with

# Inversion matches the statistics of BatchNorm inputs (ABD, eq. 4). With fewer layers than this, dreams are noise.
MIN_BATCHNORM_LAYERS = 3
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut: subsampled in space, zero-padded in channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra or self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The residual network for small images (He et al., CVPR 2016, section 4.2): depth 6 n + 2, 16/32/64 channels.

    `depth` 32 is the classifier of the ABD paper: 31 BatchNorm layers, 470,004 parameters with 100 outputs.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, channels_in, stages = (depth - 2) // 6, 16, []
        for channels in (16, 32, 64):
            first = BasicBlock(channels_in, channels, stride=1 if channels == 16 else 2)
            stages.append(nn.Sequential(first, *(BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))))
            channels_in = channels
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stages(x)  # (N, 64, S/4, S/4)
        return x.mean((2, 3))  # (N, 64)


CIFAR_RESNETS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56)}

# Known to work at small sizes; any other torchvision classifier with BatchNorm is accepted by name as well.
TORCHVISION = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "resnet18",
    "resnet50",
)


def names() -> list[str]:
    """The registered backbone names."""
    return [*CIFAR_RESNETS, *TORCHVISION]


def build(name: str, weights: str | None = None) -> nn.Module:
    """A backbone by name, freshly initialised or with torchvision's `weights` (for example ``"DEFAULT"``).

    Raises `BackboneError` for an unknown name, weights that cannot be had, and networks that cannot be inverted.
    """
    if name in CIFAR_RESNETS:
        if weights is not None:
            raise BackboneError(f"{name} has no pretrained weights; leave weights=None or choose one of {', '.join(TORCHVISION)}")
        return CifarResNet(CIFAR_RESNETS[name])
    from torchvision import models

    if name not in models.list_models(module=models):
        raise BackboneError(f"no backbone is called {name!r}; choose one of {', '.join(names())}, or pass an nn.Module")
    try:
        classifier = models.get_model(name, weights=weights)
    except Exception as error:  # torchvision raises KeyError, ValueError or URLError here, by cause
        raise BackboneError(f"torchvision could not give {name} with weights={weights!r}: {error}") from error
    return split(classifier).backbone


def smaller(name: str | None) -> list[str]:
    """The next registered backbone that takes less memory, if there is one; for an own module, the smallest for photographs."""
    sizes = [f"resnet{depth}" for depth in sorted(CIFAR_RESNETS.values())]
    if name in CIFAR_RESNETS:
        return sizes[: sizes.index(name)][-1:]
    return [] if name == "mobilenet_v3_small" else ["mobilenet_v3_small"]


@dataclass(frozen=True)
class Split:
    """A classifier taken apart: ``classifier(x) == head(backbone(x))``."""

    backbone: nn.Module
    head: nn.Linear


def split(classifier: nn.Module, head: str | None = None) -> Split:
    """Takes the final linear layer off a copy of `classifier`.

    Parameters
    ----------
    classifier
        Any module that ends in one `nn.Linear`; it is not changed.
    head
        The layer's dotted name; None takes the last `nn.Linear`.

    Raises `BackboneError` when there is no such layer.
    """
    backbone = copy.deepcopy(classifier)
    linears = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear) and name]
    if head is not None and head not in linears:
        raise BackboneError(f"head={head!r} is not a linear layer of the classifier; it has {', '.join(linears) or 'none'}")
    if not linears:
        raise BackboneError("the classifier has no nn.Linear layer to take as its head; wrap it so that it ends in one")
    name = head or linears[-1]
    linear = backbone.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    parent, _, attribute = name.rpartition(".")
    setattr(backbone.get_submodule(parent), attribute, nn.Identity())
    return Split(backbone, linear)


def check_split(classifier: nn.Module, parts: Split, image_size: int) -> None:
    """Raises `BackboneError` unless the parts give what the whole classifier gives."""
    probe = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(classifier.parameters()).device)
    was_training = classifier.training
    try:
        with torch.no_grad():
            whole, features = classifier.eval()(probe), parts.backbone.eval()(probe)
            same = isinstance(whole, Tensor) and features.dim() == 2 and torch.allclose(whole, parts.head(features), atol=1e-4)
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackboneError(f"the classifier does not run on images of (2, 3, {image_size}, {image_size}): {error}") from error
    finally:
        classifier.train(was_training)
    if not same:
        raise BackboneError(
            "the classifier's answer is not its last linear layer applied to features; name the layer with head='...', "
            "and leave softmax out of the module"
        )


def check_name(backbone: nn.Module, name: str) -> None:
    """Raises `BackboneError` unless the backbone has the tensors of the registered architecture of that name."""
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    if shapes != {key: value.shape for key, value in build(name).state_dict().items()}:
        raise BackboneError(
            f"the classifier's tensors are not those of {name}; leave backbone=None, and pass the module to load()"
        )


def narrow(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives each layer the width of its tensors, where those are smaller: a pruned network has the layers of the whole one.

    What the layers hold afterwards is not set. Tensors of other names or kinds are left to who loads them.
    """
    for name, layer in backbone.named_modules():
        weight = tensors.get(f"{name}.weight")
        own = getattr(layer, "weight", None)
        if weight is None or own is None or weight.shape == own.shape or weight.dim() != own.dim():
            continue
        if any(new > old for new, old in zip(weight.shape, own.shape, strict=True)):
            continue
        layer.weight = nn.Parameter(own.new_empty(weight.shape))
        if layer.bias is not None:
            layer.bias = nn.Parameter(own.new_empty(len(weight)))
        if isinstance(layer, nn.Conv2d):
            depthwise = layer.groups > 1 and layer.groups == layer.in_channels
            layer.groups = len(weight) if depthwise else layer.groups
            layer.out_channels, layer.in_channels = len(weight), weight.shape[1] * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        elif isinstance(layer, BATCHNORM):
            layer.num_features = len(weight)
            layer.running_mean, layer.running_var = own.new_zeros(len(weight)), own.new_ones(len(weight))


def batchnorm_layers(module: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm]:
    """The layers whose running statistics inversion matches."""
    return [m for m in module.modules() if isinstance(m, BATCHNORM) and m.running_mean is not None]


def check_backbone(backbone: nn.Module, image_size: int) -> int:
    """The number of features F of a backbone at this image size.

    Raises `BackboneError` when it does not run, gives no (N, F) features, or has too few BatchNorm layers to invert.
    """
    layers = len(batchnorm_layers(backbone))
    if layers < MIN_BATCHNORM_LAYERS:
        raise BackboneError(
            f"this network has {layers} BatchNorm layers with running statistics; at least {MIN_BATCHNORM_LAYERS} are "
            "needed, because dreams are made by matching those statistics. Choose a network that normalises with BatchNorm"
        )
    was_training = backbone.training
    reference = next(backbone.parameters())
    try:
        with torch.no_grad():
            features = backbone.eval()(torch.zeros(2, 3, image_size, image_size, device=reference.device))
    except (RuntimeError, ValueError, TypeError) as error:
        first = re.split(r"[\n]", str(error))[0]
        raise BackboneError(f"the backbone does not run on images of (2, 3, {image_size}, {image_size}): {first}") from error
    finally:
        backbone.train(was_training)
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise BackboneError(f"the backbone gave {shape} for two images; it must give features of shape (2, F)")
    return int(features.shape[1])
