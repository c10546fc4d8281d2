"""Model: a classifier for inference. It is immutable; learning and class surgery return a new one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_dfcil import devices, metrics
from edge_dfcil._version import __version__
from edge_dfcil.errors import BackboneError, ClassError, DataError, ModelFileError, NotLearnedError, SettingError
from edge_dfcil.hub import FromHub
from edge_dfcil.model import adoption, backbones, file, labels, statistics, stored
from edge_dfcil.model.calibration import Calibration, expected_scores, found_on
from edge_dfcil.model.contract import batchnorm_layers, check_image_size, untouched
from edge_dfcil.model.inputs import as_images, read
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.network import Network, check_statistics
from edge_dfcil.model.scales import find_layers
from edge_dfcil.model.statistics import Statistic
from edge_dfcil.results import Evaluation, Prediction
from exporters import rejection
from exporters.texts import shown
from exporters.values import whole_number


@dataclass(frozen=True, eq=False)
class Model(FromHub):
    """A classifier: network, preprocessing, class names and class statistics.

    `Model.load(path)` needs no method, recipe or data. Models can be copied, pickled and used by several threads.

    Attributes
    ----------
    network
        Images (N, 3, H, W), uint8 or float in [0, 1], to logits (N, outputs). Do not change it.
    tasks
        The name of each output, task by task. A merged class has several outputs of one name.
    backbone
        The registered name of the architecture; None for a module of the caller's own.
    normalizes
        Whether the network's mean and standard deviation have been set.
    statistics
        The class statistics that the method keeps in addition to the weights, by name.
    learning
        How it was learnt, as JSON: the method's name, the recipe, the seed. A `Learner` continues with these.
    pretrained
        Whether the backbone had been trained before the first task: its BatchNorm statistics were learnt.
    calibration
        Temperature and rejection thresholds; None: not calibrated, and probabilities are softmax(logits).
    """

    network: Network
    tasks: tuple[tuple[str, ...], ...] = ()
    backbone: str | None = None
    normalizes: bool = False
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    learning: Mapping[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    calibration: Calibration | None = None

    @classmethod
    def new(
        cls,
        backbone: str | nn.Module,
        *,
        image_size: int | None = None,
        device: str | torch.device = "auto",
        seed: int = 0,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        multiscale: bool = False,
    ) -> Model:
        """A model without classes; the parameters are those of `Learner`.

        Raises `BackboneError` for an unusable backbone or weights, `SettingError` for other invalid parameters.
        """
        found, seed = devices.find_device(device), devices.check_seed(seed)
        devices.guard_forks()
        with devices.own_context(found), devices.seeded(seed, found):
            made = backbones.create_or_copy(backbone, weights)
            size = check_image_size(made.default_image_size if image_size is None else image_size)
            network = _network(made.module, size, multiscale)
        given = check_statistics(mean, std) or check_statistics(made.mean, made.std)
        if given is not None:
            network.set_statistics(*given)
        name = backbone if isinstance(backbone, str) else None
        trained = len(untouched(made.module)) < len(batchnorm_layers(made.module))
        model = cls(network.requires_grad_(False).eval(), (), name, given is not None, pretrained=trained)
        network.to(found, memory_format=devices.memory_format(found))  # type: ignore[call-overload]
        return model

    @classmethod
    def from_classifier(
        cls,
        module: nn.Module,
        classes: Sequence[str],
        *,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        head: str | None = None,
        backbone: str | None = None,
        device: str | torch.device = "auto",
        multiscale: bool = False,
    ) -> Model:
        """A model of a trained classifier. The module is copied, not changed.

        Parameters
        ----------
        module
            Normalised images (N, 3, S, S) to logits (N, len(classes)), with BatchNorm layers and a final `nn.Linear`.
        classes
            The names of its outputs, in order.
        mean, std
            Per-channel mean and standard deviation that normalised its images in [0, 1]; None takes ImageNet's.
        head
            The dotted name of the final linear layer; None takes the last linear layer.
        multiscale
            As for `Learner`; the answers are unchanged until the first task.
        backbone
            The registered name of the module's architecture, if any. The model file then loads without the module; otherwise
            it needs `load(path, backbone=module)`.

        Raises
        ------
        BackboneError
            When the module does not end in that linear layer, has too few BatchNorm layers, cannot be inverted, saved or
            loaded, or is not the architecture that `backbone` names.
        ClassError
            When the names repeat, or their number is not that of the outputs.
        SettingError
            For an invalid image size, mean, standard deviation or device.

        A `UserWarning` is issued when the module's BatchNorm statistics were never learnt.
        """
        found = devices.find_device(device)
        with devices.own_context(found):
            parts = adoption.adopt(module, classes, image_size=image_size, mean=mean, std=std, head=head, backbone=backbone)
            options: dict[str, Any] = {"mean": parts.mean, "std": parts.std, "multiscale": multiscale}
            empty = cls.new(parts.backbone, image_size=parts.image_size, device=found, **options)
            network = empty.network.grown(len(parts.classes)).requires_grad_(False)
        with torch.no_grad():
            network.head.weight.zero_()[:, : parts.head.in_features].copy_(parts.head.weight)
            network.head.bias.zero_()
            if parts.head.bias is not None:
                network.head.bias.copy_(parts.head.bias)
        return replace(empty, network=network, tasks=(parts.classes,), backbone=parts.name, normalizes=True)

    def untrained(
        self, backbone: str | nn.Module, *, image_size: int | None = None, seed: int = 0, multiscale: bool | None = None
    ) -> Model:
        """An untrained model with another backbone, the same classes and settings; `multiscale` None: unchanged."""
        size = image_size or self.image_size
        scales = bool(self.network.scales.layers) if multiscale is None else multiscale
        empty = Model.new(backbone, image_size=size, device=self.device, seed=seed, multiscale=scales)
        with devices.seeded(seed, self.device):
            network = empty.network.grown(len(self.outputs)).requires_grad_(False)
        network.set_statistics(self.network.mean.flatten().tolist(), self.network.std.flatten().tolist())
        network.mirrored = self.network.mirrored
        return replace(self, network=network, backbone=empty.backbone, statistics={}, calibration=None)

    def smaller(self, seed: int = 0) -> Iterator[tuple[str, Model]]:
        """Untrained models that need less memory for the same classes, each with the changed setting: features of one scale, half
        the image size, a smaller backbone."""
        half = self.image_size // 2
        choices: list[tuple[str, str | None, dict[str, Any]]] = []
        if self.network.scales.layers:  # the sums of a closed-form head grow with the square of the features
            choices.append(("multiscale=False", self.backbone, {"multiscale": False}))
        if self.image_size >= 32:
            choices.append((f"image_size={half}", self.backbone, {"image_size": half}))
        choices += [(f"backbone={name!r}", name, {}) for name in backbones.smaller(self.backbone)]
        for text, backbone, changes in choices:
            with contextlib.suppress(BackboneError):  # a module of the caller that does not run on smaller images
                yield text, self.untrained(backbone or self.network.backbone, seed=seed, **changes)

    def with_learning(self, learning: Mapping[str, Any], mirrored: bool) -> Model:
        """The model with other learning settings. Weights are shared."""
        network = copy.copy(self.network)
        network.mirrored = mirrored
        return replace(self, network=network, learning=learning)

    def calibrated(self, calibration: Calibration | None) -> Model:
        """The model with another calibration, whose thresholds are for competing outputs (not merged). Weights are shared."""
        model = replace(self, calibration=calibration)
        return model if calibration is None or self.groups is None else model._recalibrated(model._expected_scores(None))

    @devices.cpu_by_default()
    def calibrate(self, loader: Any, classes: Classes | None = None, *, false_rejections: float = 0.05) -> Model:
        """A model with a temperature and a threshold found on labelled images of known classes, for any kind of head.

        The images must not be training images or generated ones, on which the model is more confident. They are not kept.
        `loader` and `classes` are as for `evaluate`. The threshold rejects the share `false_rejections`, in [0, 1), of the
        images. It is the same for all classes, so all should be among the images. Raises `SettingError` for a share out of
        range, `DataError` for fewer than 10 images, and the errors of `evaluate`.
        """
        plain, names = replace(self, calibration=None), self.classes
        self.check_answering()
        probabilities, true = [torch.zeros(0, len(names))], list[int]()
        for images, targets in read(loader):
            true += labels.outputs_of_targets(targets, loader, classes, names)
            probabilities.append(plain._probabilities(images).cpu())
        return replace(plain, calibration=found_on(torch.cat(probabilities), true, len(self.outputs), false_rejections))

    def _expected_scores(self, groups: Tensor | None) -> Tensor | None:
        return expected_scores(self.network, self.statistics, self.temperature, groups)

    def _recalibrated(self, before: Tensor | None, keep: Sequence[int] | None = None) -> Model:
        """This model, with thresholds shifted from the expected scores `before` of its predecessor; it has the outputs `keep`."""
        if self.calibration is None:
            return self
        return replace(self, calibration=self.calibration.moved(before, self._expected_scores(self.groups), keep))

    def __repr__(self) -> str:
        count = f"{len(self.classes)} classes in {len(self.tasks)} tasks" if self.classes else "nothing learnt"
        return f"Model({self.architecture}, {self.image_size} px, {count}, {self.device})"

    @property
    def outputs(self) -> tuple[str, ...]:
        """The class name of each output of the network."""
        return tuple(name for task in self.tasks for name in task)

    @property
    def classes(self) -> tuple[str, ...]:
        """Every class name, in the order in which they were learnt."""
        return tuple(dict.fromkeys(self.outputs))

    @property
    def image_size(self) -> int:
        """The side in pixels of the network's input images."""
        return self.network.image_size

    @property
    def device(self) -> torch.device:
        return self.network.mean.device

    @property
    def architecture(self) -> str:
        """The backbone's registered name, or else the name of its type."""
        return self.backbone or type(self.network.backbone).__qualname__

    def to(self, device: str | torch.device) -> Model:
        """This model on a device, itself if it is already there. Raises `SettingError` for a device that cannot be used."""
        found = devices.find_device(device)
        if found == self.device:
            return self
        network = copy.deepcopy(self.network).to(found, memory_format=devices.memory_format(found))  # type: ignore[call-overload]
        return replace(self, network=network)

    # Answering

    def check_answering(self) -> None:
        """Raises `NotLearnedError` before the first task."""
        if not self.tasks:
            raise NotLearnedError("nothing has been learnt yet; call learn_task(loader) first")

    @devices.cpu_by_default()
    def probabilities(self, images: Any) -> Tensor:
        """Probabilities (N, C), float32, of `classes` for images, at the model's temperature; on the CPU.

        `images` is a tensor or an array, uint8 or float in [0, 1], of a batch (N, 3, H, W) or of one image, with channels first
        or last; a PIL image; a path; a list of any of these; or a loader. See `model.inputs.as_images`. Raises `DataError`
        for anything else, and `NotLearnedError` before the first task.
        """
        self.check_answering()
        chunks = [self._probabilities(chunk).cpu() for chunk in as_images(images, self.image_size)]
        return torch.cat(chunks) if chunks else torch.zeros(0, len(self.classes))

    @property
    def temperature(self) -> float:
        """The number by which logits are divided; 1 without a calibration."""
        return self.calibration.temperature if self.calibration is not None else 1.0

    @property
    @devices.cpu_by_default()
    def thresholds(self) -> tuple[float, ...]:
        """The rejection threshold of each class; empty if there are none."""
        return self.calibration.of_classes(self.groups) if self.calibration is not None else ()

    def predict(self, images: Any, top_k: int = 1, reject: bool = False) -> list[Prediction]:
        """The `top_k` most probable classes of each image, best first; `images` as for `probabilities`.

        With `reject`, the label of an image that belongs to no known class is None; its score and its `top` are unchanged. Raises
        `SettingError` when the model has no thresholds for `reject` or `top_k` is below 1, and the errors of `probabilities`.
        """
        most = whole_number("top_k", top_k)
        if reject:
            self.check_rejecting()
        classes, predictions = self.classes, []
        probabilities = self.probabilities(images)
        scores, found = probabilities.topk(min(most, len(classes)))
        known = rejection.margins(probabilities.numpy(), self.thresholds) >= 0 if reject else [True] * len(scores)
        for row_scores, row, is_known in zip(scores.tolist(), found.tolist(), known, strict=True):
            top = tuple((classes[index], score) for score, index in zip(row_scores, row, strict=True))
            predictions.append(Prediction(top[0][0] if is_known else None, top[0][1], top))
        return predictions

    def check_rejecting(self) -> None:
        """Raises `SettingError` when there are no thresholds to reject by."""
        self.check_answering()
        if not self.thresholds:
            raise SettingError(
                "this model has no thresholds for reject=True. A task of 10 images or more finds them with refine.calibrate, "
                "as in recipe='frozen', if it does not train the backbone: with a pretrained one, or after the first task. A "
                "task that trains the backbone also needs refine.held_out=0.1. Or call calibrate(loader) with images that the "
                "model has not learnt from"
            )

    @torch.inference_mode()
    @devices.cpu_by_default()
    def embed(self, images: Any) -> Tensor:
        """Features (N, F), float32, on the CPU: the head's inputs. They are not stored.

        Before the first task they are those of the backbone as it was given. `images` as for `probabilities`. Raises
        `DataError` for unusable images.
        """
        network = self.network
        with devices.plain_precision(self.device):
            found = (network.features(network.normalize(network.pixels(c))) for c in as_images(images, self.image_size))
            chunks = [features.float().cpu() for features in found]
        return torch.cat(chunks).clone() if chunks else torch.zeros(0, network.head.in_features)

    @devices.cpu_by_default()
    def evaluate(self, loader: Any, classes: Classes | None = None) -> Evaluation:
        """Accuracy and calibration error over a loader, with all known classes as candidates.

        `loader` yields pairs (images, targets), or dicts; `classes` names the targets: a list indexed by target, or a mapping;
        None takes the names of the loader's data set. Raises `DataError` for a loader without images or with unusable ones,
        `ClassError` for an unknown class, `NotLearnedError` before the first task.
        """
        self.check_answering()
        names = self.classes
        confusion = torch.zeros(len(names), len(names), dtype=torch.long)
        error = metrics.CalibrationError()
        for images, targets in read(loader):
            true = torch.tensor(labels.outputs_of_targets(targets, loader, classes, names), dtype=torch.long)
            scores, predicted = self._probabilities(images).cpu().max(1)
            for score, right in zip(scores.tolist(), (predicted == true).tolist(), strict=True):
                error.add(score, right)
            confusion.index_put_((true, predicted), torch.ones(len(true), dtype=torch.long), accumulate=True)
        if not confusion.sum():
            raise DataError("the loader gave no image to evaluate on")
        tasks = [tuple(dict.fromkeys(task)) for task in self.tasks]
        return metrics.evaluation(confusion.tolist(), names, tasks, error.value)

    @torch.inference_mode()
    def _probabilities(self, images: Tensor) -> Tensor:
        """Probabilities of `classes`; those of a merged class are the sum of its outputs'."""
        with devices.plain_precision(self.device):
            found: Tensor = (self.network(images).float() / self.temperature).softmax(1)
        return found if self.groups is None else found @ self.groups.to(found.device)

    @property
    @devices.cpu_by_default()
    def groups(self) -> Tensor | None:
        """1 where an output (row) belongs to a class (column), else 0, (outputs, C); None if each class has one output."""
        outputs, classes = self.outputs, self.classes
        if len(outputs) == len(classes):
            return None
        groups = torch.zeros(len(outputs), len(classes))
        groups[torch.arange(len(outputs)), torch.tensor([classes.index(name) for name in outputs])] = 1
        return groups

    # Class surgery

    @devices.cpu_by_default()
    def forget(self, names: str | Iterable[str]) -> Model:
        """A model without these classes: their rows of the head and their statistics are removed.

        The shared weights still contain traces of them: a generator trained to invert the weights may reproduce images like
        those of a forgotten class. To avoid this, train from scratch without the class.

        Raises `ClassError` for a name that is not known, or when no class would be left.
        """
        gone = self.known(names)
        keep = [output for output, name in enumerate(self.outputs) if name not in gone]
        if not keep:
            raise ClassError("every class would be forgotten; delete the model file instead")
        network = copy.deepcopy(self.network)
        network.head = network.head_of(keep)
        tasks = tuple(tuple(name for name in task if name not in gone) for task in self.tasks)
        kept = {name: statistic.only(keep) for name, statistic in self.statistics.items()}
        model = replace(self, network=network, tasks=tuple(task for task in tasks if task), statistics=kept)
        return model._recalibrated(self._expected_scores(self.groups), keep)

    def rename(self, names: Mapping[str, str]) -> Model:
        """A model with other class names, given as `{old: new}`.

        Raises `ClassError` for an unknown old name, and for a new one that is in use or invalid.
        """
        if not isinstance(names, Mapping):
            raise ClassError(f"names={names!a:.80} is a {type(names).__name__}; pass {{old name: new name}}")
        found = {self.known([old]).pop(): labels.clean_name(new) for old, new in names.items()}
        labels.check_names([found.get(name, name) for name in self.classes])  # none twice
        return self._named(found)

    @devices.cpu_by_default()
    def merge(self, names: Sequence[str], into: str) -> Model:
        """A model that treats these classes as one, called `into`. Its probability is the sum of theirs.

        Raises `ClassError` for an unknown name, and when `into` is a class that is not among them.
        """
        gone, name = self.known(names), labels.clean_name(into)
        if name in self.classes and name not in gone:
            raise ClassError(f"{name!r} is a class already; name it among those that are merged")
        model = self._named(dict.fromkeys(gone, name))
        return model._recalibrated(self._expected_scores(self.groups))

    def _named(self, names: Mapping[str, str]) -> Model:
        return replace(self, tasks=tuple(tuple(names.get(name, name) for name in task) for task in self.tasks))

    def known(self, names: str | Iterable[str]) -> set[str]:
        """The classes with these names, in the model's spelling. Raises `ClassError` for an unknown name."""
        found = labels.asked(names)
        return {self.classes[index] for index in labels.outputs_of({name: name for name in found}, self.classes).values()}

    # Files

    def settings(self) -> dict[str, Any]:
        """The settings in the model file, as JSON values."""
        network = self.network
        return {
            "version": __version__,
            "backbone": self.backbone,
            "architecture": type(network.backbone).__qualname__,
            "image_size": network.image_size,
            "mean": network.mean.flatten().tolist() if self.normalizes else None,
            "std": network.std.flatten().tolist() if self.normalizes else None,
            "mirrored": network.mirrored,
            "scales": list(network.scales.layers),
            "spread": network.scales.spread,
            "pretrained": self.pretrained,
            "tasks": [list(task) for task in self.tasks],
            "statistics": statistics.described(self.statistics),
            "calibration": self.calibration.to_dict() if self.calibration is not None else None,
            **self.learning,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the model file, by its name in the file."""
        return self.network.state_dict() | statistics.packed(self.statistics)

    def digest(self) -> str:
        """SHA-256 over tensors and settings, in hex: the one in the file that `save` writes."""
        return file.digest(self.tensors(), self.settings())

    def save(self, path: str | Path, **options: Any) -> Path:
        """Writes one file atomically, and returns its path; `options` are those of `file.write`.

        Raises `ModelFileError` on failure.
        """
        return file.write(path, self.tensors(), self.settings(), **options)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "auto", *, backbone: nn.Module | None = None) -> Model:
        """Reads a model file of any schema. Predictions are bit-identical on the same device.

        Raises `ModelFileError` for a file that is missing, damaged, not a model file, or does not fit the backbone, and
        `SettingError` for a device that cannot be used.

        Parameters
        ----------
        backbone
            For a file whose backbone was the caller's module (including adopted classifiers): that module, built again. It is
            copied, and the copy gets the file's weights. A classifier may still have its head, for any number of classes.
        """
        tensors, settings = file.read(path)
        devices.guard_forks()
        found = devices.find_device(device)
        with devices.own_context(found):
            model = cls._of_file(path, tensors, settings, backbone)
            model.network.to(found, memory_format=devices.memory_format(found))  # type: ignore[call-overload]
        return model

    @classmethod
    def _of_file(
        cls, path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], backbone: nn.Module | None
    ) -> Model:
        """The model of a file's content, on the CPU."""
        with _fits(path):
            stored.check(tensors, settings)
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith("statistics.")}
        inside = {name.removeprefix("backbone."): t for name, t in weights.items() if name.startswith("backbone.")}
        with _fits(path, BackboneError):
            module = _module(path, settings, backbone, inside)
        with _fits(path):
            tasks = tuple(tuple(task) for task in settings["tasks"])
            scales, spread = settings.get("scales", ()), settings.get("spread", False)  # older files have none
            network = Network(module, weights["head.weight"].shape[1], settings["image_size"], scales, spread)
            network = network.grown(sum(map(len, tasks)))
            kept = statistics.unpacked(tensors, settings.get("statistics", {}))
            stored.check_network(weights, network, kept)
            network.load_state_dict(weights)
            if settings["mean"] is not None:
                network.set_statistics(settings["mean"], settings["std"])
            learning: dict[str, Any] = {
                name: settings[name] for name in ("method", "recipe", "seed", "last_task") if name in settings
            }
            # Files of schema 1 have it in the recipe.
            network.mirrored = bool(settings.get("mirrored", learning.get("recipe", {}).get("mirrored_answers", False)))
            calibration = Calibration.from_dict(settings.get("calibration"), sum(map(len, tasks)))
        normalizes, pretrained = settings["mean"] is not None, bool(settings.get("pretrained", False))
        network.requires_grad_(False).eval()
        return cls(network, tasks, settings["backbone"], normalizes, kept, learning, pretrained, calibration)


@contextlib.contextmanager
def _fits(path: str | Path, *passing: type[Exception]) -> Iterator[None]:
    """Turns errors that a file's content causes into `ModelFileError`, except for those in `passing`."""
    try:
        yield
    except ModelFileError:
        raise
    except (KeyError, TypeError, RuntimeError, IndexError, ValueError, ArithmeticError, AttributeError) as error:
        if isinstance(error, passing):
            raise
        first_lines = shown(" ".join(str(error).split()))[:200]
        raise ModelFileError(f"{path} does not fit this version or backbone: {first_lines}") from error


def _network(backbone: nn.Module, image_size: int, multiscale: bool) -> Network:
    """A network without classes over a backbone, which is checked."""
    features = backbones.check_backbone(backbone, image_size)
    return Network(backbone, features, image_size, find_layers(backbone, image_size) if multiscale else ())


def _module(
    path: str | Path, settings: Mapping[str, Any], backbone: nn.Module | None, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The backbone of a file with its tensors: a copy of the caller's module, or one built by its name."""
    if backbone is None and settings["backbone"] is None:
        architecture = shown(settings["architecture"])[:80]
        raise ModelFileError(
            f"{path} was made with a backbone that is not registered ({architecture}); build that module and pass it with "
            "load(path, backbone=module)"
        )
    return adoption.rebuild(settings["backbone"] if backbone is None else backbone, tensors)
