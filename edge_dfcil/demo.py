"""A complete run on real data: handwritten digits, two classes a task, five tasks.

It uses only the public API, and compares ABD with fine-tuning (the lower bound) and with one network trained on all classes
together (the upper bound).

`digits.npz` contains "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998, UCI Machine Learning Repository,
CC BY 4.0), its 1,797 test images as scikit-learn has them: 8 x 8 pixels of 0 to 16, here in the order of a stratified split.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_dfcil import RECIPES, Learner, Recipe, SettingError

DIGITS = Path(__file__).with_name("digits.npz")
TO_LEARN = 1347  # the others are for evaluation
SIZE = 16  # the digits are 8x8; twice that gives the generator a map to start from
TASKS = tuple((f"{2 * t}", f"{2 * t + 1}") for t in range(5))
NAMES = tuple(name for task in TASKS for name in task)
# Digits must not be mirrored, and are grey; half the default width of the generator is enough for 16 pixels.
RECIPE = RECIPES["frozen"].changed(
    {
        "generator.width": 32,
        "augmentation.flip": False,
        "augmentation.brightness": 0.0,
        "augmentation.contrast": 0.0,
        "augmentation.crop_padding": 2,
    }
)


@dataclass(frozen=True)
class Batches:
    """Images and targets as a re-iterable of shuffled batches."""

    images: Tensor
    targets: Tensor
    batch_size: int = 32

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.images)).split(self.batch_size):
            yield self.images[index], self.targets[index]

    def of(self, names: tuple[str, ...]) -> Batches:
        """The images of some classes."""
        chosen = torch.isin(self.targets, torch.tensor([NAMES.index(name) for name in names]))
        return replace(self, images=self.images[chosen], targets=self.targets[chosen])


def digits() -> tuple[Batches, Batches]:
    """1,347 digits to learn from and 450 to evaluate on, as uint8 images (N, 3, 16, 16)."""
    with np.load(DIGITS) as data:
        grey, targets = torch.tensor(data["images"]), torch.tensor(data["targets"]).long()  # (N, 8, 8) of 0 to 16, and (N,)
    images = F.interpolate(grey[:, None].float() / 16, (SIZE, SIZE), mode="bilinear")
    images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return Batches(images[:TO_LEARN], targets[:TO_LEARN]), Batches(images[TO_LEARN:], targets[TO_LEARN:])


def run(
    out: Path, *, device: str = "auto", seed: int = 0, recipe: Recipe = RECIPE, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Runs the demo and writes its plot, model file, ONNX file and figures to the folder `out`.

    Raises `SettingError` when matplotlib, which draws the plot, is not installed.
    """
    try:
        import matplotlib  # noqa: F401  a missing library is reported before anything is trained
    except ImportError as error:
        raise SettingError(f"the demo draws with matplotlib ({error}): pip install 'edge-dfcil[demo]'") from error
    train, test = digits()
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    curves: dict[str, list[float]] = {}
    commits: dict[str, list[list[dict[str, Any]]]] = {}
    learners: dict[str, Learner] = {}
    for method in ("abd", "finetune"):
        say(f"{method}: two digits a task, no image kept")
        learner = learners[method] = new_learner(method, device, seed, recipe)
        curves[method], commits[method] = [], []
        for number, names in enumerate(TASKS):
            report = learner.learn_task(train.of(names), NAMES)
            accuracy = learner.evaluate([*test.of(NAMES[: 2 * number + 2])], NAMES).accuracy
            curves[method].append(accuracy)
            commits[method].append([commit.to_dict() for commit in report.commits])
            answers = ", ".join(map(str, report.commits))
            say(f"  {' and '.join(names)} known ({answers}): {accuracy:.1%} of all digits so far")
    say("upper bound: all ten digits together")
    upper = new_learner("finetune", device, seed, recipe)
    upper.learn_task(train, NAMES)
    final = {method: curve[-1] for method, curve in curves.items()}
    final["upper_bound"] = upper.evaluate([*test], NAMES).accuracy
    seconds = time.perf_counter() - begin

    model = learners["abd"].save(out / "digits.safetensors")
    onnx = learners["abd"].export(out / "digits.onnx").path
    plot = draw(out / "accuracy.png", curves, final["upper_bound"])
    answer = {"final_accuracy": final, "model": str(model), "onnx": onnx, "seconds": seconds}
    figures = {
        **answer,
        "accuracy_after_task": curves,
        "commits_of_task": commits,
        "model": Path(model).name,  # relative to demo.json, so that the folder can be moved
        "onnx": Path(onnx).name,
        "plot": plot.name,
        "seed": seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    say(f"\nfinal accuracy over all ten digits, learnt in {seconds:.0f} s")
    for method, accuracy in final.items():
        say(f"  {method:<12}{accuracy:6.1%}")
    say(f"\nplot        {plot}\nmodel file  {model}\nONNX file   {onnx}")
    return answer


def new_learner(method: str, device: str, seed: int, recipe: Recipe = RECIPE) -> Learner:
    return Learner("resnet8", image_size=SIZE, method=method, recipe=recipe, device=device, seed=seed)


def draw(path: Path, curves: dict[str, list[float]], upper_bound: float) -> Path:
    """Accuracy by number of digits seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    seen = [2 * (task + 1) for task in range(len(TASKS))]
    for method, curve in curves.items():
        axes.plot(seen, [100 * accuracy for accuracy in curve], marker="o", label=method)
    axes.axhline(100 * upper_bound, linestyle="--", color="grey", label="trained on everything")
    axes.set(xlabel="digits learnt", ylabel="accuracy on all of them, %", xticks=seen, ylim=(0, 102))
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    return path
