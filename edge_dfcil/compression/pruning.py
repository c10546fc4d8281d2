"""Data-free pruning (DeepInversion, Yin et al., CVPR 2020, section 4.3): channels that matter least on
dreams are removed, in groups that suit the hardware, and the remaining network is repaired by distillation on dreams.

torch-pruning finds the channels that must be removed together, because of residual connections and depthwise layers. Each of
its groups is then checked, before the first cut with some channels and at every cut with those that are cut: the network
without them must answer as the network in which they are set to zero. The groups of a grouped convolution must keep equal sizes,
so channels at the same place in each of them are removed together.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_dfcil.compression.distillation import REPAIR, Distillation, Lesson, parameters, rehearsed, smaller_generator
from edge_dfcil.compression.latency import LatencyTable, Shape
from edge_dfcil.dreaming.inversion import Dream, Dreamer, Pool, make_pool
from edge_dfcil.dreaming.work import GeneratingWork
from edge_dfcil.errors import BackboneError, SettingError
from edge_dfcil.methods._own_head import own_head
from edge_dfcil.model.backbones import BATCHNORM
from edge_dfcil.model.labels import Classes
from edge_dfcil.model.network import Network
from edge_dfcil.results import PruneReport, StageReport
from edge_dfcil.settings import CONFIG, Count, ShareInside, Weight, checked, validated
from edge_dfcil.training.callbacks import Callback
from edge_dfcil.training.loop import check_finite
from edge_dfcil.training.rehearsal import Rehearsal, short
from edge_dfcil.training.session import Session
from edge_dfcil.training.stage import Stage
from exporters.timing import latencies

if TYPE_CHECKING:
    from edge_dfcil.learner import Learner

BLOCK = 4  # groups that are considered together
AT_ONCE = 64  # generated images in memory together when importance is measured
# The largest difference between the logits of a pruned and of a masked network, as a share of the largest logit: without the
# zero channels, sums have another order. The first check is in float64; at every cut it is in float32, on accelerators with
# products of ten bits.
ALIKE, ALIKE_AT_A_CUT = 1e-6, 2e-2


@checked("Pruning")
@validated(frozen=True, config=CONFIG)
class Pruning:
    """How far a network is pruned, and by what. Give exactly one of the three targets `ratio`, `flops` and `latency`."""

    ratio: ShareInside | None = None
    """Share of filters, that is output channels of convolutions, to remove."""
    flops: ShareInside | None = None
    """Share of floating-point operations to keep."""
    latency: ShareInside | None = None
    """Share of the latency to keep, by the table measured on this machine."""
    group: Count = 8
    """Channels are removed this many at a time; a layer keeps at least as many."""
    eta: Weight = 1.0
    """Weight of the latency saved, as a share of the whole, against the importance lost, as a share of all importance."""
    dreams: Count = 256
    """Number of dreams on which importance is measured."""
    rounds: Count = 20
    """About how often importance is measured again while channels are removed."""
    repair: Distillation | None = REPAIR
    """How the pruned network learns from the original; None skips the repair."""

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "flops", "latency") if getattr(self, name) is not None]
        if len(given) != 1:
            raise SettingError(f"{', '.join(given) or 'no target'} is given; give one of ratio, flops and latency")


def prune(
    learner: Learner,
    settings: Pruning,
    *,
    table: LatencyTable | None = None,
    timing: bool = True,
    evaluation: Any | None = None,
    classes: Classes | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> tuple[Learner, PruneReport]:
    """A learner with fewer channels in the same backbone. `learner` is not changed.

    Parameters
    ----------
    table
        Latencies of convolutions; None takes the stored one of this machine.
    timing
        Whether to export both networks in the end and time them; else the report's `milliseconds` is None.
    evaluation, classes
        As for `distill`.

    Raises
    ------
    NotLearnedError
        Before the first task.
    BackboneError
        When no channel of the backbone can be removed, or too few for the target.
    SettingError
        When torch-pruning is not installed.
    """
    work = PruningWork(learner, settings, table or LatencyTable(), timing, evaluation, classes)
    found: tuple[Learner, PruneReport] = learner.run(work, callbacks, progress, seed=learner.seed)
    return found


class PruningWork(GeneratingWork):
    """The work of a session that prunes a network and repairs it."""

    def __init__(
        self,
        learner: Learner,
        settings: Pruning,
        table: LatencyTable,
        timing: bool,
        evaluation: Any | None,
        classes: Classes | None,
    ) -> None:
        if not isinstance(settings, Pruning):
            raise SettingError(f"settings={settings!a:.80} is a {type(settings).__name__}; pass a Pruning")
        learner.check_answering()
        self._learner, self._settings, self._table, self._timing = learner, settings, table, timing
        self._recipe = learner.recipe
        self._evaluation, self._classes = evaluation, classes

    def stages(self, session: Session[Any]) -> Iterator[Stage]:
        settings, teacher = self._settings, self._learner.network.frozen()
        dreamer = Dreamer(teacher, torch.arange(teacher.n_classes, device=session.device), self._recipe)
        yield dreamer.stage()
        pool = make_pool(dreamer, settings.dreams, self._at_once)
        self._network = self._plain()
        self._cutter = Cutter(self._network, pool, settings, self._table, self._at_once)
        self._cutter.cut(session.check)
        self._table.save()
        self._pruned = copy.deepcopy(self._network)
        self._lesson: Lesson | None = None
        if settings.repair is not None:
            self._lesson = Lesson(self._network, teacher, self._recipe, settings.repair, self._at_once)
            yield from self._lesson.stages()

    def _plain(self) -> Network:
        """A copy of the network to prune. Features of several scales would have to be pruned with the layers they come from;
        the copy has only the backbone's own, and the repair compensates for the others."""
        network, statistics = self._learner.network, self._learner.model.statistics
        return network.without_scales(*own_head(network, statistics)) if network.reads_scales else network.grown(0)

    # For the planner

    def smaller(self) -> list[dict[str, int]]:
        return smaller_generator(self._recipe, self._settings.repair or REPAIR)

    def rehearsal(self, changes: Mapping[str, int]) -> Rehearsal:
        """The whole network is rehearsed: the size of the pruned one is not known yet."""
        teacher, recipe = self._learner.network.frozen(), self._recipe.changed(changes)
        if self._settings.repair is not None:
            return rehearsed(self._plain(), teacher, recipe, self._settings.repair)
        dreamer = Dreamer(teacher, torch.arange(teacher.n_classes, device=teacher.mean.device), short(recipe))
        return Rehearsal(iter([dreamer.stage()]), [teacher])

    def finish(self, session: Session[Any], reports: Sequence[StageReport]) -> tuple[Learner, PruneReport]:
        learner, cutter = self._learner, self._cutter
        check_finite(self._network)
        smaller, pruned = self._with(self._network), self._with(self._pruned)
        accuracy = None
        if self._evaluation is not None:
            before, broken, after = (one.evaluate(self._evaluation, self._classes).accuracy for one in (learner, pruned, smaller))
            accuracy = before, broken, after
        return smaller, PruneReport(
            filters=(cutter.before.filters, cutter.now.filters),
            parameters=(parameters(learner.network), parameters(self._network)),
            flops=(cutter.before.flops, cutter.now.flops),
            milliseconds=_measured(learner, smaller) if self._timing else None,
            table_milliseconds=(cutter.before.milliseconds, cutter.now.milliseconds),
            channels=cutter.channels,
            accuracy=accuracy,
            agreement=self._lesson.agreement() if self._lesson is not None else None,
            seconds=session.seconds,
            stages=tuple(reports),
        )

    def _with(self, network: Network) -> Learner:
        """A learner with this network. Class statistics are of the features before pruning, so they are not kept."""
        network = network.requires_grad_(False).eval()
        return self._learner.with_model(replace(self._learner.model, network=network, statistics={}, calibration=None))


def _measured(before: Learner, after: Learner) -> tuple[float, float]:
    """Milliseconds of both for one image, as exported."""
    graphs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, learner in (("before", before), ("after", after)):
            graphs[name] = Path(learner.export(Path(folder) / f"{name}.onnx").path).read_bytes()
    seconds = latencies(graphs, before.image_size)
    return 1000 * seconds["before"], 1000 * seconds["after"]


@dataclass(frozen=True)
class _Size:
    """The size and the cost of a network."""

    filters: int
    flops: int
    milliseconds: float


class Cutter:
    """Removes channels of a network, in place, until it is as small as the target.

    Importance is measured on `dreams`, at most `at_once` of them at a time.
    """

    def __init__(
        self,
        network: Network,
        dreams: Dream | Pool,
        settings: Pruning,
        table: LatencyTable,
        at_once: int | None = None,
    ) -> None:
        self._network, self._dreams, self._settings, self._table = network, dreams, settings, table
        self._at_once = min(at_once or AT_ONCE, AT_ONCE)
        self._few = dreams[torch.arange(min(4, len(dreams)), device=dreams.logits.device)].images
        self._whole = nn.Sequential(network.backbone, network.head).eval()
        self._names = {module: name for name, module in network.backbone.named_modules()}
        self._shapes = _convolutions(network)
        self.before = self._size(self._shapes)
        self.channels: dict[str, int] = {}
        self._graph = self._dependencies(self._whole, self._few)
        candidates = self._candidates()
        self.roots = [root for root in candidates if self._answers_as_masked(root, self._trial(root))]
        self._refused = [self._names[root] for root in candidates if root not in self.roots]
        if not self.roots:
            raise BackboneError(
                f"no layer of this backbone has {2 * settings.group} channels of which some can be removed{self._refusals()}"
            )

    @property
    def now(self) -> _Size:
        return self._size(_convolutions(self._network))

    def cut(self, check: Callable[[], object] = lambda: None) -> None:
        """Removes channels until the target is met; `check` is called between cuts and may raise.

        Raises `BackboneError` when no layer can lose more channels.
        """
        each = 1
        while not self._done():
            check()
            scored = sorted(self._scored(), key=lambda candidate: candidate[0])
            if not scored:
                raise BackboneError(
                    f"the target cannot be met: {self.now.filters} of {self.before.filters} filters are left, and no layer can "
                    f"lose {self._settings.group} more channels and keep as many{self._refusals()}. Ask for less"
                )
            each = max(1, round(len(scored) / self._settings.rounds)) if each == 1 else each
            for _, root, channels in scored[:each]:
                self._take(root, channels)
                self.channels[self._names[root]] = root.out_channels
                if self._done():
                    break

    def _take(self, root: nn.Conv2d, channels: list[int]) -> None:
        """Removes channels of a root, and all that depend on them, from the network.

        Raises `BackboneError` when the network then does not answer as with those channels at zero.
        """
        group, images = self.group(root, channels), self._few
        with torch.no_grad(), _zero(group):
            masked = self._whole(images)
        group.prune()
        try:
            with torch.no_grad():
                agrees = _alike(self._whole(images), masked, ALIKE_AT_A_CUT)
        except (RuntimeError, ValueError):  # the shapes of its layers do not fit together
            agrees = False
        if not agrees:
            raise BackboneError(
                f"{self._names[root]} cannot lose {len(channels)} channels, because the layers after it do not adapt; the "
                "network cannot be pruned that far. Ask for less, or distil into another backbone"
            )

    def _refusals(self) -> str:
        """Which layers cannot lose channels, to be appended to a message."""
        if not self._refused:
            return ""
        more = f" and {len(self._refused) - 3} more" if len(self._refused) > 3 else ""
        return f"; {', '.join(self._refused[:3])}{more} cannot lose any, because the layers after them do not adapt"

    def _done(self) -> bool:
        settings, now, before = self._settings, self.now, self.before
        if settings.ratio is not None:
            return now.filters <= (1 - settings.ratio) * before.filters
        if settings.flops is not None:
            return now.flops <= settings.flops * before.flops
        assert settings.latency is not None
        return now.milliseconds <= settings.latency * before.milliseconds

    def _scored(self) -> Iterator[tuple[float, nn.Conv2d, list[int]]]:
        """For each layer a score, the layer and the channels to remove next. The score is the share of importance lost, minus
        eta times the share of latency saved, per group of channels.

        Kernels work in blocks: a layer is often no faster without one group, but faster without two. So up to `BLOCK` groups are
        considered together, and their mean counts.
        """
        importance, shapes = self._importance(), _convolutions(self._network)
        total = sum(float(values.sum()) for values in importance.values()) or 1.0
        eta = self._settings.eta
        for root, values in importance.items():
            units, candidates = self._units(root), []
            step = self._step(units)
            order = torch.stack([values[unit].sum() for unit in units]).argsort().tolist()
            for count in range(1, min(BLOCK if eta else 1, self._steps_left(units)) + 1):
                channels = [channel for unit in order[: count * step] for channel in units[unit]]
                damage = float(values[channels].sum()) / total
                saved = self.saved(root, channels, shapes) / self.before.milliseconds if eta else 0.0
                candidates.append(((damage - eta * saved) / count, sorted(channels)))
            if candidates:
                score, channels = min(candidates, key=lambda candidate: candidate[0])
                yield score, root, channels

    # Dependencies

    @staticmethod
    def _dependencies(whole: nn.Sequential, images: Tensor) -> Any:
        try:
            import torch_pruning
        except ImportError as error:
            raise SettingError(f"pruning needs torch-pruning ({error}): pip install 'edge-dfcil[prune]'") from error
        try:
            return torch_pruning.DependencyGraph().build_dependency(whole, example_inputs=images[:2])
        except Exception as error:  # it traces the network, and raises errors of many kinds
            raise BackboneError(
                f"torch-pruning cannot follow how {type(whole[0]).__name__} splits or shuffles channels ({type(error).__name__}: "
                f"{error}), so that no layer of it can be pruned; distil into another backbone instead"
            ) from error

    def group(self, root: nn.Conv2d, channels: list[int], graph: Any = None) -> Any:
        import torch_pruning

        return (graph or self._graph).get_pruning_group(root, torch_pruning.prune_conv_out_channels, idxs=channels)

    def _candidates(self) -> list[nn.Conv2d]:
        """A convolution for each set of layers that lose channels together, if it has enough of them and BatchNorm."""
        found = []
        for group in self._graph.get_all_groups(ignored_layers=[self._network.head], root_module_types=[nn.Conv2d]):
            root = group[0][0].target.module
            enough = root.out_channels >= 2 * self._settings.group and self._steps_left(self._units(root)) > 0
            if enough and any(self._batchnorms(root)):
                found.append(root)
        return found

    def _units(self, root: nn.Conv2d) -> list[list[int]]:
        """The channels of a root in sets that are removed together: the groups of each grouped convolution keep equal sizes.

        Without grouped convolutions each channel is a set. Where layers with different groups meet, overlapping sets are joined.
        """
        leader = list(range(root.out_channels))  # for each channel, one channel of its set; initially itself
        if not any(layer.groups > 1 and not _is_depthwise(layer) for layer in self._shapes):
            return [[channel] for channel in leader]  # saves the walk through the group below

        def find(channel: int) -> int:
            while leader[channel] != channel:
                leader[channel] = channel = leader[leader[channel]]
            return channel

        for dep, index in self.group(root, list(range(root.out_channels))):
            layer = dep.target.module
            if not isinstance(layer, nn.Conv2d) or layer.groups == 1 or _is_depthwise(layer) or len(index) != len(leader):
                continue
            size = (layer.out_channels if _is_output(dep) else layer.in_channels) // layer.groups
            first: dict[int, int] = {}  # for each place inside a group, the first channel there
            for channel, place in enumerate(index):
                leader[find(channel)] = find(first.setdefault(place % size, channel))
        units: dict[int, list[int]] = {}
        for channel in range(len(leader)):
            units.setdefault(find(channel), []).append(channel)
        return list(units.values())

    def _step(self, units: list[list[int]]) -> int:
        """How many units are removed at a time: enough for at least `settings.group` channels."""
        return -(-self._settings.group // min(map(len, units)))

    def _steps_left(self, units: list[list[int]]) -> int:
        """How often that many can be removed. At least as many stay, and two in each group of a grouped convolution: with one it
        would be depthwise, which loses channels differently."""
        step = self._step(units)
        stay = max(step, 2) if len(units[0]) > 1 else step
        return (len(units) - stay) // step

    def _trial(self, root: nn.Conv2d) -> list[int]:
        """Channels to check a root with, in whole units: the first quarter and a third of the others. The choice is uneven,
        because a layer that the network splits into halves would pass with an even choice, and fail with the next one."""
        units = self._units(root)
        quarter = max(1, len(units) // 4)
        return list(chain.from_iterable(units[:quarter] + units[quarter + 1 :: 3]))

    def _answers_as_masked(self, root: nn.Conv2d, channels: list[int]) -> bool:
        """Whether a network without these channels answers as the network in which all weights that make them are zero."""
        images, cut = self._few.cpu().double(), copy.deepcopy(self._whole).cpu().double()
        place = {module: name for name, module in self._whole.named_modules()}
        try:
            graph = self._dependencies(cut, images)
            group = self.group(cut.get_submodule(place[root]), channels, graph)  # type: ignore[arg-type]
            with torch.no_grad(), _zero(group):
                masked = cut(images)
            group.prune()
            with torch.no_grad():
                return _alike(cut(images), masked, ALIKE)
        except Exception:  # a group that does not fit together; torch-pruning raises errors of many kinds
            return False

    # Importance

    def _importance(self) -> dict[nn.Conv2d, Tensor]:
        """The importance of each root's channels: the squared first-order change of the answer when the channel is scaled,
        (sum of gradient x weight)^2 over all weights that make it, as a mean over dreams.

        The paper takes the gradient of the KL to the teacher, which is zero when pruning begins. Its curvature is not zero: it
        is the mean square of the gradient of ln p(y), with y drawn from the answer. This is used here.
        """
        members = {root: list(self._batchnorms(root)) for root in self.roots}
        found = {root: torch.zeros(root.out_channels, device=self._few.device) for root in self.roots}
        for index in torch.arange(len(self._dreams), device=self._few.device).split(self._at_once):
            dream = self._dreams[index]
            images, logits = dream.images, dream.logits
            outputs: dict[nn.Module, Tensor] = {}
            layers = {layer for pairs in members.values() for layer, _ in pairs}
            handles = [layer.register_forward_hook(_keep(outputs)) for layer in layers]
            try:
                answer = self._whole(images)
            finally:
                for handle in handles:
                    handle.remove()
            drawn = torch.multinomial(logits.softmax(1), 1).squeeze(1)
            kept = list(outputs)
            gradients = torch.autograd.grad(F.cross_entropy(answer, drawn, reduction="sum"), [outputs[layer] for layer in kept])
            # The output times its gradient, summed over the image, is gradient x weight summed over the layer's scale and shift.
            change = {
                layer: (outputs[layer].detach() * gradient).flatten(2).sum(2)
                for layer, gradient in zip(kept, gradients, strict=True)
            }
            for root, pairs in members.items():
                found[root] += sum(change[layer][:, index] for layer, index in pairs).square().sum(0)  # type: ignore[union-attr]
        return {root: values / len(self._dreams) for root, values in found.items()}

    def _batchnorms(self, root: nn.Conv2d) -> Iterator[tuple[nn.Module, list[int]]]:
        """The BatchNorm layers of a root's channels, and the index of each channel in them."""
        for dep, index in self.group(root, list(range(root.out_channels))):
            if _is_batchnorm(dep) and len(index) == root.out_channels:
                yield dep.target.module, list(index)

    # Cost

    def _size(self, shapes: dict[nn.Conv2d, Shape]) -> _Size:
        return _Size(
            sum(shape.channels_out for shape in shapes.values()),
            sum(shape.flops for shape in shapes.values()) + 2 * self._network.head.weight.numel(),
            sum(self._table(shape) for shape in shapes.values()),
        )

    def saved(self, root: nn.Conv2d, channels: list[int], shapes: dict[nn.Conv2d, Shape] | None = None) -> float:
        """Milliseconds saved without some of a root's channels, by the table."""
        shapes = shapes or _convolutions(self._network)
        after, ends = dict(shapes), set()
        for dep, index in self.group(root, channels):
            layer = dep.target.module
            # A depthwise layer is in the group for its input and for its output, but loses its channels once.
            end = (layer, "both" if _is_depthwise(layer) else dep.handler) if layer in after else None
            if end is not None and end not in ends:
                ends.add(end)
                after[layer] = _shape_without(after[layer], dep, len(index))
        return sum(self._table(shapes[layer]) - self._table(after[layer]) for layer in shapes if after[layer] != shapes[layer])


def _keep(outputs: dict[nn.Module, Tensor]) -> Callable[..., None]:
    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[layer] = output

    return hook


def _is_batchnorm(dep: Any) -> bool:
    return isinstance(dep.target.module, BATCHNORM)


def _is_depthwise(layer: Any) -> bool:
    """As torch-pruning sees it: such a layer loses inputs and outputs together."""
    return layer.groups == layer.out_channels and layer.out_channels > 1


@contextmanager
def _zero(group: Any) -> Iterator[None]:
    """Inside, the channels of a group are zero, by the weights of all layers that make them."""
    before: dict[nn.Parameter, Tensor] = {}
    for dep, index in group:
        if not (_is_batchnorm(dep) or _is_output(dep)):
            continue
        for parameter in dep.target.module.parameters(recurse=False):
            before.setdefault(parameter, parameter.detach().clone())
            parameter.data[list(index)] = 0
    try:
        yield
    finally:
        for parameter, values in before.items():
            parameter.data.copy_(values)


def _alike(logits: Tensor, masked: Tensor, tolerance: float) -> bool:
    return bool((logits - masked).abs().max() <= tolerance * masked.abs().max())


def _is_output(dep: Any) -> bool:
    """Whether a dependency is of a layer's output, not of its input; for depthwise layers it is of both."""
    import torch_pruning

    giving = (
        torch_pruning.prune_conv_out_channels,
        torch_pruning.prune_depthwise_conv_out_channels,
        torch_pruning.prune_linear_out_channels,
    )
    return dep.handler in giving


def _shape_without(shape: Shape, dep: Any, n: int) -> Shape:
    """A convolution's shape after a dependency has removed `n` channels of its input or output; of a depthwise one, of both."""
    import torch_pruning

    if shape.groups == shape.channels_out > 1:
        left = shape.channels_out - n
        return replace(shape, channels_in=left, channels_out=left, groups=left)
    if dep.handler == torch_pruning.prune_conv_out_channels:
        return replace(shape, channels_out=shape.channels_out - n)
    return replace(shape, channels_in=shape.channels_in - n)


def _shape(layer: Any, height: int, width: int) -> Shape:
    return Shape(layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.groups, height, width)


@torch.no_grad()
def _convolutions(network: Network) -> dict[nn.Conv2d, Shape]:
    """The convolutions of a backbone in the order in which they are executed."""
    found: dict[nn.Conv2d, Shape] = {}

    def hook(layer: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
        found[layer] = _shape(layer, *inputs[0].shape[2:])

    layers = [module for module in network.backbone.modules() if isinstance(module, nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    was_training = network.training
    try:
        network.eval().backbone(torch.zeros(1, 3, network.image_size, network.image_size, device=network.mean.device))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    return found
