"""Our steps with one thing changed each, for the speed table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.steps import Bench, generator_of, in_turns
from demos import abd_in_one_file as one_file
from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.inversion import Dream
from edge_dfcil.model.network import Network
from edge_dfcil.training.data import Batch
from edge_dfcil.training.stage import Terms


def run(bench: Bench) -> dict[str, float | str]:
    """Seconds of each step with one thing changed, over those of ours; above 1 is slower. Compiled steps are warmed up."""
    device, rounds = bench.device, min(3, bench.setting.rounds)
    found: dict[str, float | str] = {}
    base = bench.step(bench.classifier(copy.deepcopy(bench.student)))
    for name, change in CLASSIFIER_TRIES.items():
        student = copy.deepcopy(bench.student)
        try:
            times = in_turns({"ours": base, "changed": change(bench, student)}, rounds, device)
            found[f"classifier: {name}"] = times["changed"] / times["ours"]
        except Exception as error:  # a missing compiler, for example: that is a finding too
            found[f"classifier: {name}"] = f"failed: {type(error).__name__}"
    base = bench.step(bench.generator())
    for name, changed in GENERATOR_TRIES.items():
        times = in_turns({"ours": base, "changed": changed(bench)}, rounds, device)
        found[f"generator: {name}"] = times["changed"] / times["ours"]
    return found


def _rows_first(bench: Bench, student: Network) -> Callable[[], Any]:
    contiguous: Any = torch.contiguous_format
    other = copy.copy(bench)
    other.batch = Batch(bench.batch.images.contiguous(), bench.batch.targets)
    other.teacher = copy.deepcopy(bench.teacher).to(memory_format=contiguous)
    other.dreamer = copy.copy(bench.dreamer)
    other.dreamer.teacher = other.teacher
    other.dreamer.generator = generator_of(bench.dreamer.generator)  # type: ignore[assignment]
    return other.step(other.classifier(student.to(memory_format=contiguous)))


def _folded(bench: Bench, student: Network) -> Callable[[], Any]:
    from torch.fx.experimental.optimization import fuse

    other = copy.copy(bench)
    other.teacher = copy.deepcopy(bench.teacher)
    other.teacher.backbone = fuse(other.teacher.backbone).to(memory_format=torch.channels_last)
    other.dreamer = copy.copy(bench.dreamer)
    other.dreamer.teacher = other.teacher
    return other.step(other.classifier(student))


def _compiled(bench: Bench, student: Network) -> Callable[[], Any]:
    mode = "reduce-overhead" if bench.device.type == "cuda" else "default"  # reduce-overhead: CUDA graphs
    student.backbone.compile(mode=mode)
    step = bench.step(bench.classifier(student))
    step()
    return step


def _fused_optimizer(bench: Bench, student: Network) -> Callable[[], Any]:
    def fused() -> torch.optim.Optimizer:
        return torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=2e-4, fused=True)

    return bench.step(replace(bench.classifier(student), optimizer=fused, scheduler=None))


def _bf16(bench: Bench, student: Network) -> Callable[[], Any]:
    stage = bench.classifier(student)
    loss = stage.loss

    def half(batch: Any) -> Terms:
        with torch.autocast(bench.device.type, torch.bfloat16):
            return loss(batch)

    return bench.step(replace(stage, loss=half))


def _pool(bench: Bench, student: Network) -> Callable[[], Any]:
    images = torch.randn(len(bench.batch), 3, 32, 32, device=bench.device).contiguous(memory_format=torch.channels_last)
    dreams = Dream(images, torch.randn(len(images), bench.setting.n_old, device=bench.device))

    class Pool:
        def sample(self, n: int) -> Dream:
            return dreams

    pool: Any = Pool()
    return bench.step(bench.classifier(student, pool))


def _teacher_gradients(bench: Bench) -> Callable[[], Any]:
    other = copy.copy(bench.dreamer)
    other.teacher = copy.deepcopy(bench.teacher).requires_grad_(True)
    return bench.step(replace(other.stage(), steps=1))


def _var_mean(bench: Bench) -> Callable[[], Any]:
    step = bench.step(bench.generator())

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        v, u = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
        return u, v

    def run() -> None:
        ours, objective.batch_statistics = objective.batch_statistics, plain
        try:
            step()
        finally:
            objective.batch_statistics = ours

    return run


def _doubling_first(bench: Bench) -> Callable[[], Any]:
    other: Any = copy.copy(bench.dreamer)
    other.generator = ChannelsLast(generator_of(bench.dreamer.generator))
    return bench.step(replace(other.stage(), steps=1))


class ChannelsLast(nn.Module):
    """The generator of the one-file demo in our memory order, so that only the doubling differs."""

    def __init__(self, generator: one_file.Generator) -> None:
        super().__init__()
        linear, unflatten, *others = generator
        self.begin = nn.Sequential(linear, unflatten)
        self.end = nn.Sequential(*others).to(memory_format=torch.channels_last)

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.begin(z).contiguous(memory_format=torch.channels_last))


def _fused_adam(bench: Bench) -> Callable[[], Any]:
    def fused() -> torch.optim.Optimizer:
        return torch.optim.Adam(bench.dreamer.generator.parameters(), 1e-3, fused=True)

    return bench.step(replace(bench.generator(), optimizer=fused))


CLASSIFIER_TRIES = {
    "rows-first memory instead of channels-last": _rows_first,
    "teacher with BatchNorm folded into its convolutions": _folded,
    "dreams from a pool, as in edge": _pool,
    "fused SGD": _fused_optimizer,
    "student compiled (torch.compile)": _compiled,
    "bf16 autocast": _bf16,
}
GENERATOR_TRIES = {
    "teacher parameters collect gradients": _teacher_gradients,
    "channel statistics by var_mean": _var_mean,
    "doubling, then convolving": _doubling_first,
    "fused Adam": _fused_adam,
}
