"""Sessions: cancelled, paused, saved and resumed, with bit-identical results; a checkpoint contains no image."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_dfcil import Callback, Cancelled, Learner, Model, ModelFileError, SettingError
from edge_dfcil.budget import schedule
from edge_dfcil.demo import Batches
from edge_dfcil.model import file
from tests.conftest import NAMES, QUICK, quick_learner, same_weights, weights

SECOND = ("2", "3")


class Killed(BaseException):
    """Simulates a killed process, which runs no `except Exception` clause."""


class Kill(Callback):
    def __init__(self, stage: Any, step: Any) -> None:
        self.stage, self.step = stage, step

    def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
        if (stage.name, step) == (self.stage, self.step):
            raise Killed


def begun(train: Batches, method: Any = "abd") -> Learner:
    """A learner that knows two digits; identical at every call."""
    learner = quick_learner(method=method)
    learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
    return learner


def session(learner: Learner, train: Batches, **settings: Any) -> Any:
    found = learner.session(train.of(SECOND), NAMES, progress=False, **settings)
    found.checkpoint_every = 0.0  # at every step
    return found


@pytest.fixture(scope="module")
def uninterrupted(train: Batches) -> dict[str, torch.Tensor]:
    learner = begun(train)
    learner.learn_task(train.of(SECOND), NAMES, progress=False)
    return weights(learner)


@pytest.mark.parametrize(("stage", "step"), [("dream", 3), ("learn", 1), ("learn", 7), ("learn", 12), ("refine", 2)])
@pytest.mark.slow
def test_a_killed_task_goes_on_to_the_same_bits(
    stage: str, step: int, train: Batches, tmp_path: Path, uninterrupted: Any
) -> None:
    path = tmp_path / "task.checkpoint"
    with pytest.raises(Killed):
        session(begun(train), train, checkpoint=path, callbacks=[Kill(stage, step)]).run()
    assert path.exists() == (stage != "dream"), "a stage that makes generated images leaves nothing on the disk"
    learner = begun(train)
    again = session(learner, train, checkpoint=path)
    report = again.run()
    assert report.resumed == again.resumed == (stage != "dream")
    assert [s.name for s in report.stages] == ["dream", "learn", "refine"]
    assert same_weights(uninterrupted, learner)
    again.clear_checkpoint()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_learn_task_removes_its_checkpoint(train: Batches, tmp_path: Path, uninterrupted: Any) -> None:
    learner = begun(train)
    learner.learn_task(train.of(SECOND), NAMES, checkpoint=tmp_path / "c", progress=False)
    assert same_weights(uninterrupted, learner)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_holds_no_image_and_is_no_model(train: Batches, tmp_path: Path) -> None:
    path = tmp_path / "task.checkpoint"
    with pytest.raises(Killed):
        session(begun(train), train, checkpoint=path, callbacks=[Kill("learn", 9)]).run()
    tensors, _ = file.read(path, kind="checkpoint")
    assert {name.split(".")[0] for name in tensors} == {"network", "optimizer", "random", "pass"}
    assert not [name for name, tensor in tensors.items() if tensor.shape[-2:] == (16, 16)]
    with pytest.raises(ModelFileError, match="checkpoint"):
        Learner.load(path)


@pytest.mark.slow
def test_a_checkpoint_of_another_task_is_left_aside(train: Batches, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "task.checkpoint"
    with pytest.raises(Killed):
        session(begun(train), train, checkpoint=path, callbacks=[Kill("learn", 9)]).run()
    learner = begun(train)
    with caplog.at_level("WARNING", "edge_dfcil"):
        report = learner.learn_task(train.of(("4", "5")), NAMES, checkpoint=path, progress=False)
    assert not report.resumed and learner.classes[2:] == ("4", "5")
    assert "not resumed" in caplog.text and "classes" in caplog.text


@pytest.mark.slow
def test_a_paused_session_goes_on_to_the_same_bits(train: Batches, uninterrupted: Any) -> None:
    class Pause(Callback):
        def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
            running.pause()

    learner = begun(train)
    running = session(learner, train, callbacks=[Pause()])
    pauses = 0
    while running.run() is None:
        pauses += 1
        assert learner.classes == ("0", "1"), "nothing is committed before the end"
    assert pauses > 10
    assert same_weights(uninterrupted, learner)


@pytest.mark.slow
def test_a_closed_form_stage_that_is_paused_counts_each_image_once(train: Batches) -> None:
    class Pause(Callback):
        paused = False

        def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
            if stage.name == "lda" and not self.paused:
                Pause.paused = True
                running.pause()

    learner, other = begun(train, "lda"), begun(train, "lda")
    other.learn_task(train.of(SECOND), NAMES, progress=False)
    running = session(learner, train, callbacks=[Pause()])
    assert running.run() is None
    assert running.run() is not None
    assert same_weights(weights(other), learner)


@pytest.mark.slow
def test_state_dict_carries_a_session_over(train: Batches, uninterrupted: Any) -> None:
    class Pause(Callback):
        def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
            if (stage.name, step) == ("learn", 5):
                first.pause()

    first = session(begun(train), train, callbacks=[Pause()])
    assert first.run() is None
    learner = begun(train)
    second = session(learner, train)
    second.load_state_dict(first.state_dict())
    second.run()
    assert same_weights(uninterrupted, learner)


@pytest.mark.slow
def test_a_state_of_another_operation_is_refused(train: Batches) -> None:
    class Pause(Callback):
        def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
            first.pause()

    first = session(begun(train), train, callbacks=[Pause()])
    first.run()
    learner = begun(train, "lwf")
    second = session(learner, train)
    second.load_state_dict(first.state_dict())
    with pytest.raises(SettingError, match=r"another .*method"):
        second.run()
    assert learner.classes == ("0", "1")


def test_finish_now_commits_what_has_been_learnt(train: Batches) -> None:
    class Enough(Callback):
        def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
            if (stage.name, step) == ("learn", 4):
                running.finish_now()

    learner = begun(train)
    running = session(learner, train, callbacks=[Enough()])
    report = running.run()
    assert {stage.name: stage.steps for stage in report.stages} == {"dream": 8, "learn": 4, "refine": 0}
    assert learner.classes == ("0", "1", "2", "3")


def test_there_is_nothing_to_finish_before_the_first_step(train: Batches) -> None:
    class Enough(Callback):
        def on_stage_begin(self, stage: Any) -> None:
            running.finish_now()

    learner = begun(train)
    running = session(learner, train, callbacks=[Enough()])
    with pytest.raises(Cancelled, match="nothing"):
        running.run()
    assert learner.classes == ("0", "1")


@pytest.mark.slow
def test_two_sessions_of_one_learner_do_not_both_commit(train: Batches) -> None:
    learner = begun(train)
    first, second = session(learner, train), session(learner, train)
    first.run()
    with pytest.raises(SettingError, match="another model"):
        second.run()


@pytest.mark.parametrize("verb", ["dream", "export"])
def test_other_long_work_is_cancelled_too(verb: str, learnt: Learner, tmp_path: Path) -> None:
    class Cancel(Callback):
        def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
            learnt.cancel()

    work = {
        "dream": lambda: learnt.dream(8, callbacks=[Cancel()], progress=False),
        "export": lambda: learnt.export(tmp_path / "m.onnx", "int8", force=True, callbacks=[Cancel()], progress=False),
    }
    with pytest.raises(Cancelled):
        work[verb]()
    assert not list(tmp_path.iterdir())
    assert learnt.running is None


def test_losses_come_by_pass_and_hooks_with_them(train: Batches) -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.epochs: list[Any] = []

        def on_task_begin(self, learner: Learner) -> None:
            self.learner = learner

        def on_epoch_end(self, stage: Any, epoch: Any, losses: Any) -> None:
            self.epochs.append((stage.name, epoch, set(losses)))
            assert self.learner.classes == (), "the model from before answers until the commit"

    watch, learner = Watch(), quick_learner(method="finetune")
    report = learner.learn_task(train.of(("0", "1")), NAMES, callbacks=[watch], progress=False)
    (stage,) = report.stages
    assert len(stage.history) == len(watch.epochs) == 2, "12 steps, 9 batches an epoch"
    assert watch.epochs[-1] == ("learn", 2, {"cross_entropy"})
    assert stage.history[1]["cross_entropy"] < stage.history[0]["cross_entropy"]


class TestHost:
    """A task computes the same whatever the app has set in torch, and leaves those settings unchanged."""

    @pytest.mark.slow
    def test_a_task_learns_the_same_wherever_it_is_called(self, train: Batches) -> None:
        found = []
        regions = (
            torch.no_grad(),
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
        )
        for region in regions:
            learner = quick_learner()
            with region:
                learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
            found.append(weights(learner))
        plain = quick_learner()
        plain.learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert all(torch.equal(value, weights(plain)[name]) for run in found for name, value in run.items())

    def test_a_default_dtype_of_the_app_is_left_alone(self, train: Batches, tmp_path: Path) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            learner = quick_learner()
            learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
            assert torch.get_default_dtype() == torch.float64
            assert {value.dtype for value in weights(learner).values()} == {torch.float32, torch.int64}
            learner.save(tmp_path / "m")
            assert Model.load(tmp_path / "m", "cpu").digest() == learner.model.digest()
        finally:
            torch.set_default_dtype(torch.float32)

    @pytest.mark.slow
    def test_a_default_device_of_the_app_changes_nothing(self, train: Batches, test: Batches, tmp_path: Path) -> None:
        tasks = [[*train.of(("0", "1"))], [*train.of(("2", "3"))]]
        known, zeros, images = [*test.of(("0", "1"))], [*test.of(("0",))], test.images[:3]

        def whole() -> tuple[Any, ...]:
            learner = quick_learner(precision="float32", recipe=QUICK.changed({"schedule.adapt": "first", "refine.head": "lda"}))
            for task in tasks:
                learner.learn_task(task, NAMES, progress=False)
            learner.calibrate(known, NAMES)
            learner.merge(["0", "1"], "a")
            learner.forget("3")
            learner.save(tmp_path / "m")
            loaded = Learner.load(tmp_path / "m", "cpu")
            loaded.export(tmp_path / "m.onnx", input="any", progress=False)
            found = (
                loaded.evaluate(zeros, {0: "a"}),
                loaded.predict(images, reject=True),
                loaded.dream(1, progress=False).tolist(),
            )
            return (learner.model.digest(), *found, loaded.embed(images).tolist())

        expected = whole()
        torch.set_default_device("meta")  # a tensor that is made without a device has no values there
        try:
            assert whole() == expected
        finally:
            torch.set_default_device(None)

    def test_the_random_state_of_the_app_is_left_alone(self, train: Batches) -> None:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        quick_learner().learn_task(train.of(("0", "1")), NAMES, progress=False)
        assert torch.equal(torch.rand(3), expected)

    def test_wrong_callbacks_are_refused_and_lock_nothing(self, learnt: Learner, train: Batches) -> None:
        wrong: list[Any] = [Callback, "abd", 3, [object()]]
        for callbacks in wrong:
            with pytest.raises(SettingError, match="Callback"):
                learnt.learn_task(train.of(("4",)), NAMES, callbacks=callbacks, progress=False)
        learnt.learn_task(train.of(("4",)), NAMES, progress=False)

    @pytest.mark.slow
    def test_a_hook_that_raises_on_exit_locks_nothing(self, learnt: Learner, train: Batches) -> None:
        class Bad(Callback):
            def on_exit(self) -> None:
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            learnt.learn_task(train.of(("4",)), NAMES, callbacks=[Bad()], progress=False)
        learnt.learn_task(train.of(("5",)), NAMES, progress=False)

    def test_cancel_ends_a_scan_that_would_never_end(self, learnt: Learner, train: Batches) -> None:
        class Endless:
            def __iter__(self) -> Iterator[Any]:
                while True:
                    yield from train.of(("4",))
                    learnt.cancel()

        with pytest.raises(Cancelled):
            learnt.learn_task(Endless(), NAMES, progress=False)


class TestTimeBudget:
    @pytest.mark.parametrize(("given", "seconds"), [(90, 90), ("90s", 90), ("10min", 600), ("1.5 h", 5400), (None, None)])
    def test_times_are_read(self, given: int | str | None, seconds: int | None) -> None:
        assert schedule.parse(given) == seconds

    @pytest.mark.parametrize("wrong", ["", "ten", "10 parsecs", -1, 0, True, "nan", "inf"])
    def test_other_times_are_refused(self, wrong: str | int | bool) -> None:
        with pytest.raises(SettingError, match="time_budget"):
            schedule.parse(wrong)

    @pytest.mark.slow
    def test_a_schedule_is_shortened_as_a_whole(self, train: Batches) -> None:
        learner = begun(train)
        learner.recipe = QUICK.changed({"schedule.min_steps": 20_000, "generator.steps": 10_000, "refine.min_steps": 2_000})
        report = learner.learn_task(train.of(SECOND), NAMES, time_budget="5s", progress=False)
        assert report.fitted is not None
        share = report.fitted["share"]
        steps = {stage.name: stage.steps for stage in report.stages}
        assert 0 < share < 0.5
        assert steps["dream"] == pytest.approx(share * 10_000, abs=1)
        assert report.fitted["step_seconds"].keys() == {"dream", "learn", "refine"}
        assert learner.classes == ("0", "1", "2", "3")

    @pytest.mark.slow
    def test_a_budget_that_is_long_enough_changes_nothing(self, train: Batches, uninterrupted: Any) -> None:
        learner = begun(train)
        report = learner.learn_task(train.of(SECOND), NAMES, time_budget="1h", progress=False)
        assert report.fitted is not None and report.fitted["share"] == 1.0
        assert same_weights(uninterrupted, learner)


@pytest.mark.slow
def test_two_threads_cannot_teach_one_learner(learnt: Learner, train: Batches) -> None:
    class Wait(Callback):
        def on_stage_begin(self, stage: Any) -> None:
            inside.set()
            go_on.wait(30)

    inside, go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: learnt.learn_task(train.of(("4",)), NAMES, callbacks=[Wait()], progress=False))
    thread.start()
    inside.wait(30)
    with pytest.raises(SettingError, match="another thread"):
        learnt.learn_task(train.of(("5",)), NAMES, progress=False)
    go_on.set()
    thread.join()
    assert learnt.classes[-1] == "4"


def test_a_checkpoint_that_cannot_be_written_is_an_error_before_training(learnt: Learner, train: Batches, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="folder"):
        learnt.learn_task(train.of(("4",)), NAMES, checkpoint=Path(tmp_path / "no" / "c"), progress=False)


def test_a_disk_that_fills_up_costs_the_checkpoint_and_not_the_task(
    train: Batches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learner, path, write = quick_learner(), tmp_path / "c", file.write
    tried: list[bool] = []

    def full(target: Any, *arguments: Any, kind: Any = "model", **settings: Any) -> Any:
        if kind == "checkpoint" and tried:
            tried.append(path.exists())
            raise ModelFileError("c cannot be written: No space left on device")
        tried.append(False)
        return write(target, *arguments, kind=kind, **settings)

    monkeypatch.setattr(file, "write", full)
    session(learner, train, checkpoint=path).run()
    assert learner.classes and len(tried) > 3
    assert all(tried[1:]), "the checkpoint that could be written stays"
    assert [record.getMessage() for record in caplog.records].count(
        "the session continues without a new checkpoint: c cannot be written: No space left on device"
    ) == 1
