"""What a backbone must be: normalised images (N, 3, S, S) to features (N, F), through BatchNorm with running statistics.

Each check raises an error that says what to pass instead. No check changes the module.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edge_dfcil import devices
from edge_dfcil.errors import BackboneError, SettingError
from exporters.images import LARGEST_IMAGE

# Inversion matches the statistics of BatchNorm inputs (ABD, eq. 4). With fewer layers, dreams are noise.
MIN_BATCHNORM_LAYERS = 3
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
SMALLEST_IMAGE = 8  # pixels a side

# How much an image's features may change with the other images of its batch, as a share of the largest feature. Kernels sum in
# a different order for each batch size, and TF32 rounds products to ten bits; a real dependence on the batch is far larger.
BATCH_TOLERANCE = 1e-2


def batchnorm_layers(module: nn.Module) -> list[nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm]:
    """The layers whose running statistics inversion matches."""
    return [m for m in module.modules() if isinstance(m, BATCHNORM) and m.running_mean is not None]


def check_image_size(image_size: Any) -> int:
    """The side in pixels as an int. Raises `SettingError` for anything but a whole number from 8 to 4096."""
    expected = f"it must be the side of a square in pixels, a whole number from {SMALLEST_IMAGE} to {LARGEST_IMAGE}"
    if isinstance(image_size, bool):
        raise SettingError(f"image_size={image_size}; {expected}")
    try:
        size = operator.index(image_size)  # int and the integers of NumPy
    except TypeError:
        raise SettingError(f"image_size={image_size} is a {type(image_size).__name__}; {expected}") from None
    if not SMALLEST_IMAGE <= size <= LARGEST_IMAGE:
        raise SettingError(f"image_size={size}; {expected}")
    return size


def check_module(module: Any, argument: str = "module") -> nn.Module:
    """The module without `torch.compile` and data-parallel wrappers. Raises `BackboneError` for anything else."""
    if not isinstance(module, nn.Module):
        raise BackboneError(f"{argument} must be a torch.nn.Module; {_instead_of_module(module)}")
    while True:
        inner = getattr(module, "_orig_mod", None)  # what torch.compile wraps
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = module.module
        if not isinstance(inner, nn.Module):
            break
        module = inner
    if isinstance(module, torch.jit.ScriptModule):
        raise BackboneError(f"{argument} is a TorchScript module, which cannot be split; pass the nn.Module it was made from")
    return module


def _instead_of_module(given: Any) -> str:
    if given is None:
        return "None was given"
    if isinstance(given, Mapping):
        return "a state dict was given: build the network first, then call network.load_state_dict(state_dict)"
    if isinstance(given, type) and issubclass(given, nn.Module):
        return f"the class {given.__name__} was given: make an instance, {given.__name__}(...)"
    if isinstance(given, str) or hasattr(given, "__fspath__"):
        return f"{str(given)!r} was given: build the network in Python, and load its weights from the file"
    return f"a {type(given).__name__} was given" + (f": call it, and pass what it returns ({given!r})" if callable(given) else "")


def copied(module: nn.Module) -> nn.Module:
    """A copy in eval mode. Raises `BackboneError` for a module that cannot be copied."""
    try:
        return copy.deepcopy(module).eval()
    except Exception as error:  # a module may contain anything: locks, files, results of earlier passes
        raise BackboneError(
            f"the module cannot be copied ({_first_line(error)}); remove attributes that are neither layers nor weights"
        ) from error


def run(module: nn.Module, images: Tensor) -> Any:
    """The output of a module for images, without gradients. Raises `BackboneError` when it fails."""
    try:
        with torch.no_grad():
            return module(images)
    except Exception as error:  # the module is the caller's code, and may raise anything
        shape = ", ".join(map(str, images.shape))
        raise BackboneError(f"the network does not run on images of ({shape}): {_first_line(error)}") from error


def probe(module: nn.Module, image_size: int, n: int = 2) -> Tensor:
    """Test images (n, 3, S, S) for a module, the same each time, on its device; each is brighter than the one before."""
    draw = torch.Generator().manual_seed(0)
    try:
        images = torch.randn(n, 3, image_size, image_size, generator=draw) + torch.arange(float(n)).view(n, 1, 1, 1)
    except (RuntimeError, OverflowError) as error:
        raise BackboneError(f"images of {image_size} x {image_size} pixels cannot be made: {_first_line(error)}") from error
    reference = next(module.parameters(), None)
    return images if reference is None else images.to(reference.device)


def features_of(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features (N, F) of images (N, 3, S, S). Raises `BackboneError` for any other output."""
    features = run(backbone, images)
    if not isinstance(features, Tensor):
        raise BackboneError(
            f"the network gives a {type(features).__name__} and not one tensor; switch auxiliary outputs off "
            "(torchvision: aux_logits=False), or wrap the network so that it returns only the main output"
        )
    if features.dim() != 2 or len(features) != len(images) or not features.shape[1]:
        raise BackboneError(
            f"the network gave {tuple(features.shape)} for {len(images)} images; features of shape ({len(images)}, F) are needed"
        )
    return features


def check_backbone(backbone: nn.Module, image_size: int) -> int:
    """The number of features F of a backbone at this image size.

    Raises `BackboneError` when the backbone does not run, does not give (N, F) features in eval and training mode, depends on
    the other images of a batch, contains or gives numbers that are not finite, or has too few BatchNorm layers to invert.
    """
    check_layers(backbone)
    check_tensors(backbone)
    trial = copied(backbone)
    images = probe(trial, image_size)
    together = features_of(trial, images)
    with devices.seeded(0, images.device):  # dropout is random in training mode
        alone, training = features_of(trial, images[:1]), features_of(trial.train(), images)
    if training.shape != together.shape:
        raise BackboneError(
            f"the network gives {tuple(training.shape)} in training and {tuple(together.shape)} in eval mode; "
            "both must have the same shape"
        )
    if not bool(together.isfinite().all()):
        raise BackboneError("the network gives NaN or infinite numbers for valid images; check its weights")
    if float((together[:1] - alone).abs().max()) > BATCH_TOLERANCE * float(together.abs().max()):
        raise BackboneError(
            "the network's answer for an image depends on the other images of its batch, or on chance; use layers that do not "
            "depend on the batch in eval mode, such as BatchNorm with running statistics"
        )
    return int(together.shape[1])


def check_layers(backbone: nn.Module) -> None:
    """Raises `BackboneError` for BatchNorm without running statistics, and for too few layers with them."""
    for name, layer in backbone.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.running_mean is None or layer.running_var is None):
            raise BackboneError(
                f"the BatchNorm layer {name!r} keeps no running statistics (track_running_stats=False): answers would depend "
                "on the other images of a batch; train the network with running statistics, then pass it"
            )
    layers = len(batchnorm_layers(backbone))
    if layers < MIN_BATCHNORM_LAYERS:
        raise BackboneError(
            f"this network has {layers} BatchNorm layers with running statistics; at least {MIN_BATCHNORM_LAYERS} are "
            "needed, because dreams are made by matching those statistics. Choose a network that normalises with BatchNorm"
        )


def untouched(backbone: nn.Module) -> list[nn.Module]:
    """Its BatchNorm layers whose running statistics were never learnt: mean 0, variance 1."""
    found: list[nn.Module] = []
    for layer in batchnorm_layers(backbone):
        mean, variance = layer.running_mean, layer.running_var
        if mean is not None and variance is not None and bool((mean == 0).all()) and bool((variance == 1).all()):
            found.append(layer)
    return found


def check_tensors(backbone: nn.Module) -> None:
    """Raises `BackboneError` unless a module's state dict has only plain tensors: finite float32, or whole numbers."""
    check_values(backbone.state_dict())


def check_values(tensors: Mapping[str, Any]) -> None:
    """As `check_tensors`, for tensors by name."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise BackboneError(f"{name} is a {type(tensor).__name__} in the state dict; a model file keeps tensors only")
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
            raise BackboneError(f"{name} has no shape yet; run the network on one batch first")
        if tensor.is_meta:
            raise BackboneError(f"{name} has no values (device 'meta'); load the network's weights first")
        if tensor.is_complex() or tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            raise BackboneError(f"{name} is {tensor.dtype}; weights must be torch.float32: call module.float() first")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BackboneError(
                f"{name} contains NaN or infinite numbers; the training that made it has diverged. Use an earlier state"
            )
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise BackboneError(f"{name} contains negative variances; the file it came from is damaged")


def with_versions(tensors: Mapping[str, Any], module: nn.Module) -> OrderedDict[str, Any]:
    """A state dict of plain tensors with the versions of a module's layers, which a file does not store.

    Layers may check the version of the state that they load; torchvision's MNASNet raises without one.
    """
    state = OrderedDict(tensors)
    own = getattr(module.state_dict(), "_metadata", {})
    state._metadata = getattr(tensors, "_metadata", own)  # type: ignore[attr-defined]
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
