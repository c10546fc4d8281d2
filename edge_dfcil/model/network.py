"""Network: preprocessing, backbone and growing head as one module, so that an app always passes plain pixels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_dfcil import devices
from edge_dfcil.errors import SettingError
from edge_dfcil.model.contract import probe, with_versions
from edge_dfcil.model.preprocessing import fit
from edge_dfcil.model.scales import Scales


class Network(nn.Module):
    """A classifier whose head grows with new classes.

    Parameters
    ----------
    backbone
        Normalised images (N, 3, S, S) to features (N, F).
    features
        F; None: measured.
    image_size
        S, in pixels. Other sizes are scaled and cropped to it.
    scales
        Layers of the backbone whose pooled feature maps are features too (`model/scales.py`).
    spread
        Whether the maps' standard deviations are features.

    Attributes
    ----------
    mean, std
        Per-channel mean and standard deviation that normalise images in [0, 1], (3, 1, 1); 0 and 1 until `set_statistics`.
    rotations
        A head for the classes of rotated images, while the first task is learnt with them.
    mirrored
        Whether `forward` returns the mean of the logits of images and of their mirror images.
    """

    mean: Tensor
    std: Tensor
    mirrored = False

    def __init__(
        self, backbone: nn.Module, features: int | None, image_size: int, scales: Sequence[str] = (), spread: bool = True
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.backbone = backbone
        self.scales = Scales(backbone, scales, spread)
        self.reads_scales = bool(scales)  # else the head takes only the backbone's own features
        self.rotations: nn.Linear | None = None
        self.own_features, self.all_features = self._measured() if scales or features is None else (features, features)
        self.head = linear_head(self.all_features, 0)
        # Settings, not weights: they are stored with the learner's settings.
        self.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(3, 1, 1), persistent=False)

    def _measured(self) -> tuple[int, int]:
        """The number of the backbone's own features, and of the features of all scales."""
        try:
            trial = copy.deepcopy(self.backbone).to("meta")  # takes no memory, for any image size
            images = torch.empty(2, 3, self.image_size, self.image_size, device="meta")
            return _features_of(trial, Scales(trial, self.scales.layers, self.scales.spread), images)
        except Exception:  # a module of the caller's own may need values
            return _features_of(self.backbone, self.scales, probe(self.backbone, self.image_size))

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Sets the mean and standard deviation that normalise images, three numbers each."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values, device="cpu").view(3, 1, 1))

    @property
    def n_classes(self) -> int:
        return self.head.out_features

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 or float images (N, 3, H, W) as float in [0, 1] at the network's size, on its device."""
        if images.is_floating_point():
            images = images.float()  # before they move: MPS has no float64
        images = fit(images.to(self.mean.device, non_blocking=True), self.image_size)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        return images.contiguous(memory_format=devices.memory_format(images.device))

    def normalize(self, pixels: Tensor) -> Tensor:
        """Float images in [0, 1] to the normalised images that the backbone takes."""
        return (pixels - self.mean) / self.std

    def denormalize(self, images: Tensor) -> Tensor:
        """Normalised images to uint8 images."""
        return ((images.float() * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def features(self, images: Tensor) -> Tensor:
        """The head's inputs (N, F) for normalised images (N, 3, S, S): the backbone's features, and those of the other scales."""
        if self.reads_scales:
            return self.of_all_scales(images)
        features: Tensor = self.backbone(images)
        return features

    def of_all_scales(self, images: Tensor) -> Tensor:
        """The backbone's own features of normalised images, followed by those of the other scales (N, all_features)."""
        return self.scales.features(self.backbone, images)

    def without_scales(self, weight: Tensor, bias: Tensor) -> Network:
        """A copy with only the backbone's own features, and a head (C, own_features) and (C,) over them."""
        network = self.grown(0)
        network.scales, network.all_features = Scales(network.backbone, ()), network.own_features
        network.set_head(weight, bias)
        return network

    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Replaces the head: (C, all_features) and (C,), or (C, own_features) over the backbone's own features only."""
        head = linear_head(weight.shape[1], len(weight)).to(weight.device)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        self.head = head.requires_grad_(self.head.weight.requires_grad)
        self.reads_scales = bool(self.scales.layers) and weight.shape[1] == self.all_features

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N, n_classes) of normalised images (N, 3, S, S)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, n_classes) of plain images (N, 3, H, W), uint8 or float in [0, 1]."""
        images = self.normalize(self.pixels(images))
        if self.mirrored:
            return self.classify(torch.cat([images, images.flip(3)])).unflatten(0, (2, -1)).mean(0)
        return self.classify(images)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`, also for plain tensors of a file: layers that check the version of the loaded state
        (torchvision's MNASNet fails without one) get their own version."""
        return super().load_state_dict(with_versions(state_dict, self), strict, assign)

    def grown(self, n_new: int) -> Network:
        """A copy with `n_new` more classes; the rows of known classes stay bit-identical."""
        network = copy.deepcopy(self)
        old = self.head
        head = linear_head(old.in_features, old.out_features + n_new).to(old.weight.device)
        with torch.no_grad():
            head.weight[: old.out_features] = old.weight
            head.bias[: old.out_features] = old.bias
        network.head = head
        return network.requires_grad_(True)

    def head_of(self, outputs: Sequence[int]) -> nn.Linear:
        """A copy of the head with the rows of these outputs, in this order."""
        old, head = self.head, linear_head(self.head.in_features, len(outputs)).to(self.head.weight.device)
        with torch.no_grad():
            head.weight.copy_(old.weight[list(outputs)])
            head.bias.copy_(old.bias[list(outputs)])
        return head.requires_grad_(old.weight.requires_grad)

    def frozen(self) -> Network:
        """A teacher: the same weights in eval mode without gradients. It shares the tensors but not the modules, so that
        hooks on the teacher do not affect this network."""
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        for tensor in shared.values():
            tensor.requires_grad_(False)
        return copy.deepcopy(self, shared).eval()


@torch.no_grad()
def _features_of(backbone: nn.Module, scales: Scales, images: Tensor) -> tuple[int, int]:
    training = backbone.training
    backbone.eval()
    own, every = backbone(images), scales.features(backbone, images)
    backbone.train(training)
    return own.shape[1], every.shape[1]


def check_statistics(mean: Any, std: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
    """Mean and standard deviation as three floats each; None if neither is given. Raises `SettingError` for anything else."""
    if mean is None and std is None:
        return None
    try:
        (m0, m1, m2), (s0, s1, s2) = ([float(value) for value in values] for values in (mean, std))
    except (TypeError, ValueError, OverflowError):
        numbers: list[float] = []
    else:
        numbers = [m0, m1, m2, s0, s1, s2]
    limits = torch.finfo(torch.float32)
    if not numbers or not all(abs(number) <= limits.max for number in numbers) or min(numbers[3:]) < limits.tiny:
        raise SettingError(f"mean={mean}, std={std}; give both, three numbers each, one per channel, and std above 0")
    return (m0, m1, m2), (s0, s1, s2)


def linear_head(features: int, classes: int) -> nn.Linear:
    """A new head. For a head without classes, it suppresses torch's warning that there is nothing to initialise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Linear(features, classes)
