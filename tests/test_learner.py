"""Learner as its users see it: learning, answers, errors, and a model that no failure changes."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from edge_dfcil import (
    BackboneError,
    Callback,
    Cancelled,
    ClassError,
    DataError,
    DivergedError,
    Learner,
    NotLearnedError,
    SettingError,
)
from edge_dfcil.demo import Batches
from edge_dfcil.model.backbones import batchnorm_layers
from exporters import OnnxClassifier
from tests.conftest import NAMES, QUICK, quick_learner, same_weights, slow_but, weights


def images(n: int = 6, size: int = 16, value: Any = None) -> Any:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, 3, size, size, generator=generator) if value is None else torch.full((n, 3, size, size), value)


def a_task(n: int = 6, target: Any = 2) -> Any:
    return [(images(n), torch.full((n,), target))]


class TestLearning:
    def test_learns_grows_and_reports(self, learnt: Learner, train: Batches, test: Batches) -> None:
        report = learnt.learn_task(train.of(("2", "3", "4")), NAMES, progress=False)
        assert learnt.classes == ("0", "1", "2", "3", "4")
        assert learnt.tasks == (("0", "1"), ("2", "3", "4"))
        assert report.task == 2
        assert report.new_classes == ("2", "3", "4")
        assert report.images == len(train.of(("2", "3", "4")).images)
        assert [stage.name for stage in report.stages] == ["dream", "learn", "refine"]
        assert [stage.steps for stage in report.stages] == [8, 13, 13]
        assert set(report.stages[0].losses) == {"content", "diversity", "statistics", "smoothness"}
        assert report.to_dict()["stages"][1]["name"] == "learn"
        evaluation = learnt.evaluate([*test.of(learnt.classes)], NAMES)
        assert evaluation.n == sum(map(sum, evaluation.confusion))
        assert evaluation.accuracy == pytest.approx(sum(evaluation.confusion[i][i] for i in range(5)) / evaluation.n)
        assert len(evaluation.per_task) == 2

    def test_a_new_class_starts_from_the_old_head_to_the_bit(self, learnt: Learner) -> None:
        old = learnt.network.head
        grown = learnt.network.grown(3)
        assert grown.n_classes == 5
        assert torch.equal(grown.head.weight[:2], old.weight)
        assert torch.equal(grown.head.bias[:2], old.bias)

    @pytest.mark.slow
    def test_a_first_task_of_one_class_then_another_one(self, train: Batches, test: Batches) -> None:
        learner = quick_learner()
        learner.learn_task(train.of(("4",)), NAMES, progress=False)
        learner.learn_task(train.of(("7",)), NAMES, progress=False)
        assert learner.classes == ("4", "7")
        assert sum(score for _, score in learner.predict(test.images[:1], top_k=9)[0].top) == pytest.approx(1, abs=1e-5)

    @pytest.mark.slow
    def test_seeds_decide_and_leave_the_callers_random_numbers_alone(self, train: Batches) -> None:
        def run(seed: int) -> Any:
            learner = quick_learner(seed=seed)
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
            return weights(learner)

        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        first = run(0)
        assert torch.equal(torch.rand(3), expected)
        assert all(torch.equal(value, first[name]) for name, value in run(0).items())
        assert any(not torch.equal(value, first[name]) for name, value in run(1).items())

    @pytest.mark.slow
    def test_uint8_and_float_images_are_the_same_task(self, train: Batches) -> None:
        task = train.of(("0", "1"))
        models = []
        for x in (task.images, task.images.float() / 255):
            learner = quick_learner()
            learner.learn_task(replace(task, images=x), NAMES, progress=False)
            models.append(weights(learner))
        assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())

    @pytest.mark.slow
    def test_normalisation_is_measured_on_the_first_task_and_stays(self, train: Batches) -> None:
        learner, task = quick_learner(), train.of(("0", "1"))
        learner.learn_task(task, NAMES, progress=False)
        pixels = task.images.double() / 255
        assert learner.settings()["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-5)
        assert learner.settings()["std"] == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-5)
        before = learner.settings()["mean"]
        learner.learn_task(a_task(), NAMES, progress=False)
        assert learner.settings()["mean"] == before
        given = quick_learner(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
        given.learn_task(task, NAMES, progress=False)
        assert given.settings()["mean"] == pytest.approx((0.1, 0.2, 0.3))

    @pytest.mark.slow
    def test_other_image_sizes_are_scaled_and_cropped(self, learnt: Learner) -> None:
        learnt.learn_task([(images(6, 40)[:, :, :, :30], torch.full((6,), 2))], NAMES, progress=False)
        assert learnt.predict(images(2, 100))[0].label in learnt.classes

    @pytest.mark.slow
    def test_a_known_class_is_refused_by_name_and_refreshed_on_request(self, learnt: Learner, train: Batches) -> None:
        before = weights(learnt)
        with pytest.raises(ClassError, match=r"'1' is known already.*relearn=True"):
            learnt.learn_task(train.of(("1", "2")), NAMES, progress=False)
        assert same_weights(before, learnt)
        report = learnt.learn_task(train.of(("1", "2")), NAMES, relearn=True, progress=False)
        assert report.relearned_classes == ("1",)
        assert learnt.tasks == (("0", "1"), ("2",))
        report = learnt.learn_task(train.of(("0", "1", "2")), NAMES, relearn=True, progress=False)
        assert report.new_classes == ()
        assert [stage.name for stage in report.stages] == ["dream", "learn", "refine"], "new images add to what is remembered"
        assert learnt.tasks == (("0", "1"), ("2",))

    def test_callbacks_are_called_in_order_and_closed(self, learnt: Learner) -> None:
        calls = []

        class Watch(Callback):
            def __getattribute__(self, name: str) -> Any:
                if name.startswith("on_"):
                    calls.append(name)
                return super().__getattribute__(name)

        learnt.learn_task(a_task(), NAMES, callbacks=[Watch()], progress=False)
        assert calls[:3] == ["on_task_begin", "on_stage_begin", "on_step_end"]
        assert calls[-4:] == ["on_stage_end", "on_commit", "on_task_end", "on_exit"]
        assert calls.count("on_stage_begin") == calls.count("on_stage_end") == 3

    def test_the_loader_is_never_read_after_the_call(self, learnt: Learner) -> None:
        class Counting(list[Any]):
            passes = 0

            def __iter__(self) -> Any:
                self.passes += 1
                return super().__iter__()

        loader = Counting(a_task())
        learnt.learn_task(loader, NAMES, progress=False)
        passes = loader.passes
        learnt.predict(images(2))
        learnt.dream(4, progress=False)
        assert loader.passes == passes

    @pytest.mark.slow
    def test_no_more_of_the_data_is_held_than_the_batch_in_flight(self, learnt: Learner) -> None:
        """While a batch is read, only the one before it may still be in memory."""
        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        most: list[int] = []

        class Stream:
            def __iter__(self) -> Iterator[Any]:
                for _ in range(6):
                    gc.collect()
                    most.append(len(alive))
                    batch = images(8).clone()
                    alive.add(batch)
                    yield batch, torch.full((8,), 2)
                    del batch

        learnt.learn_task(Stream(), NAMES, progress=False)
        gc.collect()
        assert max(most) <= 1
        assert not alive

    @pytest.mark.slow
    def test_fresh_dreams_at_every_step_as_published(self, learnt: Learner) -> None:
        learnt.recipe = QUICK.changed({"remember.pool": 0, "refine.epochs": 0, "schedule.shape": "step"})
        report = learnt.learn_task(a_task(), NAMES, progress=False)
        assert [stage.name for stage in report.stages] == ["dream", "learn"]


class TestClassNames:
    def test_by_mapping_from_any_target(self) -> None:
        learner = quick_learner()
        learner.learn_task([(images(4), torch.tensor([70, 70, 9, 9]))], {9: "cat", 70: "dog", 3: "unused"}, progress=False)
        assert learner.classes == ("cat", "dog")

    def test_from_the_data_set_through_subsets(self) -> None:
        class Named(Dataset[Any]):
            classes = ("ant", "bee", "cow")

            def __len__(self) -> int:
                return 8

            def __getitem__(self, index: Any) -> Any:
                return images(8)[index], index % 3

        learner = quick_learner()
        learner.learn_task(DataLoader(Subset(Named(), [1, 2, 4, 5]), batch_size=4), progress=False)
        assert learner.classes == ("bee", "cow")

    def test_missing_names_are_asked_for(self) -> None:
        with pytest.raises(ClassError, match=r"pass classes="):
            quick_learner().learn_task(a_task(), progress=False)

    @pytest.mark.parametrize(
        ("classes", "error", "message"),
        [
            (["a", "b", "a"], ClassError, "'a' appears twice"),
            (["a", "b"], DataError, "target 2 has no name"),
            (["a", "b", ""], ClassError, "not empty"),
            ("abc", ClassError, "one string"),
            ({2: 7}, ClassError, "7"),
        ],
    )
    def test_names_that_cannot_be(self, classes: list[Any] | str | dict[str, Any], error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            quick_learner().learn_task(a_task(), classes, progress=False)


class Stops(Callback):
    """Raises or cancels in the middle of a stage."""

    def __init__(self, stage: Any, action: Any) -> None:
        self.stage, self.action = stage, action

    def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
        if stage.name == self.stage and step == 2:
            self.action()


def interrupt() -> None:
    raise KeyboardInterrupt


class TestAllOrNothing:
    @pytest.mark.parametrize(
        ("loader", "message"),
        [
            ([], "no image"),
            ([(images(0), torch.zeros(0, dtype=torch.long))], "no image"),
            (iter(a_task()), "read only once"),
            ((batch for batch in a_task()), "generator can be read only once"),
            (a_task(1), "one image"),
            (7, "cannot be iterated"),
            ([images()], "pair"),
            ([(images(), None)], "NoneType"),
            ([(images(6), torch.zeros(5, dtype=torch.long))], "6 images with 5 targets"),
            ([(images(6), torch.zeros(6))], "float"),
            ([(images().permute(0, 2, 3, 1), torch.zeros(6, dtype=torch.long))], "permute"),
            ([(images()[:, :1], torch.zeros(6, dtype=torch.long))], "grey"),
            ([(images()[0], torch.zeros(1, dtype=torch.long))], "batch dimension"),
            ([(images() * 4 - 2, torch.zeros(6, dtype=torch.long))], "normalis"),
            ([(images() * 255, torch.zeros(6, dtype=torch.long))], "divide by 255"),
            ([(images(value=float("nan")), torch.zeros(6, dtype=torch.long))], "NaN"),
            ([((images() * 255).long(), torch.zeros(6, dtype=torch.long))], "int64"),
            ([("six images", torch.zeros(6, dtype=torch.long))], "str"),
        ],
    )
    def test_bad_input_is_told_and_changes_nothing(self, learnt: Learner, loader: Any, message: str) -> None:
        before = weights(learnt)
        with pytest.raises(DataError, match=message):
            learnt.learn_task(loader, [*"abcdefg"], progress=False)
        assert same_weights(before, learnt)
        assert learnt.classes == ("0", "1")

    @pytest.mark.parametrize(
        ("stage", "how"),
        slow_but(
            {("learn", "ctrl-c")},
            itertools.product(("dream", "learn", "refine"), ("cancel", "ctrl-c", "callback")),
        ),
    )
    def test_stopped_anywhere_the_model_is_the_one_from_before(self, learnt: Learner, stage: str, how: str) -> None:
        before = weights(learnt)
        action, error = {
            "cancel": (learnt.cancel, Cancelled),
            "ctrl-c": (interrupt, KeyboardInterrupt),
            "callback": (lambda: 1 / 0, ZeroDivisionError),
        }[how]
        with pytest.raises(error):
            learnt.learn_task(a_task(), NAMES, callbacks=[Stops(stage, action)], progress=False)
        assert same_weights(before, learnt)
        assert ",".join(learnt.classes) == "0,1"
        learnt.learn_task(a_task(), NAMES, progress=False)
        assert ",".join(learnt.classes) == "0,1,2", "it can learn further tasks"

    def test_divergence_is_told(self, learnt: Learner) -> None:
        learnt.recipe = QUICK.changed({"schedule.learning_rate": 1e20, "schedule.clip_gradient": None})
        before = weights(learnt)
        with pytest.raises(DivergedError, match="lower the learning rate"):
            learnt.learn_task(a_task(), NAMES, progress=False)
        assert same_weights(before, learnt)

    def test_a_loader_that_dries_up_is_told(self, learnt: Learner) -> None:
        class Dry:
            passes = 0

            def __iter__(self) -> Any:
                self.passes += 1
                return iter(a_task() if self.passes == 1 else [])

        with pytest.raises(DataError, match="later pass"):
            learnt.learn_task(Dry(), NAMES, progress=False)

    def test_a_data_set_that_raises_is_told(self, learnt: Learner, tmp_path: Path) -> None:
        class Broken(Dataset[Any]):
            classes = NAMES

            def __len__(self) -> int:
                return 4

            def __getitem__(self, index: Any) -> None:
                raise OSError("image file is truncated")

        before = weights(learnt)
        with pytest.raises(OSError, match="image file is truncated"):
            learnt.learn_task(DataLoader(Broken(), batch_size=2), progress=False)
        assert same_weights(before, learnt)

    def test_predict_answers_from_the_committed_model_while_a_task_is_learnt(self, learnt: Learner, test: Batches) -> None:
        x = test.images[:8]
        before, answers = learnt.predict(x, top_k=5), []

        class Ask(Callback):
            def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
                thread = threading.Thread(target=lambda: answers.append(learnt.predict(x, top_k=5)))
                thread.start()
                thread.join()

        learnt.learn_task(a_task(), NAMES, callbacks=[Ask()], progress=False)
        assert len(answers) > 10
        assert all(answer == before for answer in answers)
        assert len(learnt.predict(x, top_k=5)[0].top) == 3

    def test_a_second_learn_task_at_once_is_refused(self, learnt: Learner) -> None:
        noticed = []

        def again() -> None:
            with pytest.raises(SettingError, match="learning a task already"):
                learnt.learn_task(a_task(), NAMES, progress=False)
            noticed.append(True)

        learnt.learn_task(a_task(), NAMES, callbacks=[Stops("learn", again)], progress=False)
        assert noticed


class TestAnswers:
    def test_predictions(self, learnt: Learner, test: Batches) -> None:
        zero, one = (test.of((name,)).images[:1] for name in ("0", "1"))
        (answer,) = learnt.predict(zero, top_k=5)
        assert [name for name, _ in answer.top] in (["0", "1"], ["1", "0"])
        assert answer.top[0] == (answer.label, answer.score)
        assert answer.score >= answer.top[1][1]
        assert learnt.predict(one.numpy()) == learnt.predict(one)
        assert learnt.predict(images(0)) == []

    @pytest.mark.slow
    def test_mirrored_answers_are_those_of_both_images(self, train: Batches, test: Batches, tmp_path: Path) -> None:
        plain, mirrored = (
            quick_learner(recipe=QUICK.changed({"augmentation.flip": True, "augmentation.mirrored_answers": mirrored}))
            for mirrored in (False, True)
        )
        for learner in (plain, mirrored):
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert same_weights(weights(plain), mirrored), "their training is the same"
        images = test.images[:16]
        with torch.no_grad():
            expected = (plain.network(images) + plain.network(images.flip(3))) / 2
            assert not torch.allclose(plain.network(images), expected, atol=1e-3)
            for learner in (mirrored, Learner.load(mirrored.save(tmp_path / "m"), "cpu")):
                torch.testing.assert_close(learner.network(images), expected)
        with pytest.raises(SettingError, match="set both"):
            QUICK.changed({"augmentation.mirrored_answers": True})
        mirrored.export(tmp_path / "m.onnx")
        for answer, p in zip(OnnxClassifier(tmp_path / "m.onnx").predict(images.numpy()), expected.softmax(1), strict=True):
            assert answer.score == pytest.approx(p.max().item(), abs=1e-4)

    def test_before_the_first_task(self) -> None:
        learner = quick_learner()
        for ask in (lambda: learner.predict(images()), lambda: learner.evaluate(a_task(), NAMES), lambda: learner.dream(1)):
            with pytest.raises(NotLearnedError, match="learn_task"):
                ask()

    def test_bad_questions(self, learnt: Learner) -> None:
        with pytest.raises(DataError, match="shape"):
            learnt.predict(np.zeros((16, 16, 5), np.uint8))
        with pytest.raises(SettingError, match="top_k"):
            learnt.predict(images(), top_k=0)
        with pytest.raises(DataError, match="no image"):
            learnt.evaluate([], NAMES)
        with pytest.raises(ClassError, match="'2'"):
            learnt.evaluate(a_task(), NAMES)

    def test_dreams_are_plain_images_of_the_classes_asked_for(self, learnt: Learner) -> None:
        dreams = learnt.dream(10, progress=False)
        assert dreams.dtype == torch.uint8
        assert dreams.shape == (10, 3, 16, 16)
        assert dreams.float().std() > 1
        asked = [p.label for p in learnt.predict(learnt.dream(8, ["1"], progress=False))]
        assert asked.count("1") >= 7, "rounding to whole grey levels may change the class of one"
        with pytest.raises(ClassError, match="'moon'"):
            learnt.dream(1, ["moon"], progress=False)
        learnt.rename({"0": "caf\xe9"})
        assert learnt.dream(1, "cafe\u0301", progress=False).shape == (1, 3, 16, 16), "the same name in another form"
        with pytest.raises(SettingError, match="n=0; it must be a whole number, 1 or more"):
            learnt.dream(0, progress=False)


class Plain(nn.Module):
    """A classifier that was made without this package."""

    def __init__(self, norm: Any = True, classes: Any = 3) -> None:
        super().__init__()
        layers = []
        for channels in (3, 8, 8):
            layers += [nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(8, classes)

    def forward(self, x: Any) -> Any:
        return self.classifier(self.body(x))


@pytest.mark.filterwarnings("ignore:.*nothing to invert")
class TestAdopting:
    def test_answers_as_it_did_and_learns_on(self, train: Batches) -> None:
        theirs, mean, std = Plain().eval(), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
        learner = Learner.from_classifier(theirs, ["a", "b", "c"], image_size=16, mean=mean, std=std, recipe=QUICK, device="cpu")
        x = images(4)
        normal = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        expected = theirs(normal).softmax(1).max(1).values.tolist()
        assert [p.score for p in learner.predict(x)] == pytest.approx(expected, abs=1e-5)
        before = {name: value.clone() for name, value in theirs.state_dict().items()}
        learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert learner.tasks == (("a", "b", "c"), ("0", "1"))
        assert all(torch.equal(value, before[name]) for name, value in theirs.state_dict().items())

    def test_file_needs_the_module_again(self, tmp_path: Path) -> None:
        learner = Learner.from_classifier(Plain(), ["a", "b", "c"], image_size=16, recipe=QUICK, device="cpu")
        path = learner.save(tmp_path / "adopted.safetensors")
        with pytest.raises(OSError, match=r"backbone=module"):
            Learner.load(path)
        module = Plain()
        module.classifier = nn.Identity()  # type: ignore[assignment]
        assert Learner.load(path, "cpu", backbone=module).predict(images(3)) == learner.predict(images(3))

    @pytest.mark.slow
    def test_a_named_architecture_needs_no_module_again(self, tmp_path: Path) -> None:
        from torchvision.models import mobilenet_v3_small

        theirs = mobilenet_v3_small(num_classes=3)
        learner = Learner.from_classifier(theirs, ["a", "b", "c"], image_size=32, backbone="mobilenet_v3_small", device="cpu")
        path = learner.save(tmp_path / "adopted.safetensors")
        assert Learner.load(path, "cpu").predict(images(3)) == learner.predict(images(3))
        with pytest.raises(BackboneError, match="not those of resnet18"):
            Learner.from_classifier(theirs, ["a", "b", "c"], image_size=32, backbone="resnet18")

    def test_refusals(self) -> None:
        with pytest.raises(ClassError, match=r"2 names .* 3 outputs"):
            Learner.from_classifier(Plain(), ["a", "b"], image_size=16)
        with pytest.raises(BackboneError, match="0 BatchNorm layers"):
            Learner.from_classifier(Plain(norm=False), ["a", "b", "c"], image_size=16)
        with pytest.raises(BackboneError, match="last linear layer"):
            Learner.from_classifier(nn.Sequential(Plain(), nn.Softmax(1)), ["a", "b", "c"], image_size=16)
        with pytest.raises(BackboneError, match=r"no nn\.Linear"):
            Learner.from_classifier(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten()), ["a"], image_size=16)
        with pytest.raises(BackboneError, match="head='fc'"):
            Learner.from_classifier(Plain(), ["a", "b", "c"], image_size=16, head="fc")


FAMILIES = ["resnet20", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "resnet18"]


class TestBackbones:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", FAMILIES)
    def test_by_name(self, name: str) -> None:
        learner = Learner(
            name, image_size=32, recipe=QUICK.changed({"schedule.min_steps": 2, "generator.steps": 2}), device="cpu"
        )
        learner.learn_task([(images(4, 32), torch.tensor([0, 0, 1, 1]))], NAMES, progress=False)
        learner.learn_task([(images(4, 32), torch.tensor([2, 2, 3, 3]))], NAMES, progress=False)
        assert learner.predict(images(1, 32))[0].label in learner.classes

    @pytest.mark.slow
    @pytest.mark.parametrize(("given", "momentum"), [(0.1, 0.1), (None, 0.01)])
    def test_running_statistics_keep_up_with_a_short_schedule(self, train: Batches, given: float | None, momentum: float) -> None:
        """torchvision's MobileNetV3 has a momentum of 0.01, which is kept only if the recipe's is None."""
        recipe = QUICK.changed({"schedule.min_steps": 2, "schedule.batchnorm_momentum": given})
        learner = Learner("mobilenet_v3_small", image_size=32, recipe=recipe, device="cpu")
        learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert {layer.momentum for layer in batchnorm_layers(learner.network)} == {momentum}

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["mobilenet_v3_large", "resnet50", "resnet32"])
    def test_the_larger_ones_are_built(self, name: str) -> None:
        assert Learner(name, image_size=32, device="cpu").backbone == name

    def test_an_own_module(self) -> None:
        body = Plain().body
        before = {name: value.clone() for name, value in body.state_dict().items()}
        learner = Learner(body, image_size=16, recipe=QUICK, device="cpu")
        learner.learn_task(a_task(), NAMES, progress=False)
        assert learner.classes == ("2",)
        assert body.training
        assert all(torch.equal(value, before[name]) for name, value in body.state_dict().items()), "the caller's is unchanged"

    def test_refusals(self) -> None:
        with pytest.raises(BackboneError, match=r"'resnet33'.*resnet32"):
            Learner("resnet33")
        with pytest.raises(BackboneError, match="0 BatchNorm layers"):
            Learner("convnext_tiny", image_size=64)
        with pytest.raises(BackboneError, match="no pretrained weights"):
            Learner("resnet20", weights="DEFAULT")
        with pytest.raises(BackboneError, match="weights='NONSENSE'"):
            Learner("resnet18", weights="NONSENSE")
        with pytest.raises(BackboneError, match="features of shape"):
            Learner(nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3))), image_size=16)
        with pytest.raises(BackboneError, match="does not run"):
            Learner(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(3)), nn.Flatten()), image_size=16)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"image_size": 4}, SettingError, "from 8 to"),
        ({"recipe": "slow"}, SettingError, "edge"),
        ({"method": "magic"}, SettingError, "abd"),
        ({"device": "warp"}, SettingError, "'cpu'"),
        ({"mean": (0.0, 0.0, 0.0), "std": (0.0, 1.0, 1.0)}, SettingError, "above 0"),
        ({"mean": (0.0, 0.0, 0.0)}, SettingError, "give both"),
        ({"memory_budget": "plenty"}, SettingError, "is not a size"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Learner("resnet8", **settings)


def test_a_data_loader_of_tensors(train: Batches) -> None:
    task = train.of(("0", "1"))
    loader = DataLoader(TensorDataset(task.images, task.targets), batch_size=32, shuffle=True)
    learner = quick_learner()
    learner.learn_task(loader, NAMES, progress=False)
    assert learner.classes == ("0", "1")
