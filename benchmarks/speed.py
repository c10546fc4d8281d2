"""How fast each step is: ours and the published one, timed in turns in one run, with equal network, batch and generator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import machine, tries
from benchmarks.steps import QUICK, Bench, Setting, in_turns
from benchmarks.tables import processor, table
from edge_dfcil import RECIPES, devices
from edge_dfcil.recipe import Recipe

FILE = "speed.json"
AGREE = 1e-4  # equal mathematics: no term of ours differs from the published one by more than this share of the loss


def run(device: str, setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Makes all measurements; see `describe` for what they say."""
    found_device = devices.find_device(device)
    bench = Bench(setting, found_device, setting.recipe)
    say("comparing the losses")
    difference = agreement(bench)
    say("steps, in turns")
    published = bench.published()
    n = setting.batch
    steps = {
        "published classifier step": lambda: published.classifier_step(bench.batch.images.contiguous(), bench.batch.targets),
        "our classifier step": bench.step(bench.classifier()),
        "fine-tuning on as many images": bench.step(bench.finetuning(2 * n)),
        "published generator step": lambda: published.generator_step(setting.recipe.generator.batch),
        "our generator step": bench.step(bench.generator()),
    }
    edge = Bench(setting, found_device, edge_recipe(setting))
    steps |= {"edge classifier step": edge.step(edge.classifier()), "edge generator step": edge.step(edge.generator())}
    seconds = in_turns(steps, setting.rounds, found_device)
    say("tries, in turns")
    tried = tries.run(bench)
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
        **machine.provenance(found_device),
    }


def file(device: str) -> str:
    """The name of the result's file on a device: speed.json on a CPU, speed-cuda.json on an NVIDIA card."""
    kind = devices.find_device(device).type
    return FILE if kind == "cpu" else FILE.replace(".", f"-{kind}.")


def edge_recipe(setting: Setting) -> Recipe:
    small = {"generator.latent": 8, "generator.width": 8, "generator.batch": 4, "remember.pool": 16} if setting is QUICK else {}
    return RECIPES["edge"].changed(small)


def agreement(bench: Bench) -> float:
    """Largest difference between a term of our loss and the published one, as a share of the whole loss, on the same
    weights, noise and images. Raises `AssertionError` when it is above `AGREE`."""
    torch.backends.cudnn.allow_tf32, before = False, torch.backends.cudnn.allow_tf32  # TF32's ten bits would hide a difference
    try:
        worst = _difference(bench)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert worst <= AGREE, f"losses differ by {worst:.2g}: this is not the same mathematics"
    return worst


def _difference(bench: Bench) -> float:
    """The largest difference, at the precision to which the device is set."""
    published, worst = bench.published(), 0.0
    student = copy.deepcopy(bench.student)
    ours = {"classifier": bench.classifier(student), "generator": bench.generator()}
    theirs = {
        "classifier": lambda: published.classifier_step(bench.batch.images.contiguous(), bench.batch.targets),
        "generator": lambda: published.generator_step(bench.recipe.generator.batch),
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
    return worst


def whole_tasks(setting: Setting, seconds: dict[str, float]) -> dict[str, float]:
    """Hours of a second task of `images` images, computed from the steps: inversion and learning, as each recipe has them."""

    def hours(recipe: Recipe, generator: str, classifier: str, per_step: int = 1) -> float:
        per_epoch = setting.images // setting.batch if recipe.schedule.drop_incomplete else -(-setting.images // setting.batch)
        learn = max(recipe.schedule.epochs * per_epoch, recipe.schedule.min_steps)
        dream = recipe.generator.steps if generator else 0
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
    text = (
        f"{s['backbone']}, batch {s['batch']}, the published generator, {s['n_old']} old and {s['n_new']} new classes, "
        f"{processor(found['machine'])}, {found['machine']['device']}, torch "
        f"{found['versions']['torch']}; medians of {s['rounds']} rounds in turns. No term of our loss differs from the "
        f"published one by more than {found['losses_differ_by']:.0e} of the whole."
    )
    steps = []
    for name in ("classifier", "generator"):
        pair = [f"{seconds[f'{whose} {name} step']:.3f}" for whose in ("published", "our")]
        steps.append([name, *pair, f"{found[f'{name}_step_ratio']:.2f}"])
    edge = {
        "classifier step": "edge classifier step",
        "generator step": "edge generator step",
        "fine-tuning on as many images (the floor)": "fine-tuning on as many images",
    }
    tried = {name: value if isinstance(value, str) else f"{value:.2f}" for name, value in found["tries"].items()}
    classifier, generator = found["profile"]["classifier step"], found["profile"]["generator step"]
    floor = {
        name: sum(share for part, share in shares.items() if "convolutions" in part) for name, shares in found["profile"].items()
    }
    parts = [
        text,
        table(["step", "published, s", "ours, s", "ratio"], steps),
        table(["under `edge`", "s"], [[name, f"{seconds[key]:.3f}"] for name, key in edge.items()]),
        table(
            [f"a task of {s['images']} images, computed from the steps", "hours"],
            [[name, f"{hours:.2f}"] for name, hours in found["tasks"].items()],
        ),
        table(["tried", "time over ours"], [[name, value] for name, value in tried.items()]),
        table(
            ["share of the step's time", "classifier step, %", "generator step, %"],
            [[part, f"{100 * share:.0f}", f"{100 * generator[part]:.0f}"] for part, share in classifier.items()],
        ),
        "The convolutions alone are the floor: "
        + " and ".join(f"{100 * share:.0f} % of the {name}" for name, share in floor.items())
        + ".",
    ]
    return "\n\n".join(parts)
