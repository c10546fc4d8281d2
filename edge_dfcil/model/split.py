"""Splits a classifier into backbone and head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from edge_dfcil.errors import BackboneError
from edge_dfcil.model.contract import copied, features_of, probe, run

# How much split and whole classifier may differ, as a share of the largest logit: both run the same layers in the same order.
SAME = 1e-4


@dataclass(frozen=True)
class Split:
    """A classifier split in two: ``classifier(x) == head(backbone(x))``."""

    backbone: nn.Module
    head: nn.Linear


def split(classifier: nn.Module, head: str | None = None) -> Split:
    """Removes the final linear layer from a copy of `classifier`.

    Parameters
    ----------
    classifier
        Any module that ends in one `nn.Linear`; it is not changed.
    head
        The layer's dotted name; None takes the last `nn.Linear`.

    Raises `BackboneError` when there is no such layer.
    """
    backbone = copied(classifier)
    linears = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear) and name]
    if head is not None and head not in linears:
        raise BackboneError(f"head={head!r} is not a linear layer of the classifier; it has {', '.join(linears) or 'none'}")
    if not linears:
        raise BackboneError("the classifier has no nn.Linear layer to take as its head; wrap it so that it ends in one")
    name = head or linears[-1]
    linear = backbone.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    remove(backbone, name)
    return Split(backbone, linear)


def remove(module: nn.Module, name: str) -> None:
    """Replaces a layer by the identity."""
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Identity())


def check_split(classifier: nn.Module, parts: Split, image_size: int) -> None:
    """Raises `BackboneError` unless both parts together give the logits of the whole classifier in eval mode."""
    images = probe(classifier, image_size)
    whole = features_of(classifier, images)
    features = run(parts.backbone, images)
    same = isinstance(features, Tensor) and features.dim() == 2 and features.shape[1] == parts.head.in_features
    if same:
        logits = run(parts.head, features)
        same = logits.shape == whole.shape and float((logits - whole).abs().max()) <= SAME * float(whole.abs().max())
    if not same:
        raise BackboneError(
            "the classifier's answer is not its last linear layer applied to features; name the layer with head='...', "
            "and leave softmax out of the module"
        )
