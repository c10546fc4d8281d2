"""The privacy audit: the attacks find members where a model reveals them, and only there."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from edge_dfcil import ClassError, DataError, Learner
from edge_dfcil.cli import main
from edge_dfcil.demo import Batches
from edge_dfcil.model.statistics import ROLES
from edge_dfcil.privacy.attacks import auc, found_at, likelihood_ratio
from edge_dfcil.privacy.audit import Audit, audit
from edge_dfcil.privacy.page import page
from tests.conftest import NAMES, QUICK, quick_learner
from tests.test_cli import folder_of

KNOWN = ("0", "1", "2", "3")
Loader = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def halves(train: Batches) -> tuple[Loader, Loader]:
    """Images that are learnt from, and others of the same classes."""
    part = train.of(KNOWN)
    found = [(part.images[half::2], part.targets[half::2]) for half in range(2)]
    return [found[0]], [found[1]]


@pytest.fixture(scope="module")
def taught(halves: Any) -> Learner:
    """Two tasks, with class statistics."""
    return taught_of(halves[0], QUICK.changed({"schedule.adapt": "first", "refine.head": "lda"}))


def taught_of(loader: Loader, recipe: Any) -> Learner:
    learner, (images, targets) = quick_learner(recipe=recipe), loader[0]
    for classes in ((0, 1), (2, 3)):
        of_task = torch.isin(targets, torch.tensor(classes))
        learner.learn_task(list(zip(images[of_task].split(32), targets[of_task].split(32), strict=True)), NAMES, progress=False)
    return learner


@pytest.fixture(scope="module")
def found(taught: Learner, halves: Any) -> Audit:
    return audit(taught.model, halves[0], halves[1], NAMES, generated=taught.dream(16, progress=False))


class TestAttacks:
    @settings(deadline=None)
    @given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.lists(st.integers(-5, 5), min_size=1, max_size=30))
    def test_the_area_is_that_of_a_known_library(self, members: Any, others: Any) -> None:
        expected = roc_auc_score([1] * len(members) + [0] * len(others), members + others)
        assert auc(torch.tensor(members).double(), torch.tensor(others).double()) == pytest.approx(expected)

    @given(st.integers(100, 500), st.floats(0, 3))
    @settings(deadline=None, max_examples=20)
    def test_no_more_others_are_taken_for_members_than_allowed(self, n: int, shift: float) -> None:
        draw = torch.Generator().manual_seed(n)
        members, others = torch.randn(n, generator=draw) + shift, torch.randn(n, generator=draw)
        share = found_at(members, others, 0.01)
        assert share is not None and 0 <= share <= 1
        threshold = others.sort(descending=True).values[int(0.01 * n)]
        assert (others > threshold).sum() <= 0.01 * n and share == pytest.approx(float((members > threshold).double().mean()))
        assert found_at(members, others[:99], 0.01) is None

    def test_the_likelihood_ratio_finds_a_spread_that_a_threshold_does_not(self) -> None:
        torch.manual_seed(0)
        members, others = 0.2 * torch.randn(800, 1).double(), torch.randn(800, 1).double()
        classes = torch.arange(800) % 4
        assert auc(members[:, 0], others[:, 0]) == pytest.approx(0.5, abs=0.06)
        assert auc(*likelihood_ratio(members, classes, others, classes)) > 0.75
        # A difference between classes alone reveals no members.
        both = torch.randn(800, 1).double() + 5 * classes[:, None]
        same = torch.randn(800, 1).double() + 5 * classes[:, None]
        assert auc(*likelihood_ratio(both, classes, same, classes)) == pytest.approx(0.5, abs=0.06)


@pytest.mark.slow
class TestAudit:
    def test_it_counts_all_that_is_kept(self, found: Audit, taught: Learner) -> None:
        assert sum(found.bytes_by_role.values()) == sum(t.numel() * t.element_size() for t in taught.model.tensors().values())
        assert {"weight", "class_mean", "shared_covariance"} <= set(found.bytes_by_role)
        names = [one.name for one in found.attacks]
        assert names == ["loss", "likelihood ratio", "class statistics", "likelihood ratio with class statistics"]
        assert all(0.3 < one.auc <= 1 and len(one.by_task) == 2 for one in found.attacks)
        # The covariance of fewer images than features is nearly spanned by those images.
        assert found.attacks[2].auc > 0.8 > found.attacks[0].auc
        assert {one.space for one in found.nearest} == {"pixels", "features"}

    @pytest.mark.slow
    def test_fewer_directions_of_the_covariance_give_fewer_members_away(self, found: Audit, halves: Any) -> None:
        few = {"schedule.adapt": "first", "refine.head": "lda", "remember.images_per_direction": 16}
        learner = taught_of(halves[0], QUICK.changed(few))
        others = {one.name: one.auc for one in audit(learner.model, halves[0], halves[1], NAMES).attacks}
        assert others["class statistics"] < found.attacks[2].auc - 0.1
        assert learner.evaluate(halves[1], NAMES).accuracy > 0.9

    def test_a_least_number_of_directions_is_kept(self, taught: Learner, halves: Any) -> None:
        all_of_them = {"remember.images_per_direction": 16, "remember.min_directions": 10**4}
        whole, few = (
            taught_of(halves[0], QUICK.changed({"schedule.adapt": "first", "refine.head": "lda"} | changes))
            for changes in (all_of_them, {"remember.images_per_direction": 16, "remember.min_directions": 3})
        )
        kept = [learner.model.statistics["covariance"].values for learner in (taught, whole, few)]
        assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0].diagonal(), kept[2].diagonal())
        assert not torch.allclose(kept[0], kept[2])

    def test_images_beside_themselves_are_no_members(self, taught: Learner, halves: Any) -> None:
        same = audit(taught.model, halves[1], halves[1], NAMES)
        assert [one.auc for one in same.attacks if not one.name.startswith("likelihood")] == [0.5, 0.5]
        assert same.accuracy[0] == same.accuracy[1] and not same.nearest

    def test_a_network_that_has_learnt_single_images_by_heart_is_found_out(self, halves: Any) -> None:
        """It classifies the images that it has seen correctly, and others at random."""
        found = {one.name: one for one in audit(ByHeart(*halves[0][0]).model(), halves[0], halves[1], NAMES).attacks}
        assert found["loss"].auc > 0.8  # a quarter of the others are answered right by chance
        assert "class statistics" not in found  # this model keeps no statistics

    def test_a_generated_image_that_is_a_copy_is_found(self, taught: Learner, halves: Any) -> None:
        copies = halves[0][0][0][:40]
        by_pixels = audit(taught.model, halves[0], halves[1], NAMES, generated=copies).nearest[0]
        assert by_pixels.nearer > 0.8 and by_pixels.member < 0.5 * by_pixels.other

    def test_too_few_images_and_unknown_classes(self, taught: Learner, halves: Any) -> None:
        few = [(images[:12], targets[:12]) for images, targets in halves[0]]
        with pytest.raises(DataError, match=r"12 images among the others.*20"):
            audit(taught.model, halves[0], few, NAMES)
        with pytest.raises(DataError, match="no image"):
            audit(taught.model, [], halves[1], NAMES)
        with pytest.raises(ClassError):
            audit(taught.model, [(halves[0][0][0], torch.full((len(halves[0][0][1]),), 9))], halves[1], NAMES)

    def test_a_page_without_scripts_or_addresses(self, found: Audit) -> None:
        text = page(found, "<model> & co")
        assert "&lt;model&gt; &amp; co" in text and "<script" not in text and "http" not in text
        for word in ("class mean", "likelihood ratio", "not differentially private", "task 2", "Do generated images"):
            assert word in text

    @pytest.mark.parametrize("role", ROLES)
    def test_a_page_says_what_each_role_is(self, role: str, found: Audit) -> None:
        kept = (*found.kept, replace(found.kept[0], kind=role, images=(12,)))
        assert escape(ROLES[role].meaning) + " At least" in page(replace(found, kept=kept), "a model")


def statistics() -> nn.BatchNorm2d:
    """A BatchNorm layer with statistics as after training."""
    layer = nn.BatchNorm2d(3, affine=False)
    layer.load_state_dict({"running_mean": torch.full((3,), 0.1), "running_var": torch.full((3,), 0.5)}, strict=False)
    return layer


class ByHeart(nn.Module):
    """A backbone whose features are the class of an image that it has seen, and noise for others."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList(statistics() for _ in range(3))
        self.keys = nn.Parameter((images.float() / 255).flatten(1), requires_grad=False)
        self.values = nn.Parameter(nn.functional.one_hot(targets, 4).float(), requires_grad=False)
        self.fc = nn.Linear(4, 4)
        nn.init.eye_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        near = torch.cdist(images.flatten(1), self.keys)
        seen = near.amin(1) < 1e-2
        known = 6 * self.values[near.argmin(1)]
        noise = 6 * nn.functional.one_hot((1000 * images.flatten(1).mean(1)).long() % 4, 4).float()
        return self.fc(torch.where(seen[:, None], known, noise) + 0.0 * self.layers[0](images).mean((1, 2, 3))[:, None])

    def model(self) -> Any:
        names = [NAMES[index] for index in range(4)]
        zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return Learner.from_classifier(self.eval(), names, image_size=16, mean=zeros, std=ones, device="cpu").model


@pytest.mark.slow
def test_the_command_writes_json_and_a_page(taught: Learner, train: Batches, tmp_path: Path) -> None:
    model = taught.save(tmp_path / "m.safetensors")
    inside, outside = (folder_of(tmp_path / name, train, KNOWN) for name in ("in", "out"))
    command = ["audit", str(model), "--members", str(inside), "--non-members", str(outside), "--dreams", "2"]
    done = CliRunner().invoke(main, [*command, "--html", str(tmp_path / "audit.html"), "--json"])
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["attacks"][0]["auc"] == 0.5 and math.isfinite(answer["attacks"][1]["auc"])
    assert "no epsilon" in answer["no_promise"] and "no epsilon" in (tmp_path / "audit.html").read_text()
    done = CliRunner().invoke(main, [*command, "--html", str(model)])
    assert done.exit_code == 1 and "is the model itself" in done.stderr
