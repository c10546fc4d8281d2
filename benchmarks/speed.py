"""How fast each step is: ours and the published one in turns, in one run, at equal network, batch and generator."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.published import Published, plain
from edge_dfcil import RECIPES, Learner, devices, training
from edge_dfcil.data import Batch
from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.inversion import Dream, Dreamer, Dreams
from edge_dfcil.methods.abd import ABD
from edge_dfcil.network import Network
from edge_dfcil.recipe import Recipe
from edge_dfcil.training import Stage, Task

FILE = "speed.json"
AGREE = 1e-4  # equal mathematics: no term of ours differs from the published one by more than this share of the loss


@dataclass(frozen=True)
class Setting:
    """What is timed. `n_old` classes are known, `n_new` come; `images` are a task's, for whole tasks."""

    backbone: str
    batch: int
    n_old: int
    n_new: int
    images: int
    rounds: int
    recipe: Recipe


FULL = Setting("resnet32", 128, 50, 10, 10_000, 7, RECIPES["paper"])
QUICK = Setting("resnet8", 4, 3, 2, 16, 2, replace(RECIPES["paper"], latent=8, width=8, generator_batch=4))


class Bench:
    """One task's networks, twice: as published and as ours, with the same weights."""

    def __init__(self, setting: Setting, device: torch.device, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.setting, self.device, self.recipe = setting, device, recipe
        teacher = Learner(setting.backbone, device=device, mean=(0.5,) * 3, std=(0.25,) * 3).network.grown(setting.n_old)
        self._settle(teacher)
        self.teacher = teacher.frozen()
        images = torch.randn(setting.batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        targets = torch.randint(setting.n_old, setting.n_old + setting.n_new, (setting.batch,), device=device)
        self.batch = Batch(images, targets)
        self.student = teacher.grown(setting.n_new)
        self.dreamer = Dreamer(self.teacher, torch.arange(setting.n_old, device=device), recipe)
        self.task = self._task(self.student)

    def _settle(self, network: Network) -> None:
        """Running statistics of real passes, so that no loss is extreme."""
        network.train()
        with torch.no_grad():
            for _ in range(20):
                network.backbone(torch.randn(32, 3, 32, 32, device=self.device))

    def _task(self, student: Network) -> Task:
        s = self.setting
        counts = torch.zeros(s.n_old + s.n_new, device=self.device)
        counts[s.n_old :] = s.images / s.n_new
        current, old = torch.arange(s.n_old, s.n_old + s.n_new), torch.arange(s.n_old)
        batches: Any = [self.batch]
        return Task(
            student, self.teacher, current.to(self.device), old.to(self.device), counts, batches, self.recipe, self.device,
            Dreams(self.dreamer),
        )  # fmt: skip

    def published(self) -> Published:
        return Published(self.teacher, self.student, self.dreamer.generator)

    def classifier(self, student: Network | None = None) -> Stage:
        """Our learning stage, one step long."""
        task = self.task if student is None else self._task(student)
        return replace(training.learning_stage(task, ABD()), steps=1)

    def generator(self) -> Stage:
        return replace(self.dreamer.stage(), steps=1)

    def finetuning(self, n: int) -> Stage:
        """The floor: plain cross-entropy on as many images as a step of ABD sees."""
        student = copy.deepcopy(self.student)
        images, targets = self.batch.images.repeat(n // len(self.batch), 1, 1, 1), self.batch.targets.repeat(n // len(self.batch))

        def loss(batch: Batch) -> training.Terms:
            return {"cross_entropy": F.cross_entropy(student.classify(batch.images), batch.targets)}

        optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=2e-4)
        return Stage("finetune", [Batch(images, targets)], 1, loss, optimizer, None, [student])

    def step(self, stage: Stage) -> Callable[[], dict[str, float]]:
        """A stage as a step that can be taken again and again."""
        return lambda: training.fit(stage, self.device, (), lambda: False).losses


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each step, all of them taken once a round. The first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            devices.synchronize(device)
            begin = time.perf_counter()
            step()
            devices.synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return {name: median(found[1:]) for name, found in seconds.items()}


def run(device: str, setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """All of it; see `describe` for what it says."""
    found_device = devices.find_device(device)
    bench = Bench(setting, found_device, setting.recipe)
    say("do the losses agree?")
    difference = agreement(bench)
    say("steps, in turns")
    published = bench.published()
    n = setting.batch
    steps = {
        "published classifier step": lambda: published.classifier_step(bench.batch.images.contiguous(), bench.batch.targets),
        "our classifier step": bench.step(bench.classifier()),
        "fine-tuning on as many images": bench.step(bench.finetuning(2 * n)),
        "published generator step": lambda: published.generator_step(setting.recipe.generator_batch),
        "our generator step": bench.step(bench.generator()),
    }
    edge = Bench(setting, found_device, edge_recipe(setting))
    steps |= {"edge classifier step": edge.step(edge.classifier()), "edge generator step": edge.step(edge.generator())}
    seconds = in_turns(steps, setting.rounds, found_device)
    say("tries, in turns")
    tried = tries(bench, edge)
    say("profile")
    return {
        "classifier_step_ratio": seconds["published classifier step"] / seconds["our classifier step"],
        "generator_step_ratio": seconds["published generator step"] / seconds["our generator step"],
        "losses_differ_by": difference,
        "seconds": seconds,
        "tasks": whole_tasks(setting, seconds),
        "tries": tried,
        "profile": {
            "classifier step": profile(steps["our classifier step"], found_device),
            "generator step": profile(steps["our generator step"], found_device),
        },
        "setting": {**asdict(setting), "recipe": "paper"},
        "versions": machine.versions(),
        "machine": machine.machine(found_device),
    }


def edge_recipe(setting: Setting) -> Recipe:
    small = {"latent": 8, "width": 8, "generator_batch": 4, "pool": 16} if setting is QUICK else {}
    return replace(RECIPES["edge"], **small)  # type: ignore[arg-type]


def agreement(bench: Bench) -> float:
    """Largest difference between a term of our loss and the published one, as a share of the whole loss, on the same
    weights, noise and images. Raises `AssertionError` when it is above `AGREE`."""
    published, worst = bench.published(), 0.0
    student = copy.deepcopy(bench.student)
    ours = {"classifier": bench.classifier(student), "generator": bench.generator()}
    theirs = {
        "classifier": lambda: published.classifier_step(bench.batch.images.contiguous(), bench.batch.targets),
        "generator": lambda: published.generator_step(bench.recipe.generator_batch),
    }
    weights = copy.deepcopy(bench.dreamer.generator.state_dict())
    for name, stage in ours.items():
        for module in stage.trains:
            module.train()
        torch.manual_seed(1)
        expected = theirs[name]()
        torch.manual_seed(1)
        found = {key: value.item() for key, value in stage.loss(next(iter(stage.batches))).items()}
        worst = max(worst, *(abs(found[key] - expected[key]) / sum(expected.values()) for key in expected))
    bench.dreamer.generator.load_state_dict(weights)
    assert worst <= AGREE, f"losses differ by {worst:.2g}: this is not the same mathematics"
    return worst


def tries(bench: Bench, edge: Bench) -> dict[str, float]:
    """Seconds of each step with one thing changed, over those of ours; above 1 is slower. Compiled steps are warm."""
    device, rounds = bench.device, min(3, bench.setting.rounds)
    found = {}
    base = bench.step(bench.classifier(copy.deepcopy(bench.student)))
    for name, change in CLASSIFIER_TRIES.items():
        student = copy.deepcopy(bench.student)
        try:
            times = in_turns({"ours": base, "changed": change(bench, student)}, rounds, device)
            found[f"classifier: {name}"] = times["changed"] / times["ours"]
        except Exception as error:  # a compiler that is not there, for one: that is a finding too
            found[f"classifier: {name}"] = f"failed: {type(error).__name__}"  # type: ignore[assignment]
    base = bench.step(bench.generator())
    for name, change in GENERATOR_TRIES.items():
        times = in_turns({"ours": base, "changed": change(bench)}, rounds, device)
        found[f"generator: {name}"] = times["changed"] / times["ours"]
    return found


def _rows_first(bench: Bench, student: Network) -> Callable[[], Any]:
    contiguous: Any = torch.contiguous_format
    other = copy.copy(bench)
    other.batch = Batch(bench.batch.images.contiguous(), bench.batch.targets)
    other.teacher = copy.deepcopy(bench.teacher).to(memory_format=contiguous)
    other.dreamer = copy.copy(bench.dreamer)
    other.dreamer.teacher, other.dreamer.generator = other.teacher, plain(bench.dreamer.generator)  # type: ignore[assignment]
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
    stage = bench.classifier(student)
    stage.optimizer = torch.optim.SGD(student.parameters(), 0.1, 0.9, weight_decay=2e-4, fused=True)
    return bench.step(replace(stage, scheduler=None))


def _bf16(bench: Bench, student: Network) -> Callable[[], Any]:
    stage = bench.classifier(student)
    loss = stage.loss

    def half(batch: Any) -> training.Terms:
        with torch.autocast(bench.device.type, torch.bfloat16):
            return loss(batch)

    stage.loss = half
    return bench.step(stage)


def _pool(bench: Bench, student: Network) -> Callable[[], Any]:
    task = bench._task(student)
    images = torch.randn(len(bench.batch), 3, 32, 32, device=bench.device).contiguous(memory_format=torch.channels_last)
    dreams = Dream(images, torch.randn(len(images), bench.setting.n_old, device=bench.device))

    class Pool:
        def sample(self, n: int) -> Dream:
            return dreams

    pool: Any = Pool()
    task.dreams = pool
    return bench.step(replace(training.learning_stage(task, ABD()), steps=1))


def _teacher_gradients(bench: Bench) -> Callable[[], Any]:
    other = copy.copy(bench.dreamer)
    other.teacher = copy.deepcopy(bench.teacher).requires_grad_(True)
    return bench.step(replace(other.stage(), steps=1))


def _var_mean(bench: Bench) -> Callable[[], Any]:
    step = bench.step(bench.generator())

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        v, u = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
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
    other.generator = ChannelsLast(plain(bench.dreamer.generator))
    return bench.step(replace(other.stage(), steps=1))


class ChannelsLast(nn.Module):
    """The plain generator in our memory order, so that doubling alone differs."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.begin, self.end = layers[:2], layers[2:].to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor) -> Tensor:
        return self.end(self.begin(z).contiguous(memory_format=torch.channels_last))


def _fused_adam(bench: Bench) -> Callable[[], Any]:
    stage = bench.generator()
    stage.optimizer = torch.optim.Adam(bench.dreamer.generator.parameters(), 1e-3, fused=True)
    return bench.step(stage)


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


def whole_tasks(setting: Setting, seconds: dict[str, float]) -> dict[str, float]:
    """Hours of a second task of `images` images, computed from the steps: inversion and learning, as each recipe has them."""

    def hours(recipe: Recipe, generator: str, classifier: str, per_step: int = 1) -> float:
        per_epoch = setting.images // setting.batch if recipe.drop_incomplete else -(-setting.images // setting.batch)
        learn = max(recipe.epochs * per_epoch, recipe.min_steps)
        dream = recipe.generator_steps if generator else 0
        return (dream * seconds.get(generator, 0.0) + learn * seconds[classifier]) / 3600

    paper, edge = RECIPES["paper"], RECIPES["edge"]
    return {
        "published, its own schedule": hours(paper, "published generator step", "published classifier step"),
        "ours, recipe paper": hours(paper, "our generator step", "our classifier step"),
        "ours, recipe edge": hours(edge, "edge generator step", "edge classifier step"),
        "fine-tuning on as many images, schedule of paper": hours(paper, "", "fine-tuning on as many images"),
        "fine-tuning on as many images, schedule of edge": hours(edge, "", "fine-tuning on as many images"),
    }


PARTS = {
    "convolutions, forward": ("mkldnn_convolution", "cudnn_convolution", "slow_conv", "thnn_conv", "_convolution"),
    "convolutions, backward": ("convolution_backward",),
    "BatchNorm": ("batch_norm",),
    "linear layers": ("addmm", "aten::mm"),
    "optimiser": ("Optimizer.step", "_foreach", "_fused"),
    "activations": ("clamp_min", "threshold_backward", "relu", "tanh"),
}


def profile(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The share of each part in a step's time, by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profiler(activities=activities) as recorded:
        for _ in range(3):
            step()
        devices.synchronize(device)
    times: dict[str, float] = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in recorded.key_averages():
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        part = next((name for name, keys in PARTS.items() if any(key in event.key for key in keys)), "the rest")
        times[part] += own
    total = sum(times.values())
    return {name: value / total for name, value in times.items()}


def describe(found: dict[str, Any]) -> str:
    """The findings as Markdown."""
    s, seconds = found["setting"], found["seconds"]
    lines = [
        f"{s['backbone']}, batch {s['batch']}, the published generator, {s['n_old']} old and {s['n_new']} new classes, "
        f"{found['machine']['processor']} ({found['machine']['device']}), {found['machine']['threads']} threads, torch "
        f"{found['versions']['torch']}; medians of {s['rounds']} rounds in turns. No term of our loss differs from the "
        f"published one by more than {found['losses_differ_by']:.0e} of the whole.",
        "",
        "| step | published, s | ours, s | ratio |",
        "|---|---|---|---|",
    ]
    for name in ("classifier", "generator"):
        lines.append(
            f"| {name} | {seconds[f'published {name} step']:.3f} | {seconds[f'our {name} step']:.3f} "
            f"| {found[f'{name}_step_ratio']:.2f} |"
        )
    lines += ["", f"| under `edge` | s |\n|---|---|\n| classifier step | {seconds['edge classifier step']:.3f} |"]
    lines[-1] += f"\n| generator step | {seconds['edge generator step']:.3f} |"
    lines[-1] += f"\n| fine-tuning on as many images (the floor) | {seconds['fine-tuning on as many images']:.3f} |"
    lines += ["", f"| a task of {s['images']} images, computed from the steps | hours |", "|---|---|"]
    lines += [f"| {name} | {hours:.2f} |" for name, hours in found["tasks"].items()]
    lines += ["", "| tried | time over ours |", "|---|---|"]
    lines += [f"| {name} | {value if isinstance(value, str) else f'{value:.2f}'} |" for name, value in found["tries"].items()]
    lines += ["", "| share of the step's time | classifier step, % | generator step, % |", "|---|---|---|"]
    classifier, generator = found["profile"]["classifier step"], found["profile"]["generator step"]
    lines += [f"| {part} | {100 * share:.0f} | {100 * generator[part]:.0f} |" for part, share in classifier.items()]
    floor = {
        name: sum(share for part, share in shares.items() if "convolutions" in part) for name, shares in found["profile"].items()
    }
    lines += [
        "",
        "The convolutions alone are the floor: "
        + " and ".join(f"{100 * share:.0f} % of the {name}" for name, share in floor.items())
        + ".",
    ]
    return "\n".join(lines)
