"""DeepInversion's terms by hand, and dreams by the pixel: they have the requested classes and approach the statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edge_dfcil import Learner, SettingError
from edge_dfcil.demo import Batches
from edge_dfcil.dreaming import objective
from edge_dfcil.dreaming.inversion import Dreamer, Pool
from edge_dfcil.dreaming.pixels import Canvas, paint
from edge_dfcil.training.augment import views
from edge_dfcil.training.loop import fit
from tests.conftest import NAMES, QUICK, quick_learner

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PIXELS = QUICK.changed({"pixels.steps": 100, "pixels.batch": 32})


@pytest.fixture(scope="module")
def able(train: Batches) -> Learner:
    learner = quick_learner(recipe=PIXELS.changed({"schedule.min_steps": 120, "schedule.learning_rate": 0.05}))
    learner.learn_task(train.of(("0", "1", "2")), NAMES, progress=False)
    return learner


def run(stages: Any) -> Any:
    return [fit(stage, CPU, (), lambda: False) for stage in stages]


def test_feature_statistics_by_hand() -> None:
    def value(*xs: Any) -> Tensor:
        return torch.tensor(xs)

    one = (value(0.0, 0.0), value(1.0, 1.0), value(3.0, 4.0), value(1.0, 1.0))  # means 5 apart
    two = (value(1.0), value(1.0), value(1.0), value(3.0))  # variances 2 apart
    assert objective.feature_statistics([one, two]).item() == pytest.approx(7)
    assert objective.feature_statistics([one, two], first=10).item() == pytest.approx(52)


def test_total_variation_and_l2_by_hand() -> None:
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 1] = 2.0  # two differences of 2 in each of the four directions
    assert objective.total_variation(image).item() == pytest.approx(4 * math.sqrt(8), rel=1e-3)
    assert objective.l2(image).item() == pytest.approx(2, rel=1e-3)
    flat = torch.ones(2, 3, 4, 4, requires_grad=True)
    objective.total_variation(flat).backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


@given(st.integers(0, 999))
def test_competition_is_one_where_both_agree_and_falls_to_one_less_ln_two(seed: int) -> None:
    o = 5 * torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    assert objective.competition(o, o).item() == pytest.approx(1, abs=1e-6)
    assert objective.competition(o, o + 7).item() == pytest.approx(1, abs=1e-5), "a softmax does not change with a shift"
    other = o.roll(1, 1)
    assert 1 - math.log(2) - 1e-6 <= objective.competition(o, other).item() <= 1
    assert objective.competition(o, other) == pytest.approx(objective.competition(other, o).item(), abs=1e-6)


def test_competition_far_apart() -> None:
    o = torch.tensor([[1e4, 0.0]], requires_grad=True)
    loss = objective.competition(o, -o)
    loss.backward()
    assert loss.item() == pytest.approx(1 - math.log(2), abs=1e-5)
    assert o.grad is not None and torch.isfinite(o.grad).all()


def test_pixels_come_to_be_of_the_classes_asked_for_with_the_statistics_of_real_images(able: Learner) -> None:
    teacher, labels = able.network.frozen(), torch.arange(3).repeat(11)[:32]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        canvas = Canvas(teacher, labels, PIXELS.changed({"pixels.steps": 200}))
        before = canvas.loss(torch.arange(32))
        (report,) = run(canvas.stages())
    dream = canvas.dream()
    assert (dream.labels == labels).float().mean() > 0.9
    assert report.losses["statistics"] < 0.5 * before["statistics"].item()
    pixels = dream.images * teacher.std + teacher.mean
    assert pixels.min() >= -1e-5 and pixels.max() <= 1 + 1e-5
    assert teacher.classify(dream.images).allclose(dream.logits, atol=1e-4)


def test_adaptive_pixels_find_where_the_student_differs(able: Learner, train: Batches) -> None:
    """An untrained student: with the adaptive term the teacher and the student differ more on the dreams."""
    teacher = able.network.frozen()
    student = quick_learner(seed=5).network.grown(3).frozen()
    found = {}
    for weight in (0.0, 30.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            canvas = Canvas(teacher, torch.arange(3).repeat(11)[:32], PIXELS.changed({"pixels.competition": weight}), student)
            run(canvas.stages())
        dream = canvas.dream()
        found[weight] = objective.competition(dream.logits, student.classify(dream.images)).item()
    assert found[30.0] < found[0.0] - 0.01


def test_an_adaptive_generator_does_too(able: Learner) -> None:
    teacher = able.network.frozen()
    student = quick_learner(seed=5).network.grown(3).frozen()
    found = {}
    for weight in (0.0, 30.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dreamer = Dreamer(
                teacher, torch.arange(3), QUICK.changed({"generator.steps": 60, "inversion.competition": weight}), student
            )
            fit(dreamer.stage(), CPU, (), lambda: False)
            dream = dreamer.dream(64)
        found[weight] = objective.competition(dream.logits, student.classify(dream.images)).item()
    assert found[30.0] < found[0.0] - 0.01


def test_augmented_dreams_are_nearer_to_the_statistics_once_they_are_augmented(able: Learner) -> None:
    """The teacher's statistics are of augmented images, and a student sees augmented dreams."""
    teacher = able.network.frozen()
    far = {}
    for augmented in (False, True):
        recipe = QUICK.changed(
            {
                "generator.steps": 60,
                "inversion.augment": augmented,
                "augmentation.brightness": 0.25,
                "augmentation.contrast": 0.8,
                "augmentation.crop_padding": 4,
            }
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dreamer = Dreamer(teacher, torch.arange(3), recipe)
            fit(dreamer.stage(), CPU, (), lambda: False)
            images = views(dreamer.dream(512).images, teacher, recipe)
        with objective.BatchStatistics(teacher).recording() as seen:
            teacher.classify(images)
        far[augmented] = objective.statistics_alignment(seen).item()
    assert far[True] < 0.8 * far[False]


def test_a_pool_is_painted_with_even_shares_of_what_is_wanted(able: Learner) -> None:
    pool = Pool(24, able.network.frozen(), CPU)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = run(paint(pool, able.network.frozen(), torch.tensor([0, 2]), PIXELS.changed({"pixels.steps": 200})))
    assert [stage.name for stage in stages] == ["dream"]
    assert stages[0].images == 200 * 32, "a whole batch, so that statistics are those of all classes"
    assert set(pool.labels.tolist()) == {0, 2}
    assert len(pool) >= 20


def test_large_images_are_sketched_at_half_size() -> None:
    learner = Learner("resnet8", image_size=128, device="cpu", mean=(0.5,) * 3, std=(0.25,) * 3)
    teacher = learner.network.grown(2).frozen()
    canvas = Canvas(teacher, torch.tensor([0, 1]), PIXELS.changed({"pixels.steps": 3}))
    sizes = []
    for stage in canvas.stages():
        sizes.append((stage.name, stage.steps, stage.optimizer().param_groups[0]["params"][0].shape[-1]))
        run([stage])
    assert sizes == [("sketch", 2, 64), ("dream", 1, 128)]
    assert canvas.dream().images.shape == (2, 3, 128, 128)


def test_the_learner_dreams_in_both_qualities(able: Learner) -> None:
    images = able.dream(6, quality="best", progress=False)
    assert images.shape[1:] == (3, 16, 16) and images.dtype == torch.uint8 and 4 <= len(images) <= 6
    assert torch.equal(images, able.dream(6, quality="best", progress=False)), "the same under one seed"
    assert {p.label for p in able.predict(able.dream(4, ["1"], quality="best", progress=False))} == {"1"}
    with pytest.raises(SettingError, match="'fast' or 'best'"):
        able.dream(6, quality="good")  # type: ignore[arg-type]


def test_a_method_can_remember_through_pixels(able: Learner, train: Batches) -> None:
    learner = quick_learner(recipe=PIXELS.changed({"remember.dreams": "pixels", "pixels.steps": 3}))
    for names in (("0", "1"), ("2",)):
        report = learner.learn_task(train.of(names), NAMES, progress=False)
    assert [stage.name for stage in report.stages] == ["dream", "dream", "dream", "learn", "refine"]
    with pytest.raises(SettingError, match="set how many"):
        PIXELS.changed({"remember.dreams": "pixels", "remember.pool": 0})
