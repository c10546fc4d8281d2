"""The benchmarks' own methods: the shared suite without the sample rule, and what is particular to each method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.io import decode_jpeg

from benchmarks.yardsticks import YARDSTICKS, find
from benchmarks.yardsticks.coreset import CoresetMethod, capacity, herding, nearest_to_mean
from benchmarks.yardsticks.dgr import VAE
from edge_dfcil import Callback, Learner, SettingError
from edge_dfcil.demo import Batches
from edge_dfcil.learning import Learning
from edge_dfcil.results import StageReport
from edge_dfcil.testing import check_method
from edge_dfcil.training.stage import Stage
from tests.conftest import NAMES, quick_learner

pytestmark = pytest.mark.slow

CORESETS = sorted(set(YARDSTICKS) - {"dgr", "upper_bound", "rehearsal_jpeg"})


def make(name: str) -> Any:
    return find(f"{name}-24") if name in [*CORESETS, "rehearsal_jpeg"] else find(name)


@pytest.mark.parametrize("name", sorted(YARDSTICKS))
def test_method(name: str) -> None:
    check_method(lambda: make(name), keeps_no_sample=False, exports=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("replay", "no method is called 'replay'; choose one of .*icarl"),
        ("dgr-400", "dgr takes no size; pass 'dgr'"),
        ("upper_bound-400", "upper_bound takes no size"),
        ("icarl-many", "'many' is no coreset size"),
        ("rehearsal_jpeg-1MB", "'1MB' is no number of JPEG files"),
    ],
)
def test_an_unknown_name_or_size_is_refused(name: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        find(name)


@pytest.mark.parametrize("name", CORESETS)
def test_a_coreset_holds_real_images_of_every_class_and_no_more_than_its_size(name: str, train: Batches) -> None:
    method = make(name)
    learner = quick_learner(method=method)
    for tasks, names in enumerate((("0", "1"), ("2", "3", "4")), start=1):
        learner.learn_task(train.of(names), NAMES, progress=False)
        outputs = method.kept["outputs"]
        seen = 2 if tasks == 1 else 5
        assert torch.bincount(outputs).tolist() == [24 // seen] * seen
    real = {tuple(image.flatten().tolist()): int(target) for image, target in zip(train.images, train.targets, strict=True)}
    for image, output in zip(method.kept["images"], outputs, strict=True):
        assert real[tuple(image.flatten().tolist())] == output
    assert method.bytes_kept >= 20 * 3 * 16 * 16


def test_jpegs_are_kept_as_they_were_encoded_and_decode_to_nearly_the_images(train: Batches) -> None:
    method = make("rehearsal_jpeg")
    learner = quick_learner(method=method)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    files = list(method.kept["bytes"].split(method.kept["sizes"].tolist()))
    learner.learn_task(train.of(("2",)), NAMES, progress=False)
    after = {tuple(file.tolist()) for file in method.kept["bytes"].split(method.kept["sizes"].tolist())}
    assert torch.bincount(method.kept["outputs"]).tolist() == [8, 8, 8]
    assert len(after & {tuple(file.tolist()) for file in files}) >= 14  # 16, minus equal pictures
    decoded = decode_jpeg(files[0]).float()
    assert min((decoded - image.float()).abs().mean() for image in train.images) < 8


def test_a_coreset_in_bytes() -> None:
    assert capacity("400", 3072) == capacity(400, 3072) == 400
    assert capacity("1MB", 3072) == 325
    assert capacity("80kB", 3072) == 26
    with pytest.raises(SettingError, match="no coreset size"):
        find("bic-many")


def test_names_are_found_or_told() -> None:
    assert find("abd") == "abd"
    small, large = find("bic-80"), find("bic")
    assert isinstance(small, CoresetMethod) and small.size == "80"
    assert isinstance(large, CoresetMethod) and large.size == 2000
    for unknown in ("magic", "dgr-400", "abd-400", "upper_bound-400"):
        with pytest.raises(SettingError, match=unknown):
            find(unknown)


@given(st.integers(2, 12), st.integers(0, 1000))
def test_selections_are_orders_that_begin_well(n: int, seed: int) -> None:
    features = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    for rule in (herding, nearest_to_mean):
        assert sorted(rule(features).tolist()) == list(range(n))
    assert nearest_to_mean(features)[0] == (features - features.mean(0)).norm(dim=1).argmin()
    unit = torch.nn.functional.normalize(features)
    assert herding(features)[0] == (unit - unit.mean(0)).norm(dim=1).argmin()


def test_herding_keeps_the_mean_better_than_the_nearest() -> None:
    features = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)) + 1
    unit = torch.nn.functional.normalize(features)
    by_herding, by_nearest = (unit[rule(features)[:10]].mean(0) for rule in (herding, nearest_to_mean))
    assert (by_herding - unit.mean(0)).norm() < (by_nearest - unit.mean(0)).norm() / 2


class HeadAfterEachStage(Callback):
    def on_task_begin(self, learner: Learner) -> None:
        assert learner.running is not None and isinstance(learner.running.work, Learning)
        self.task, self.weights = learner.running.work.task, dict[str, Tensor]()

    def on_stage_end(self, stage: Stage, report: StageReport) -> None:
        assert self.task is not None
        self.weights[stage.name] = self.task.student.head.weight.detach().clone()


def test_bic_corrects_the_new_classes_and_them_only(train: Batches) -> None:
    method = make("bic")
    learner = quick_learner(method=method)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    watch = HeadAfterEachStage()
    report = learner.learn_task(train.of(("2", "3")), NAMES, callbacks=[watch], progress=False)
    assert [stage.name for stage in report.stages] == ["learn", "correct"]
    weight, head = watch.weights["learn"], learner.network.head
    assert torch.equal(head.weight[:2], weight[:2])
    alpha = head.weight[2:] / weight[2:]
    assert alpha.std() < 1e-4
    assert abs(alpha.mean() - 1) > 1e-3


def test_icarl_answers_by_the_nearest_mean_of_its_exemplars(train: Batches, test: Batches) -> None:
    method = make("icarl")
    learner = quick_learner(method=method)
    for names in (("0", "1"), ("2",)):
        learner.learn_task(train.of(names), NAMES, progress=False)
    network = learner.network

    def unit(images: Any) -> Tensor:
        with torch.no_grad():
            return torch.nn.functional.normalize(network.backbone(network.normalize(network.pixels(images))))

    exemplars = unit(method.kept["images"])
    means = torch.stack([exemplars[method.kept["outputs"] == output].mean(0) for output in range(3)])
    nearest = torch.cdist(unit(test.images[:64]), torch.nn.functional.normalize(means)).argmin(1)
    assert [answer.label for answer in learner.predict(test.images[:64])] == [learner.classes[i] for i in nearest.tolist()]


def test_the_upper_bound_starts_anew_with_every_image(train: Batches) -> None:
    method = make("upper_bound")
    learner = quick_learner(method=method)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    learner.learn_task(train.of(("2",)), NAMES, progress=False)
    assert len(method.kept["images"]) == len(train.of(("0", "1", "2")).images)


def test_the_vae_of_dgr_is_about_as_large_as_published() -> None:
    vae = VAE(32, latent=1000, width=128)
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(28.7e6, rel=0.02)
    reconstruction, kl = vae.loss(torch.rand(2, 3, 32, 32))
    assert reconstruction.shape == kl.shape == (2,)
    assert (kl >= 0).all()
