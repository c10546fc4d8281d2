"""Measures what a model reveals about its training images, for the people responsible for the data.

Images used in training (members) are compared with other images of the same classes. What these attacks find is a lower bound:
a better attack may find more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_dfcil import devices
from edge_dfcil.errors import DataError
from edge_dfcil.model import labels
from edge_dfcil.model.inputs import read
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.model import Model
from edge_dfcil.privacy.account import Kept, account
from edge_dfcil.privacy.attacks import auc, auc_error, confidence, found_at, likelihood_ratio

LEAST = 20  # images of each kind
SHARES = (0.01, 0.001)  # of others taken for members: false-positive rates
SIDE = 32  # pixels a side, at most, at which images are compared
NO_PROMISE = "This model is not differentially private: no epsilon is claimed, and none can be derived from these figures."


@dataclass(frozen=True)
class Attack:
    """One membership attack.

    Attributes
    ----------
    name
        "loss": the probability of the true class. "likelihood ratio": the same, relative to the distributions of members and of
        others, known to an attacker who has half of both. "class statistics": the distance to the class mean that the model
        keeps. "likelihood ratio with class statistics": both signals together.
    auc, error
        The share of pairs of a member and another image in which the member has the higher score, in [0, 1]: 0.5 is chance.
        And the standard error of this share.
    found
        True-positive rate by false-positive rate: the share of members found, by the share of others taken for members. None:
        too few images.
    by_task
        `auc` on the classes of each task, in the order learnt; None for a task without images of both kinds.
    """

    name: str
    auc: float
    error: float
    found: dict[str, float | None]
    by_task: tuple[float | None, ...]


@dataclass(frozen=True)
class Nearest:
    """Generated images compared with real ones of the same class, with equal numbers of members and others.

    Attributes
    ----------
    space
        "pixels": root mean square difference of values in [0, 1], at 32 pixels a side at most. "features": the angle between
        features, in degrees.
    generated
        Number of generated images.
    nearer
        The share of generated images whose nearest image is a member, in [0, 1]: 0.5 is chance, with a standard error of
        0.5 / sqrt(generated).
    member, other
        Median distance to the nearest member, and to the nearest other image.
    """

    space: str
    generated: int
    nearer: float
    member: float
    other: float


@dataclass(frozen=True)
class Audit:
    """What a model keeps, and what it reveals about its training images.

    Attributes
    ----------
    kept
        Every tensor of the model, with its role.
    members, others
        Numbers of images.
    accuracy
        Accuracy on members and on others, in [0, 1].
    attacks, nearest
        Those that were possible: some need class statistics, generated images, or both members and others of a class.
    """

    classes: tuple[str, ...]
    kept: tuple[Kept, ...]
    members: int
    others: int
    accuracy: tuple[float, float]
    attacks: tuple[Attack, ...]
    nearest: tuple[Nearest, ...]

    @property
    def bytes_by_role(self) -> dict[str, int]:
        roles = dict.fromkeys(one.kind for one in self.kept)
        return {role: sum(one.bytes for one in self.kept if one.kind == role) for role in roles}

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        kept = [one.to_dict() for one in self.kept]
        return {**asdict(self), "kept": kept, "bytes_by_role": self.bytes_by_role, "no_promise": NO_PROMISE}

    def __str__(self) -> str:
        lines = [f"keeps {count} bytes of {role}s" for role, count in self.bytes_by_role.items()]
        lines.append(f"{self.members} images learnt from, {self.accuracy[0]:.1%} classified correctly")
        lines.append(f"{self.others} other images, {self.accuracy[1]:.1%} classified correctly")
        lines.append("membership attacks (0.5 is chance):")
        lines += [f"  {line}" for line in map(_attack_line, self.attacks)]
        lines += [_nearest_line(one) for one in self.nearest]
        return "\n".join([*lines, NO_PROMISE])


def _attack_line(one: Attack) -> str:
    found = "".join(f", {share:.1%} of members at {int_share} false" for int_share, share in _found(one))
    return f"{one.name}: {one.auc:.3f} ± {one.error:.3f}{found}"


def _found(one: Attack) -> list[tuple[str, float]]:
    return [(f"{float(key):.1%}", share) for key, share in one.found.items() if share is not None]


def _nearest_line(one: Nearest) -> str:
    return f"{one.nearer:.1%} of {one.generated} generated images are nearest to a member, by {one.space} (50 % is chance)"


@devices.cpu_by_default()
def audit(
    model: Model,
    members: Any,
    others: Any,
    classes: Classes | None = None,
    *,
    generated: Tensor | None = None,
    on_batch: Callable[[int], None] = lambda images: None,
) -> Audit:
    """Measures what a model reveals about its training images.

    Features and images scaled to at most 32 pixels a side are kept in memory until it returns; nothing is stored. Raises
    `DataError` for fewer than 20 images of a kind, `ClassError` for an unknown class, and the errors of `evaluate`.

    Parameters
    ----------
    members
        A loader of training images of the model, as for `Model.evaluate`: of all tasks whose images still exist.
    others
        A loader of images of the same classes and the same source that were not used in training.
    classes
        Names by target value, as for `Model.evaluate`.
    generated
        Images (N, 3, S, S), uint8, that were generated from the model, as by `Learner.dream`.
    on_batch
        Called after every batch with its number of images. If it raises, the audit ends with its error.
    """
    model.check_answering()
    inside, outside = (_Seen.of(model, loader, classes, on_batch) for loader in (members, others))
    for name, seen in (("members", inside), ("others", outside)):
        if len(seen.targets) < LEAST:
            raise DataError(f"there are {len(seen.targets)} images among the {name}; an audit needs {LEAST} or more of each kind")
    return Audit(
        classes=model.classes,
        kept=tuple(account(model.tensors(), model.settings())),
        members=len(inside.targets),
        others=len(outside.targets),
        accuracy=(inside.accuracy, outside.accuracy),
        attacks=tuple(_attacks(model, inside, outside)),
        nearest=tuple(_nearest(model, generated, inside, outside)) if generated is not None and len(generated) else (),
    )


@dataclass(frozen=True)
class _Seen:
    """Results of a model for images: probabilities (N, C), features (N, F), scaled pixels (N, P); true classes (N,)."""

    probabilities: Tensor
    features: Tensor
    pixels: Tensor
    targets: Tensor

    @classmethod
    def of(cls, model: Model, loader: Any, classes: Classes | None, on_batch: Callable[[int], None]) -> _Seen:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        targets: list[int] = []
        for images, given in read(loader):
            targets += labels.outputs_of_targets(given, loader, classes, model.classes)
            parts.append(_answered(model, images))
            on_batch(len(images))
        if not parts:
            raise DataError("a loader gave no images; an audit needs some")
        probabilities, features, pixels = (torch.cat(part) for part in zip(*parts, strict=True))
        return cls(probabilities, features, pixels, torch.tensor(targets))

    @property
    def accuracy(self) -> float:
        return float((self.probabilities.argmax(1) == self.targets).double().mean())


@torch.inference_mode()
def _answered(model: Model, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    seen = model.network.pixels(images).float().cpu()  # (B, 3, S, S), in [0, 1]
    side = min(SIDE, seen.shape[3])
    small = F.interpolate(seen, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return model.probabilities(images), model.embed(images), small.flatten(1)


_Pair = tuple[Tensor, Tensor]  # of members, of others


def _attacks(model: Model, inside: _Seen, outside: _Seen) -> list[Attack]:
    loss = [confidence(seen.probabilities, seen.targets)[:, None] for seen in (inside, outside)]  # (N, 1), (M, 1)
    scores: dict[str, _Pair] = {
        "loss": (loss[0].squeeze(1), loss[1].squeeze(1)),
        "likelihood ratio": likelihood_ratio(loss[0], inside.targets, loss[1], outside.targets),
    }
    near, far = _distance(model, inside), _distance(model, outside)
    if near is not None and far is not None:
        both = torch.stack([scores["loss"][0], near], 1), torch.stack([scores["loss"][1], far], 1)
        scores["class statistics"] = -near, -far
        scores["likelihood ratio with class statistics"] = likelihood_ratio(both[0], inside.targets, both[1], outside.targets)
    return [_attack(model, name, pair, inside, outside) for name, pair in scores.items()]


def _attack(model: Model, name: str, scores: _Pair, inside: _Seen, outside: _Seen) -> Attack:
    members, others = scores
    value = auc(members, others)
    found = {str(share): found_at(members, others, share) for share in SHARES}
    by_task = []
    for task in model.tasks:
        rows = torch.tensor([model.classes.index(one) for one in task if one in model.classes])
        mine, theirs = (torch.isin(seen.targets, rows) for seen in (inside, outside))
        by_task.append(auc(members[mine], others[theirs]) if bool(mine.any()) and bool(theirs.any()) else None)
    return Attack(name, value, auc_error(value, len(members), len(others)), found, tuple(by_task))


def _distance(model: Model, seen: _Seen) -> Tensor | None:
    """Mahalanobis distance (N,) of features to the mean of the true class, by the covariance that the model keeps; None if the
    mean of one of the classes is missing."""
    mean, covariance = model.statistics.get("mean"), model.statistics.get("covariance")
    if mean is None or covariance is None or mean.values.shape[1] != seen.features.shape[1] or model.groups is not None:
        return None
    if any(mean.images[target] == 0 for target in seen.targets.unique().tolist()):
        return None
    matrix = covariance.values.double()
    matrix = matrix + 0.1 * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    away = seen.features.double() - mean.values.double()[seen.targets]
    return torch.linalg.solve_triangular(torch.linalg.cholesky(matrix), away.T, upper=False).square().sum(0).sqrt()


def _nearest(model: Model, generated: Tensor, inside: _Seen, outside: _Seen) -> list[Nearest]:
    """Each generated image compared with equal numbers of members and others of the class that the model predicts for it."""
    parts = [_answered(model, part) for part in generated.split(64)]
    probabilities, features, pixels = (torch.cat(part) for part in zip(*parts, strict=True))
    classes = probabilities.argmax(1)
    spaces: dict[str, tuple[Tensor, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
        "pixels": (pixels, inside.pixels, outside.pixels, _root_mean_square),
        "features": (features, inside.features, outside.features, _angle),
    }
    found = []
    for space, (made, members, others, distance) in spaces.items():
        pairs = []
        for target in classes.unique().tolist():
            mine, theirs = members[inside.targets == target], others[outside.targets == target]
            n = min(len(mine), len(theirs))
            if n:
                near = (distance(made[classes == target], _spread(real, n)).amin(1) for real in (mine, theirs))
                pairs.append(torch.stack(list(near), 1))
        if pairs:
            both = torch.cat(pairs).double()
            nearer = float(((both[:, 0] < both[:, 1]) + 0.5 * (both[:, 0] == both[:, 1])).mean())
            found.append(Nearest(space, len(both), nearer, *both.median(0).values.tolist()))
    return found


def _spread(real: Tensor, n: int) -> Tensor:
    """`n` of the images, evenly spaced in their order."""
    return real[torch.linspace(0, len(real) - 1, n).round().long()]


def _root_mean_square(made: Tensor, real: Tensor) -> Tensor:
    return torch.cdist(made, real) / math.sqrt(made.shape[1])


def _angle(made: Tensor, real: Tensor) -> Tensor:
    cosine = F.normalize(made, dim=1) @ F.normalize(real, dim=1).T
    return cosine.clamp(-1, 1).acos().rad2deg()
