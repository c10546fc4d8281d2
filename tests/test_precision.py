"""How a task computes: chosen by measuring, kept, reported, and undone afterwards. No test reads a clock."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edge_dfcil import BudgetError, Callback, Cancelled, Learner, SettingError, devices
from edge_dfcil.budget import speed
from edge_dfcil.compression import Distillation, distill
from edge_dfcil.demo import Batches
from edge_dfcil.methods.abd import ABD
from edge_dfcil.results import Computing, TaskReport
from tests.conftest import NAMES, QUICK, quick_learner, same_weights, weights

FIRST, SECOND = ("0", "1"), ("2", "3")
BATCHES = 3  # in each task
FASTER = {"float32, 1 thread": 0.5, "float32, contiguous, 1 thread": 0.2}
FEW = QUICK.changed({"schedule.min_steps": 0, "generator.steps": 3, "refine.min_steps": 0, "remember.pool": 64})
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The app has two threads, and must have two after every test. They are only counted, not started: networks this small are
    slower with them."""
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    yield
    assert threads[-1] == 2
    assert not torch.is_autocast_enabled("cpu")
    assert devices.memory_format(CPU) == torch.channels_last


@pytest.fixture
def learnt(learnt: Learner) -> Learner:
    learnt.recipe = FEW
    return learnt


class FakeClock:
    """Gives the times that the test sets: `seconds` for each way of computing, 1 s for any other. Steps are executed only if
    `steps` is true."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], least: int = 1) -> None:
        self.seconds, self.timed, self.steps = seconds, list[str](), False
        monkeypatch.setattr(speed, "LEAST_STEPS", least)
        monkeypatch.setattr(speed, "SHARE", 100.0)  # these tasks are so short that measuring would never pay
        monkeypatch.setattr(speed, "timed", self)

    def __call__(self, way: Computing, step: Callable[[], object]) -> float:
        self.timed.append(str(way))
        if self.steps:
            with devices.computing(way):
                step()
        return self.seconds.get(str(way), 1.0)


class Watch(Callback):
    """Records the number of threads and the memory format of each stage."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, torch.memory_format]] = {}

    def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
        self.seen[stage.name] = torch.get_num_threads(), devices.memory_format(CPU)


def learn(learner: Learner, train: Batches, names: tuple[str, ...] = FIRST, **settings: Any) -> TaskReport:
    return learner.learn_task(few(train, names), NAMES, progress=False, **settings)


def few(train: Batches, names: tuple[str, ...]) -> list[Any]:
    """The same batches each time."""
    with devices.seeded(0, CPU):
        return list(itertools.islice(train.of(names), BATCHES))


def new_learner(**settings: Any) -> Learner:
    return quick_learner(**{"recipe": FEW, **settings})


def chosen(report: TaskReport) -> Computing:
    assert report.computing is not None
    return report.computing


def test_threads_are_torchs_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = torch.get_num_threads()

    def fail() -> None:
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), devices.computing(Computing(threads=before + 1)):
        fail()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("value", ["half", "", None, 16, "Float32"])
def test_other_precisions_are_refused(value: Any, learnt: Learner) -> None:
    with pytest.raises(SettingError, match="'auto', 'float32', 'bfloat16'"):
        new_learner(precision=value)
    with pytest.raises(SettingError, match="'auto', 'float32', 'bfloat16'"):
        learnt.precision = value
    assert learnt.precision == "auto"


def test_a_device_without_bf16_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    mps, cuda = torch.device("mps"), torch.device("cuda")
    with pytest.raises(SettingError, match="'auto' or 'float32'"):
        devices.usual(mps, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert devices.usual(cuda).precision == devices.usual(mps).precision == "float32"
    with pytest.raises(SettingError, match="cannot be used on cuda"):
        devices.usual(cuda, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert devices.usual(cuda).precision == "bfloat16", "as before precision was a setting"
    assert devices.usual(cuda, "float32").precision == "float32"


def test_channels_last_on_mps_where_torch_computes_it_right(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    assert devices.memory_format(mps) == torch.contiguous_format, "no version is known to compute it correctly"
    monkeypatch.setattr(devices, "MPS_CHANNELS_LAST", (2, 14))
    for version, expected in (("2.13.1", torch.contiguous_format), ("2.14.0a0+git1", torch.channels_last)):
        monkeypatch.setattr(torch, "__version__", version)
        assert devices.memory_format(mps) == expected


def test_the_precision_stays_with_the_learner_and_not_with_the_file(learnt: Learner, tmp_path: Path) -> None:
    learnt.precision = "bfloat16"
    assert learnt.with_model(learnt.model).precision == "bfloat16"
    assert Learner.of(learnt.model, precision="float32").precision == "float32"
    path = learnt.save(tmp_path / "m")
    assert Learner.load(path, "cpu").precision == "auto"
    assert Learner.load(path, "cpu", precision="float32").precision == "float32"


class TestBfloat16:
    @pytest.mark.slow
    def test_it_learns_and_saves_float32(self, train: Batches, test: Batches, tmp_path: Path) -> None:
        learner = new_learner(precision="bfloat16", recipe=FEW.changed({"schedule.min_steps": 20}))
        report = learn(learner, train)
        assert chosen(report) == Computing("bfloat16"), "a requested precision is not measured"
        assert all(math.isfinite(value) for value in report.stages[0].losses.values())
        assert learner.evaluate(test.of(FIRST), NAMES).accuracy > 0.8
        loaded = Learner.load(learner.save(tmp_path / "m"), "cpu")
        kept = weights(loaded)
        assert {value.dtype for value in kept.values()} <= {torch.float32, torch.int64}
        assert same_weights(kept, learner)

    @pytest.mark.slow
    def test_it_changes_what_is_learnt_but_by_rounding(self, train: Batches) -> None:
        found = []
        for precision in ("float32", "bfloat16"):
            learner = new_learner(precision=precision, method="finetune", recipe=FEW)
            found.append(learn(learner, train).stages[0].losses["cross_entropy"])
        assert found[0] != found[1]
        assert found[0] == pytest.approx(found[1], rel=0.3)

    @pytest.mark.slow
    def test_a_recipe_in_full_precision_stays_so(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        full, runs = FEW.changed({"schedule.mixed_precision": False}), []
        for precision in ("float32", "bfloat16"):
            learner = new_learner(precision=precision, recipe=full)
            assert chosen(learn(learner, train)).precision == "float32"
            runs.append(weights(learner))
        assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
        clock = FakeClock(monkeypatch, {"bfloat16": 0.1})
        assert chosen(learn(new_learner(recipe=full), train)).precision == "float32"
        assert clock.timed and "bfloat16" not in clock.timed

    @pytest.mark.slow
    def test_closed_form_stages_are_in_full_precision(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        dtypes = set()
        learner = new_learner(precision="bfloat16", method="lda")
        features = type(learner.network).of_all_scales

        def watched(network: Any, images: Tensor) -> Tensor:
            found: Tensor = features(network, images)
            dtypes.add((torch.is_autocast_enabled("cpu"), found.dtype))
            return found

        learn(learner, train)
        monkeypatch.setattr(type(learner.network), "of_all_scales", watched)
        learn(learner, train, SECOND)
        assert dtypes == {(False, torch.float32)}

    @pytest.mark.slow
    def test_a_student_is_taught_in_it(self, learnt: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
        regions = []
        autocast = torch.autocast

        def watched(*args: Any, **settings: Any) -> Any:
            regions.append(args)
            return autocast(*args, **settings)

        monkeypatch.setattr(torch, "autocast", watched)
        lesson = Distillation(rounds=1, dreams=32, generator_steps=1, steps=1, batch=16)
        for precision, expected in (("float32", False), ("bfloat16", True)):
            regions.clear()
            learnt.precision = precision
            student, _ = distill(learnt, "resnet14", settings=lesson, progress=False)
            assert (("cpu", torch.bfloat16) in regions) == expected
            assert student.precision == precision


class TestChoice:
    def test_what_is_faster_is_taken_and_reported(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        ways = {"bfloat16": 0.5, "bfloat16, 1 thread": 0.3, "bfloat16, contiguous, 1 thread": 0.2}
        FakeClock(monkeypatch, ways)
        learner, watch = new_learner(), Watch()
        report = learn(learner, train, callbacks=[watch])
        assert str(chosen(report)) == "bfloat16, contiguous, 1 thread"
        assert watch.seen == {"learn": (1, torch.contiguous_format)}
        assert chosen(report).measured == {name: BATCHES * each for name, each in {"float32": 1.0, **ways}.items()}
        assert "computed in bfloat16, contiguous, 1 thread (measured: float32 3 s" in str(report)
        assert json.loads(json.dumps(report.to_dict()))["computing"]["threads"] == 1
        first = next(p for p in learner.network.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert first.is_contiguous(memory_format=torch.channels_last), "the serving model keeps its memory format"

    def test_a_little_faster_is_not_enough(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        slower = {"bfloat16": 0.9, "float32, 1 thread": 0.85, "float32, contiguous": 0.95}
        clock = FakeClock(monkeypatch, slower)
        assert chosen(learn(new_learner(), train)) == Computing(
            measured={name: BATCHES * each for name, each in {"float32": 1.0, **slower}.items()}
        )
        assert {*clock.timed} == {"float32", "bfloat16", "float32, 1 thread", "float32, contiguous"}

    def test_what_is_far_slower_is_dropped_after_one_step(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = FakeClock(monkeypatch, {"bfloat16": 15.0})
        report = learn(new_learner(), train)
        assert clock.timed.count("bfloat16") == 1
        assert chosen(report).precision == "float32" and "bfloat16" not in chosen(report).measured

    @pytest.mark.slow
    def test_all_training_stages_count_by_their_steps(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        """bf16 is fast for the generator's stage, and slow for the others, which have more steps."""

        class Stages(FakeClock):
            def __call__(self, way: Computing, step: Any) -> float:
                super().__call__(way, step)
                dreams = step.__self__.stage.name == "dream"
                return {"float32": 1.0, "bfloat16": 0.1 if dreams else 1.5}.get(str(way), 1.0)

        learner = new_learner()
        learn(learner, train)
        Stages(monkeypatch, {})
        assert chosen(learn(learner, train, SECOND)).precision == "float32"

    def test_what_fails_is_not_taken(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        class NoBfloat16(ABD):
            def first_loss(self, task: Any, batch: Any) -> Any:
                if torch.is_autocast_enabled("cpu"):
                    raise RuntimeError('"solve" not implemented for BFloat16')
                return super().first_loss(task, batch)

        FakeClock(monkeypatch, {"bfloat16": 0.1}).steps = True
        assert chosen(learn(new_learner(method=NoBfloat16()), train)).precision == "float32"

    @pytest.mark.slow
    def test_short_and_closed_form_tasks_are_not_measured(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = FakeClock(monkeypatch, {"bfloat16": 0.1}, least=BATCHES + 1)
        report = learn(new_learner(), train)
        assert chosen(report) == Computing() and "computed" not in str(report)
        monkeypatch.setattr(speed, "LEAST_STEPS", 1)
        learner = new_learner(precision="float32", method="lda")
        learn(learner, train)
        assert not clock.timed
        learner.precision = "auto"
        learn(learner, train, SECOND)
        assert not clock.timed, "there is nothing to train"

    @pytest.mark.slow
    def test_measuring_draws_no_random_number(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = new_learner(precision="float32")
        learn(plain, train)
        clock, measured = FakeClock(monkeypatch, {}), new_learner()
        clock.steps = True
        learn(measured, train)
        assert clock.timed and same_weights(weights(plain), measured)

    def test_measuring_ends_when_it_has_taken_its_share(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = FakeClock(monkeypatch, {})
        monkeypatch.setattr(speed, "SHARE", 0.05)
        learn(new_learner(), train)
        assert {*clock.timed} == {"float32", "bfloat16"}

    def test_measuring_takes_a_small_share_of_a_time_budget(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = FakeClock(monkeypatch, {"bfloat16": 0.1})
        monkeypatch.setattr(speed, "SHARE", 0.001)
        report = learn(new_learner(), train, time_budget=3600)
        assert clock.timed == ["float32", "float32", *("bfloat16", "float32") * 2], (
            "3.2 of 3.6 seconds, and the step that exceeded them"
        )
        assert chosen(report) == Computing() and report.fitted is not None

    @pytest.mark.slow
    def test_under_a_memory_budget_the_plan_is_for_what_was_chosen(self, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
        from edge_dfcil import learning

        plans, plan_memory = [], learning.plan_memory

        def watched(*args: Any) -> Any:
            plans.append(torch.get_num_threads())
            return plan_memory(*args)

        monkeypatch.setattr(learning, "plan_memory", watched)
        clock = FakeClock(monkeypatch, {"float32, 1 thread": 0.5})
        report = learn(new_learner(memory_budget="400MB"), train)
        assert plans == [2, 1] and chosen(report).threads == 1
        assert report.plan is not None and report.peak_bytes <= 400e6
        assert not any("contiguous" in way for way in clock.timed), "this would take a second copy of the networks"

        def too_little(*args: Any) -> Any:
            if torch.get_num_threads() == 1:
                raise BudgetError("too little")
            return plan_memory(*args)

        monkeypatch.setattr(learning, "plan_memory", too_little)
        report = learn(new_learner(memory_budget="400MB"), train)
        assert chosen(report).threads is None and "float32, 1 thread" in chosen(report).measured


class TestLeavesThingsAsTheyWere:
    """`_two_threads` checks threads, autocast and the memory format after each test; here a task ends early, or is paused."""

    @pytest.fixture(autouse=True)
    def _fewer_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        FakeClock(monkeypatch, FASTER)

    @pytest.mark.slow
    def test_after_an_error(self, learnt: Learner, train: Batches) -> None:
        class Fail(Callback):
            def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
                assert torch.get_num_threads() == 1
                raise ZeroDivisionError

        before = weights(learnt)
        with pytest.raises(ZeroDivisionError):
            learn(learnt, train, SECOND, callbacks=[Fail()])
        assert same_weights(before, learnt)

    def test_after_an_error_inside_autocast(self, train: Batches) -> None:
        class Broken(ABD):
            def first_loss(self, task: Any, batch: Any) -> Any:
                assert torch.is_autocast_enabled("cpu")
                raise KeyError("of the method's own")

        with pytest.raises(KeyError):
            learn(new_learner(method=Broken(), precision="bfloat16"), train)

    @pytest.mark.slow
    def test_after_a_cancel_also_while_it_measures(
        self, learnt: Learner, train: Batches, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Cancel(Callback):
            def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
                learnt.cancel()

        with pytest.raises(Cancelled):
            learn(learnt, train, SECOND, callbacks=[Cancel()])

        def timed(way: Computing, step: Callable[[], object]) -> float:
            learnt.cancel()
            with devices.computing(way):
                step()
            return 1.0

        monkeypatch.setattr(speed, "timed", timed)
        with pytest.raises(Cancelled):
            learn(learnt, train, SECOND)
        assert learnt.classes == FIRST

    @pytest.mark.slow
    def test_a_pause_while_it_measures_waits_for_the_first_step(
        self, learnt: Learner, train: Batches, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def timed(way: Computing, step: Callable[[], object]) -> float:
            session.pause()
            return 1.0

        monkeypatch.setattr(speed, "timed", timed)
        session = learnt.session(few(train, SECOND), NAMES, progress=False)
        assert session.run() is None
        assert not session.reports
        assert session.run() is not None and learnt.tasks == (FIRST, SECOND)

    @pytest.mark.slow
    def test_while_it_is_paused_and_it_goes_on_in_the_same_way(self, learnt: Learner, train: Batches) -> None:
        class Pause(Watch):
            def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
                super().on_step_end(stage, step, losses, images)
                if (stage.name, step) == ("learn", 1):
                    learnt.running.pause()  # type: ignore[union-attr]

        watch = Pause()
        session = learnt.session(few(train, SECOND), NAMES, progress=False, callbacks=[watch])
        assert session.run() is None
        assert torch.get_num_threads() == 2 and devices.memory_format(CPU) == torch.channels_last
        report = session.run()
        assert report is not None and chosen(report).threads == 1
        assert set(watch.seen.values()) == {(1, torch.contiguous_format)}


@pytest.mark.slow
def test_a_resumed_task_computes_as_before(learnt: Learner, train: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch, FASTER)

    class Stop(Callback):
        def on_step_end(self, stage: Any, step: Any, losses: Any, images: Any) -> None:
            if (stage.name, step) == ("learn", 1):
                begun.pause()

    fresh = Learner.of(learnt.model, recipe=FEW)
    learn(whole := Learner.of(learnt.model, recipe=FEW), train, SECOND)
    begun = learnt.session(few(train, SECOND), NAMES, progress=False, callbacks=[Stop()])
    assert begun.run() is None
    state = json.loads(json.dumps(begun.state_dict()["position"]))

    clock = FakeClock(monkeypatch, {})  # a new measurement would choose another way
    watch = Watch()
    session = fresh.session(few(train, SECOND), NAMES, progress=False, callbacks=[watch])
    session.load_state_dict({"position": state, "tensors": begun.state_dict()["tensors"]})
    report = session.run()
    assert report is not None and str(chosen(report)) == "float32, contiguous, 1 thread"
    assert not clock.timed and watch.seen["learn"] == (1, torch.contiguous_format)
    assert same_weights(weights(whole), fresh)

    other = Learner.of(learnt.model, recipe=FEW, precision="float32").session(few(train, SECOND), NAMES, progress=False)
    other.load_state_dict({"position": state, "tensors": {}})
    with pytest.raises(SettingError, match="another precision"):
        other.run()
