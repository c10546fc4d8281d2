"""Do features separate old classes from new ones, or real images from generated ones? The MID diagnostic of ABD, and a plot.

MID, Mean Image Distance (Smith et al., ICCV 2021, section 4): the distance between the mean penultimate features of two
sets of images, over the standard deviation of the reference set's features. Its reference is real images of old classes.
If they are nearer to new real images than to generated images of their own classes, features separate domains before classes.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.datasets import Part
from edge_dfcil import Callback, Learner
from edge_dfcil.learning import Learning
from edge_dfcil.model.network import Network
from edge_dfcil.results import StageReport
from edge_dfcil.training.stage import Stage

SETS = ("old real", "old synthetic", "new real")
SHOWN = 200  # images of each set that the picture shows


def mid(features: Tensor, reference: Tensor) -> float:
    """Distance of the means of features (N, F) and (M, F), over the reference's standard deviation, that is, the root of
    its mean squared distance from its mean."""
    deviation = (reference - reference.mean(0)).square().sum(1).mean().sqrt()
    return float((features.mean(0) - reference.mean(0)).norm() / deviation)


class Probe(Callback):
    """Reads the features once a task has been learnt, while its generated images still exist.

    Attributes
    ----------
    mid
        MID from old real images, "to_new_real" and "to_old_synthetic"; empty for methods that do not dream.
    seconds
        Time that reading the features took.
    """

    def __init__(self, old: Part, new: Part) -> None:
        self._old, self._new = old, new
        self._work: Learning | None = None
        self.features: dict[str, Tensor] = {}
        self.mid: dict[str, float] = {}
        self.seconds = 0.0

    def on_task_begin(self, learner: Learner) -> None:
        assert learner.running is not None and isinstance(learner.running.work, Learning)
        self._work = learner.running.work

    def on_stage_end(self, stage: Stage, report: StageReport) -> None:
        task = self._work.task if self._work is not None else None
        if stage.name != "learn" or task is None or task.dreams is None:
            return
        begin, rng = time.perf_counter(), torch.get_rng_state()  # reading must not change what follows
        images = sum(len(part) for part, _ in self._old)
        dreams = task.dreams.sample(images).images
        self.features = {
            "old real": _features(task.student, self._old),
            "old synthetic": _embed(task.student, dreams),
            "new real": _features(task.student, self._new),
        }
        reference = self.features["old real"]
        self.mid = {
            "to_new_real": mid(self.features["new real"], reference),
            "to_old_synthetic": mid(self.features["old synthetic"], reference),
        }
        torch.set_rng_state(rng)
        self.seconds = time.perf_counter() - begin

    def on_exit(self) -> None:
        self._work = None

    def save(self, path: Path) -> None:
        """Some features of each set, in half precision, for the picture."""
        some = {name: found[:: -(-len(found) // SHOWN)].half().numpy() for name, found in self.features.items()}
        np.savez_compressed(path, allow_pickle=False, **some)


def _features(network: Network, part: Part) -> Tensor:
    return torch.cat([_embed(network, network.normalize(network.pixels(images))) for images, _ in part])


@torch.no_grad()
def _embed(network: Network, images: Tensor) -> Tensor:
    return torch.cat([network.features(chunk).float().cpu() for chunk in images.split(500)])


def draw(files: dict[str, Path], path: Path) -> None:
    """One panel a file of features, in the plane of its own first two principal components."""
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA

    figure = Figure(figsize=(4.5 * len(files), 4), layout="constrained")
    for axes, (title, file) in zip(np.atleast_1d(figure.subplots(1, len(files))), files.items(), strict=True):
        with np.load(file) as found:
            features = {name: found[name].astype(np.float32) for name in SETS}
        plane = PCA(2, random_state=0).fit(np.concatenate(list(features.values())))
        for name, color in zip(SETS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            axes.scatter(*plane.transform(features[name]).T, s=6, alpha=0.6, label=name, color=color)
        axes.set(title=title, xticks=[], yticks=[])
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)
