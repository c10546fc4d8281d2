"""Drift compensation: statistics follow the backbone, and an LDA head computed from them serves as a plain linear layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dfcil import SettingError
from edge_dfcil.demo import Batches
from edge_dfcil.heads.drift import DriftSums
from edge_dfcil.heads.lda import Frame, HeldOut, Shrinkage, lda_head, leading
from tests.conftest import NAMES, QUICK, quick_learner

LDA_HEAD = {"refine.head": "lda", "refine.epochs": 0, "refine.align_head": 0.0}


def sums_of(before: torch.Tensor, after: torch.Tensor, parts: int = 1) -> DriftSums:
    sums = DriftSums(before.shape[1], torch.float64, torch.device("cpu"))
    for x, y in zip(before.chunk(parts), after.chunk(parts), strict=True):
        sums.add(x, y)
    return sums


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(deadline=None)
def test_an_affine_drift_is_found_from_any_parts(seed: int, parts: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    before = torch.randn(60, 4, generator=draw, dtype=torch.float64)
    matrix = torch.randn(4, 4, generator=draw, dtype=torch.float64)
    after = before @ matrix + torch.randn(4, generator=draw, dtype=torch.float64)
    drift = sums_of(before, after, parts).solve(ridge=1e-9)
    assert torch.allclose(drift.matrix, matrix, atol=1e-5)
    assert torch.allclose(drift.means(before), after, atol=1e-5)
    assert torch.allclose(drift.covariance(before.T.cov()), after.T.cov(), atol=1e-4)


def test_maps_of_two_halves_add_up_to_that_of_all() -> None:
    draw = torch.Generator().manual_seed(0)
    before, after = (torch.randn(60, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    halves = [sums_of(before[half::2], after[half::2]) for half in range(2)]
    both, whole = (halves[0] + halves[1]).solve(), sums_of(before, after).solve()
    for name in ("matrix", "offset", "residual"):
        torch.testing.assert_close(getattr(both, name), getattr(whole, name))
    assert not torch.allclose(halves[0].solve().matrix, halves[1].solve().matrix), "the sum changed neither half"


def test_a_moved_covariance_has_what_the_map_does_not_explain() -> None:
    draw = torch.Generator().manual_seed(0)
    before = torch.randn(500, 4, generator=draw, dtype=torch.float64)
    after = before @ torch.randn(4, 4, generator=draw, dtype=torch.float64)
    after += 2 * torch.randn(500, 4, generator=draw, dtype=torch.float64)
    for ridge in (1e-9, 1.0):
        drift = sums_of(before, after).solve(ridge)
        rest = after - drift.means(before)
        assert torch.allclose(drift.residual, rest.T.cov(correction=0), atol=1e-8)
    exact = sums_of(before, after).solve(1e-9)
    assert torch.allclose(exact.covariance(before.T.cov(correction=0)), after.T.cov(correction=0), atol=1e-6)


def test_it_shrinks_to_the_identity() -> None:
    torch.manual_seed(0)
    before = torch.randn(60, 4, dtype=torch.float64)
    drift = sums_of(before, before @ torch.randn(4, 4, dtype=torch.float64)).solve(ridge=1e9)
    assert torch.allclose(drift.matrix, torch.eye(4, dtype=torch.float64), atol=1e-5)


def test_nothing_seen_moves_nothing() -> None:
    drift = DriftSums(3, torch.float64, torch.device("cpu")).solve()
    means = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(drift.means(means), means)


@pytest.mark.slow
def test_an_lda_head_from_moved_statistics_remembers_better(train: Batches, test: Batches) -> None:
    found = []
    for changes in ({}, LDA_HEAD):
        learner = quick_learner(recipe=QUICK.changed({"schedule.min_steps": 60, "generator.steps": 40, **changes}))
        for names in (("0", "1"), ("2", "3"), ("4", "5")):
            learner.learn_task(train.of(names), NAMES, progress=False)
        found.append(learner.evaluate(test.of(learner.classes), NAMES).accuracy)
    assert found[1] > found[0]


@pytest.mark.slow
def test_its_statistics_are_kept_and_moved_with_the_backbone(train: Batches) -> None:
    """The moved means of old classes are nearer to their images' features under the new backbone than the earlier means."""
    learner = quick_learner(recipe=QUICK.changed({"schedule.min_steps": 60, "generator.steps": 40, **LDA_HEAD}))
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    stale = learner.model.statistics["mean"].values
    learner.learn_task(train.of(("2", "3")), NAMES, progress=False)
    moved = learner.model.statistics["mean"].values[:2]
    real = torch.stack([learner.embed(train.of((name,)).images).mean(0) for name in ("0", "1")])
    assert (moved - real).norm() < (stale - real).norm()
    assert learner.model.statistics["count"].images[0] == len(train.of(("0",)).images)


@pytest.mark.slow
def test_without_statistics_old_classes_are_estimated_from_generated_images(train: Batches) -> None:
    learner = quick_learner(recipe=QUICK.changed(LDA_HEAD | {"remember.class_statistics": False}))
    for names in (("0", "1"), ("2", "3")):
        learner.learn_task(train.of(names), NAMES, progress=False)
    assert not learner.model.statistics
    assert set(learner.model.outputs) == {"0", "1", "2", "3"}


@pytest.mark.slow
def test_the_head_is_as_sure_as_the_trained_one(train: Batches, test: Batches) -> None:
    """The LDA head has the scale of the trained head: its own logits would make every answer certain."""
    sure = []
    for changes in ({}, LDA_HEAD):
        learner = quick_learner(recipe=QUICK.changed(changes | {"schedule.min_steps": 60}))
        learner.learn_task(train.of(("0", "1", "2")), NAMES, progress=False)
        head = learner.network.head.weight
        sure.append((head - head.mean(0)).norm())
    assert sure[1] == pytest.approx(float(sure[0]), rel=0.2)


def test_lda_is_the_same_for_features_in_another_basis() -> None:
    torch.manual_seed(0)
    means, turn = torch.randn(3, 5, dtype=torch.float64), torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    covariance = torch.randn(40, 5, dtype=torch.float64).T.cov()
    weight, bias = lda_head(means, covariance, Shrinkage(0.1))
    turned, same = lda_head(means @ turn, turn.T @ covariance @ turn, Shrinkage(0.1))
    assert torch.allclose(turned, weight @ turn) and torch.allclose(same, bias)


@given(st.integers(2, 6), st.floats(0.01, 1), st.integers(0, 5), st.integers(0, 2**31))
def test_served_rows_say_where_their_classes_lie(classes: int, amount: float, own: int, seed: int) -> None:
    shrinkage = Shrinkage(amount, own)
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 5, generator=draw, dtype=torch.float64)
    covariance = torch.randn(40, 5, generator=draw, dtype=torch.float64).T.cov()
    weight, _ = lda_head(means, covariance, shrinkage)
    common = weight.mean(0)
    frame = Frame.unpacked(Frame(means.mean(0), 0.3, shrinkage).packed(), 5)
    assert torch.allclose(frame.means(0.3 * (weight - common), covariance), means)


def test_a_frame_of_before_has_one_group_of_features() -> None:
    frame = Frame.unpacked(torch.tensor([1.0, 2.0, 3.0, 0.5, 0.25]), 3)
    assert (frame.scale, frame.shrinkage) == (0.5, Shrinkage(0.25, 0))


@given(st.floats(0, 1), st.floats(0.01, 1))
def test_more_images_need_less_shrinkage(amount: float, share: float) -> None:
    found = Shrinkage(amount, 3).of_more(share)
    assert 0 <= found.amount <= amount + 1e-9 and found.own == 3


def test_features_of_two_sizes_count_alike_where_they_are_shrunk_as_two_groups() -> None:
    draw = torch.Generator().manual_seed(0)
    size = torch.tensor([1.0, 1.0, 50.0, 50.0, 50.0], dtype=torch.float64)
    means, features = (torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (3, 40))

    def weights(own: int) -> list[torch.Tensor]:
        shrinkage = Shrinkage(0.9, own)
        return [
            lda_head(means * scale, (features * scale).T.cov(), shrinkage)[0] * scale for scale in (torch.ones_like(size), size)
        ]

    share = [[float(weight[:, :2].norm() / weight.norm()) for weight in weights(own)] for own in (0, 2)]
    assert share[0][1] < 0.1 * share[0][0]  # one group: small features have almost no weight
    assert share[1][1] > 0.7 * share[1][0]


def test_served_rows_say_so_by_a_rounded_covariance_too() -> None:
    """Features after a ReLU have a large common mean; means recovered from rows must not contain a rounding error of it."""
    draw = torch.Generator().manual_seed(0)
    means = 100 + torch.randn(4, 60, generator=draw, dtype=torch.float64)
    covariance = (0.1 * torch.randn(300, 60, generator=draw, dtype=torch.float64)).T.cov()
    weight, _ = lda_head(means, covariance, Shrinkage(0.01))
    rounded = covariance * (1 + 1e-4 * torch.randn(60, 60, generator=draw, dtype=torch.float64))
    found = Frame(means.mean(0), 1.0, Shrinkage(0.01)).means(weight - weight.mean(0), rounded)
    assert (found - means).abs().max() < 0.01


@given(st.integers(2, 5), st.integers(0, 2**31))
def test_what_is_said_of_held_out_images_is_so(classes: int, seed: int) -> None:
    """For images drawn from the same Gaussians, compared with a count over many of them."""
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 3, generator=draw, dtype=torch.float64)
    weight, bias = torch.randn(classes, 3, generator=draw, dtype=torch.float64), torch.randn(classes, generator=draw).double()
    held = HeldOut(torch.arange(classes), means, torch.eye(3, dtype=torch.float64))
    images = means[:, None] + torch.randn(classes, 4000, 3, generator=draw, dtype=torch.float64)
    scores = images @ weight.T + bias  # (C, N, C)
    own = scores.diagonal(dim1=0, dim2=2).T[:, :, None]  # (C, N, 1)
    ahead = (scores > own).double().sum(2).mean()
    assert held.errors(weight, bias) == pytest.approx(float(ahead), abs=0.05)


def test_a_head_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SettingError, match=r"refine\.head"):
        QUICK.changed({"refine.head": "svm"})


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 45))
def test_leading_directions_keep_the_variances_and_the_largest_correlations(seed: int, features: int, directions: int) -> None:
    torch.manual_seed(seed)
    samples = torch.randn(60, features).double() * torch.logspace(-3, 3, features).double()
    samples += samples[:, :1] * torch.logspace(0, 6, features).double()
    covariance = samples.T @ samples / 60
    found = leading(covariance, directions)
    torch.testing.assert_close(found.diagonal(), covariance.diagonal(), rtol=1e-6, atol=0)
    scale = covariance.diagonal().sqrt()
    values = torch.linalg.eigvalsh(found / scale / scale[:, None])
    assert values.min() > -1e-9, "no direction has a negative variance"
    exact = torch.linalg.eigvalsh(covariance / scale / scale[:, None])[-directions:].clamp_min(0).sum()
    assert float(values[-directions:].sum()) >= 0.97 * float(exact)
