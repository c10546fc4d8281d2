"""Model: it serves without a learner, can be copied, and class surgery gives a new model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_dfcil import ClassError, DataError, Learner, Model, NotLearnedError, SettingError, Statistic
from edge_dfcil.demo import Batches
from edge_dfcil.errors import ModelFileError
from edge_dfcil.methods import Method
from edge_dfcil.model import file, statistics
from edge_dfcil.privacy.account import account
from exporters import OnnxClassifier
from tests.conftest import NAMES, QUICK, quick_learner


@pytest.fixture(scope="module")
def lda(train: Batches) -> Learner:
    learner = quick_learner(method="lda", multiscale=False)
    for names in (("0", "1", "2"), ("3", "4")):
        learner.learn_task(train.of(names), NAMES, progress=False)
    return learner


def test_it_serves_alone_and_is_the_learners_model(lda: Any, test: Batches, tmp_path: Path) -> None:
    path = lda.save(tmp_path / "m")
    model = Model.load(path, "cpu")
    assert repr(model) == "Model(resnet8, 16 px, 5 classes in 2 tasks, cpu)"
    images = test.images[:20]
    assert model.predict(images, 3) == lda.predict(images, 3)
    assert torch.equal(model.probabilities(images), lda.probabilities(images))
    assert torch.allclose(model.probabilities(images).sum(1), torch.ones(20))
    assert model.embed(images).shape == (20, 64)
    found, theirs = (one.evaluate([*test.of(tuple(NAMES[:5]))], NAMES) for one in (model, lda))
    assert found.confusion == theirs.confusion
    assert found.calibration_error == pytest.approx(theirs.calibration_error, abs=1e-5)
    assert model.digest() == lda.model.digest()
    assert file.digest_of(model.save(tmp_path / "again")) == file.digest_of(path) == model.digest()


@pytest.mark.parametrize("call", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_answer_alike_and_learn_on(call: Any, lda: Any, test: Batches, train: Batches) -> None:
    images = test.images[:5]
    assert call(lda.model).predict(images) == lda.model.predict(images)
    learner = call(lda)
    learner.learn_task(train.of(("5",)), NAMES, progress=False)
    assert learner.classes[-1] == "5" and "5" not in lda.classes


def test_forget_removes_rows_and_statistics(lda: Any, test: Batches, tmp_path: Path) -> None:
    model = lda.model.forget(["1", "3"])
    assert model.classes == ("0", "2", "4") and model.tasks == (("0", "2"), ("4",))
    assert lda.classes == ("0", "1", "2", "3", "4"), "the model itself is unchanged"
    assert model.network.head.weight.shape == (3, 64)
    assert torch.equal(model.statistics["mean"].values, lda.model.statistics["mean"].values[[0, 2, 4]])
    assert torch.equal(model.statistics["covariance"].values, lda.model.statistics["covariance"].values)
    logits = lda.network(test.images[:9])[:, [0, 2, 4]]
    assert torch.allclose(model.network(test.images[:9]), logits, atol=1e-5)
    assert Model.load(model.save(tmp_path / "m"), "cpu").classes == ("0", "2", "4")
    with pytest.raises(ClassError, match="does not know '9'"):
        model.forget("9")
    with pytest.raises(ClassError, match="every class"):
        model.forget(("0", "2", "4"))


def test_a_task_that_is_forgotten_whole_is_gone(lda: Any) -> None:
    assert lda.model.forget(("3", "4")).tasks == (("0", "1", "2"),)


def test_rename(lda: Any, test: Batches) -> None:
    model = lda.model.rename({"0": "zero", "3": "three"})
    assert model.classes == ("zero", "1", "2", "three", "4")
    assert torch.equal(model.probabilities(test.images[:5]), lda.probabilities(test.images[:5]))
    for wrong in ({"9": "nine"}, {"0": "1"}, {"0": " "}):
        with pytest.raises(ClassError):
            lda.model.rename(wrong)
    assert lda.model.rename({"0": "1", "1": "0"}).classes == ("1", "0", "2", "3", "4"), "names may be swapped"


@pytest.mark.slow
def test_merge_adds_the_probabilities(lda: Any, test: Batches, tmp_path: Path, train: Batches) -> None:
    images = test.images[:20]
    model = lda.model.merge(["1", "3"], "odd")
    assert model.classes == ("0", "odd", "2", "4")
    before, after = lda.probabilities(images), model.probabilities(images)
    assert torch.allclose(after[:, 1], before[:, 1] + before[:, 3], atol=1e-6)
    assert torch.allclose(after[:, [0, 2, 3]], before[:, [0, 2, 4]], atol=1e-6)
    loaded = Learner.load(model.save(tmp_path / "m"), "cpu")
    assert loaded.predict(images, 4) == model.predict(images, 4)
    loaded.export(tmp_path / "m.onnx")
    exported = OnnxClassifier(tmp_path / "m.onnx")
    assert exported.classes == model.classes
    assert torch.allclose(torch.from_numpy(exported.probabilities(images.numpy())), after, atol=1e-4)
    loaded.learn_task(train.of(("5",)), NAMES, progress=False)
    assert loaded.classes == ("0", "odd", "2", "4", "5")
    with pytest.raises(ClassError, match="class already"):
        lda.model.merge(["1", "3"], "0")


def test_a_merged_class_is_measured_on_the_images_of_its_parts(lda: Any, test: Batches) -> None:
    whole, names = [*test.of(("0", "1", "3"))], {0: "0", 1: "odd", 3: "odd"}
    found = lda.model.merge(["1", "3"], "odd").evaluate(whole, names)
    assert sum(found.confusion[1]) == sum(int((targets != 0).sum()) for _, targets in whole)
    before = lda.model.evaluate(whole, {0: "0", 1: "1", 3: "3"})
    parts = [before.confusion[row][column] for row in (1, 3) for column in (1, 3)]
    assert found.confusion[1][1] >= sum(parts), "confusing one part with the other now counts as correct"
    with pytest.raises(ClassError, match="appears twice"):
        Learner.of(lda.model).learn_task(whole, {0: "a", 1: "b", 3: "b"}, progress=False)


def test_a_new_model_has_no_answer(test: Batches) -> None:
    with pytest.raises(NotLearnedError):
        Model.new("resnet8", image_size=16, device="cpu").predict(test.images[:1])


def test_bad_questions_have_clear_errors(lda: Any, test: Batches) -> None:
    with pytest.raises(SettingError, match="top_k"):
        lda.predict(test.images[:1], 0)
    with pytest.raises(DataError):
        lda.predict("no such picture.png")


def test_answers_do_not_depend_on_the_apps_autocast(lda: Any, test: Batches) -> None:
    plain = lda.probabilities(test.images[:9])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lda.probabilities(test.images[:9]), plain)


def test_a_recipe_that_is_set_counts_at_once(lda: Any, test: Batches, tmp_path: Path) -> None:
    learner = copy.deepcopy(lda)
    learner.recipe = QUICK.changed({"augmentation.flip": True, "augmentation.mirrored_answers": True})
    mirrored = learner.probabilities(test.images[:9])
    assert not torch.equal(mirrored, lda.probabilities(test.images[:9]))
    assert torch.equal(Model.load(learner.save(tmp_path / "m"), "cpu").probabilities(test.images[:9]), mirrored)


class TestStatistics:
    def test_they_are_saved_and_listed_with_their_role_and_count(self, lda: Any, train: Batches, tmp_path: Path) -> None:
        model = Model.load(lda.save(tmp_path / "m"), "cpu")
        assert {name: found.role for name, found in model.statistics.items()} == {
            "mean": "class_mean",
            "count": "class_count",
            "covariance": "shared_covariance",
            "frame": "head_frame",
        }
        counts = tuple(len(train.of((name,)).images) for name in NAMES[:5])
        assert model.statistics["mean"].images == counts
        assert torch.equal(model.statistics["mean"].values, lda.model.statistics["mean"].values)
        kept = {entry.name: entry for entry in account(model.tensors(), model.settings())}
        assert kept["statistics.mean"].kind == "class_mean" and kept["statistics.mean"].images == counts
        assert kept["statistics.covariance"].images == (sum(counts),)
        assert kept["head.weight"].kind == "weight"
        assert not kept["backbone.bn1.num_batches_tracked"].from_data

    def test_means_and_covariance_are_those_of_the_features(self, lda: Any, train: Batches) -> None:
        features = {name: lda.embed(train.of((name,)).images).double() for name in NAMES[:5]}
        means = torch.stack([found.mean(0) for found in features.values()])
        assert torch.allclose(lda.model.statistics["mean"].values.double(), means, atol=1e-4)
        scatter = sum((found - found.mean(0)).T @ (found - found.mean(0)) for found in features.values())
        total = sum(map(len, features.values()))
        ours = lda.model.statistics["covariance"].values.double()
        assert torch.allclose(ours, scatter / total, atol=0.02 * float((scatter / total).abs().max()))

    @pytest.mark.slow
    def test_a_class_of_few_images_gets_a_row_and_no_statistic(self, train: Batches, test: Batches) -> None:
        learner = quick_learner(method="lda")
        learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        few = train.of(("2",))
        learner.learn_task([(few.images[:6], few.targets[:6])], NAMES, progress=False)
        assert learner.model.statistics["mean"].images[2] == 0
        assert not learner.model.statistics["mean"].values[2].any()
        assert learner.network.head.weight[2].any()
        learner.learn_task(train.of(("3", "4")), NAMES, progress=False)
        assert not learner.model.statistics["mean"].values[2].any()
        per_class = learner.evaluate(test.of(tuple(NAMES[:5])), NAMES).per_class
        assert per_class["2"] > 0.6, "later tasks remember it by its row"

    def test_refreshing_a_class_adds_to_its_images(self, lda: Any, train: Batches) -> None:
        learner = copy.deepcopy(lda)
        again = train.of(("0",))
        learner.learn_task([(again.images[:20], again.targets[:20])], NAMES, relearn=True, progress=False)
        assert learner.model.statistics["mean"].images[0] == lda.model.statistics["mean"].images[0] + 20

    @pytest.mark.slow
    def test_refreshing_a_class_of_few_images_moves_its_row(self, train: Batches, test: Batches) -> None:
        learner = quick_learner(method="lda")
        learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        few = train.of(("2",))
        learner.learn_task([(few.images[:6], few.targets[:6])], NAMES, progress=False)
        other = copy.deepcopy(learner)
        wrong = train.of(("0",)).images[:2]  # two bad pictures do not outweigh the six earlier ones
        learner.learn_task([(wrong, torch.full((2,), 2))], NAMES, relearn=True, progress=False)
        found, before = (one.evaluate(test.of(("0", "2")), NAMES).per_class for one in (learner, other))
        assert found["2"] > before["2"] - 0.3 and found["0"] > before["0"] - 0.3

    def test_strict_recipes_store_none(self, train: Batches) -> None:
        learner = quick_learner(method="lda", recipe=QUICK.changed({"remember.class_statistics": False}))
        with pytest.raises(SettingError, match="does not allow"):
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert learner.classes == ()

    @pytest.mark.slow
    def test_another_method_drops_statistics_of_features_that_move(self, lda: Any, train: Batches) -> None:
        learner = copy.deepcopy(lda)
        learner.method = "abd"
        learner.learn_task(train.of(("5",)), NAMES, progress=False)
        assert learner.model.statistics == {}

    @pytest.mark.slow
    def test_planning_leaves_them_alone(self, lda: Any, train: Batches) -> None:
        learner = copy.deepcopy(lda)
        learner.memory_budget = 2 * 10**9
        before = {name: found.values.clone() for name, found in learner.model.statistics.items()}
        learner.plan(train.of(("5",)), NAMES, progress=False)
        assert all(torch.equal(found.values, before[name]) for name, found in learner.model.statistics.items())
        report = learner.learn_task(train.of(("5",)), NAMES, progress=False)
        assert learner.model.statistics["mean"].images[5] == report.images

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (Statistic("portrait", torch.ones(2, 3), (20, 20)), "not declared"),
            (Statistic("class_mean", torch.ones(2, 3), (20,)), "counts images of 1"),
            (Statistic("class_mean", torch.ones(3, 3), (20, 20)), "shape"),
            (Statistic("class_mean", torch.ones(2, 3), (20, 9)), "at least 10"),
        ],
    )
    def test_what_is_not_as_declared_is_refused(self, found: Any, message: str) -> None:
        with pytest.raises(SettingError, match=message):
            statistics.check({"mean": found}, {"mean": "class_mean"}, classes=2)

    def test_a_method_that_keeps_what_it_did_not_declare_commits_nothing(self, train: Batches) -> None:
        class Hoarder(Method):
            name = "hoarder"

            def loss(self, task: Any, batch: Any) -> Any:
                return self.first_loss(task, batch)

            def refine(self, task: Any) -> Any:
                task.kept["images"] = Statistic("class_mean", torch.ones(2, 3), (100, 100))
                return iter(())

        learner = quick_learner(method=Hoarder())
        with pytest.raises(SettingError, match="not declared"):
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert learner.classes == ()


def test_a_file_with_a_tensor_of_no_declared_role_is_refused(lda: Any) -> None:
    with pytest.raises(ModelFileError, match="neither"):
        account({**lda.model.tensors(), "album": torch.zeros(3)}, lda.model.settings())


@given(st.integers(2, 12), st.integers(0, 2**31))
def test_a_covariance_is_stored_in_a_quarter_of_its_size_and_nearly_as_it_was(features: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sample = torch.randn(3 * features, features, generator=draw) * torch.logspace(-3, 3, features)
    covariance = (sample.T @ sample) / len(sample)
    covariance[0], covariance[:, 0] = 0, 0  # a feature that never varies
    kept = {"covariance": Statistic("shared_covariance", covariance, (100,))}
    once = statistics.rounded(kept)
    found, deviations = once["covariance"].values, covariance.diagonal().sqrt()
    assert ((found - covariance).abs() <= 2e-5 * torch.outer(deviations, deviations)).all()
    assert torch.equal(statistics.rounded(once)["covariance"].values, found), "rounding twice changes nothing more"
    assert sum(tensor.nbytes for tensor in statistics.packed(once).values()) == features * (features - 1) + 4 * features
