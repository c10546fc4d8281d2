"""The benchmarks themselves: published class orders, runs that resume, tables made from files."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torchvision.datasets import CIFAR100

from benchmarks import (
    accuracy,
    audits,
    candidates,
    embedding,
    images,
    machine,
    memory,
    memory_tables,
    rejection,
    report,
    trials,
    workshop_tables,
)
from benchmarks.__main__ import main
from benchmarks.datasets import Data, class_order, load, pack
from edge_dfcil import DataError, Learner, Recipe, SettingError
from edge_dfcil.dreaming import objective
from edge_dfcil.recipe import dotted, find_recipe


@pytest.mark.parametrize(
    ("run", "begins"), [(0, [23, 8, 11, 7, 48, 13]), (1, [53, 37, 65, 51, 4, 20]), (2, [0, 76, 61, 63, 1, 71])]
)
def test_class_orders_are_the_published_ones(run: int, begins: list[Any]) -> None:
    order = class_order(100, run)
    assert order[:6] == begins
    assert sorted(order) == list(range(100))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, per_class in (("train", 8), ("test", 4)):
        arrays[f"{part}_y"] = np.repeat(np.arange(6, dtype=np.uint8), per_class)
        arrays[f"{part}_x"] = random.integers(0, 256, (6 * per_class, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar100.npz", allow_pickle=False, class_names=np.array([*"abcdef"]), **arrays)
    return load(tmp_path)


TINY = accuracy.Protocol("tiny", 4, 2, "resnet8", "edge", image_size=16, batch_size=8)
QUICK = {"epochs": 1, "first_epochs": 1, "min_steps": 2, "generator_steps": 2, "width": 8, "pool": 16, "refine_min_steps": 2}
CLOSED = {"refine.head": "lda", "schedule.adapt": "always"}  # a closed-form head over a network that is trained at every task


@pytest.mark.slow
@pytest.mark.parametrize("method", ["abd", "bic-8", "icarl-8", "dgr", "upper_bound"])
def test_a_stopped_run_goes_on_and_ends_the_same(
    method: str, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected = accuracy.run(TINY, method, 0, data, whole, "cpu", QUICK)
    learn_task, calls = Learner.learn_task, list[int]()

    def stops_at_the_second(self: Learner, *arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn_task(self, *arguments, **settings)

    monkeypatch.setattr(Learner, "learn_task", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        accuracy.run(TINY, method, 0, data, stopped, "cpu", QUICK)
    resumed = accuracy.run(TINY, method, 0, data, stopped, "cpu", QUICK)
    assert len(calls) == 3
    assert resumed["matrix"] == expected["matrix"]
    assert resumed["bytes_kept"] == expected["bytes_kept"]
    assert [path.suffix for path in whole.iterdir() if path.name.startswith(".")] == []
    (written,) = whole.glob("*.json")
    assert json.loads(written.read_text()) == json.loads(json.dumps(expected))


@pytest.mark.slow
def test_every_trial_begins_with_the_same_model_and_learns_otherwise(data: Data, tmp_path: Path) -> None:
    setting = trials.Setting(TINY, find_recipe("edge").changed(dotted(QUICK)), {})
    names = [name for name in trials.TRIALS if name != "twice as many dreams"]
    first = trials.run(setting, data, 0, tmp_path, print, names[:1])
    found = trials.run(setting, data, 0, tmp_path, print, names)
    names = [name for name in names if not trials.TRIALS[name].closed_form]  # a trained head keeps no class statistics
    assert found["trials"][names[0]] == first["trials"][names[0]]
    assert list(found["trials"]) == names
    text = trials.describe(tmp_path)
    assert all(f"| {name} |" in text for name in names) and "twice as many" not in text
    setting = trials.Setting(replace(TINY, name="closed"), setting.recipe.changed(CLOSED), {"schedule.adapt": "first"})
    guided = trials.run(setting, data, 0, tmp_path, print, ["as it is", "guided inversion"])
    assert list(guided["trials"]) == ["as it is", "guided inversion"]
    assert "a closed-form head" in trials.describe(tmp_path)
    statistics = [tuple(torch.ones(2) for _ in range(4))]
    with trials.averaged_statistics():
        objective.statistics_alignment(statistics)  # type: ignore[arg-type]
        other = [(torch.ones(2), torch.ones(2), torch.zeros(2), torch.ones(2))]
        averaged = float(objective.statistics_alignment(other))
    assert 0 < averaged < float(objective.statistics_alignment(other))


@pytest.mark.slow
def test_a_run_says_all_that_a_reader_needs(data: Data, tmp_path: Path) -> None:
    bound = accuracy.run(TINY, "upper_bound", 0, data, tmp_path, "cpu", QUICK)
    plain = accuracy.run(TINY, "finetune", 0, data, tmp_path, "cpu", QUICK)
    stored = accuracy.run(TINY, "rehearsal-8", 0, data, tmp_path, "cpu", QUICK)
    dreams = accuracy.run(TINY, "abd:distil_real", 0, data, tmp_path, "cpu", QUICK)
    assert bound["omega"] == plain["omega"] is None or bound["omega"] == pytest.approx(100)
    recipe = Recipe.from_dict(dreams["recipe"])
    assert recipe.remember.distil_on == "real" and recipe.refine.epochs == recipe.refine.align_head == 0
    assert stored["bytes_kept"] - plain["bytes_kept"] == pytest.approx(
        8 * 3 * 16 * 16 + 8 * 8, abs=600
    )  # settings differ by a name
    assert min(min(r["peak_bytes"]) for r in (plain, stored, dreams)) > 10**7
    assert set(dreams["mid"][0]) == {"to_new_real", "to_old_synthetic"}
    assert plain["mid"] == []
    assert plain["commit"] == machine.commit()
    assert {"torch", "numpy", "python", "edge_dfcil"} == set(plain["versions"])
    assert set(plain["machine"]) == {"device", "processor", "threads", "allocator"}


@pytest.mark.slow
def test_the_report_is_made_from_the_files(data: Data, tmp_path: Path) -> None:
    found = {m: accuracy.run(TINY, m, 0, data, tmp_path, "cpu", QUICK) for m in ("upper_bound", "abd", "deep_inversion")}
    accuracy.run(TINY, "abd", 1, data, tmp_path, "cpu", QUICK)
    done = CliRunner().invoke(main, ["report", "--out", str(tmp_path)], catch_exceptions=False)
    text = (tmp_path / "README.md").read_text()
    assert text in done.output
    tag = "".join(f"-{key}={value}" for key, value in QUICK.items())
    lines = text[: text.index("MID")].splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    assert rows["deep_inversion" + tag][3] == f"{100 * found['deep_inversion']['final_accuracy']:.1f}"
    assert rows["abd" + tag][1] == "0, 1"
    assert "±" in rows["abd" + tag][3]
    for picture in ("tiny.png", "tiny-bytes.png"):
        assert (tmp_path / picture).stat().st_size > 0
        assert picture in text


def test_no_mean_is_over_two_versions_of_a_recipe(tmp_path: Path) -> None:
    def add(seed: int, version: int, accuracy: float) -> None:
        recipe = {"preset": "frozen", "version": version}
        run = {"protocol": {"name": "tiny", "tasks": 1}, "method": "abd", "seed": seed, "recipe": recipe, "matrix": [[1.0]]}
        (tmp_path / f"tiny-abd-seed{seed}.json").write_text(json.dumps({**run, "final_accuracy": accuracy}))

    add(0, 1, 0.5)
    assert report.read(tmp_path)["tiny"].keys() == {"abd"} and report.marked(report.read(tmp_path)["tiny"]["abd"]) == r"50.0 \*"
    add(1, 2, 0.7)
    add(2, 2, 0.9)
    found = {method: (report.last(runs), report.marked(runs)) for method, runs in report.read(tmp_path)["tiny"].items()}
    assert found == {"abd": (80.0, "80.0 ± 14.1"), "abd, older": (50.0, r"50.0 \*")}


def test_no_task_is_begun_that_would_not_end_in_time(data: Data, tmp_path: Path) -> None:
    asked = []

    def never(seconds: Any) -> bool:
        asked.append(seconds)
        return len(asked) == 1

    with pytest.raises(accuracy.Stopped):
        accuracy.run(TINY, "finetune", 0, data, tmp_path, "cpu", QUICK, never)
    assert asked[0] == 0
    assert asked[1] > 0
    assert len(accuracy.run(TINY, "finetune", 0, data, tmp_path, "cpu", QUICK)["matrix"]) == 2


def test_presets_are_the_published_protocols() -> None:
    for tasks in (5, 10, 20):
        preset = accuracy.PRESETS[f"paper-{tasks}"]
        assert (preset.tasks, preset.classes, preset.backbone, preset.recipe, preset.batch_size) == (
            tasks, 100, "resnet32", "paper", 128,
        )  # fmt: skip
    with pytest.raises(SettingError, match="edge-9x9"):
        accuracy.find_preset("edge-9x9")
    assert accuracy.expand("lwf,ablations")[:2] == ["lwf", "abd:published"]


def test_classes_of_an_imbalanced_protocol_have_from_all_images_to_few(data: Data) -> None:
    protocol = replace(TINY, classes=6, tasks=3, imbalance=4.0)
    order = class_order(6, 0)
    counts = [accuracy.training(protocol, data, [number], 0).targets.numel() for number in order]
    together = accuracy.training(protocol, data, order, 0).targets.bincount()
    assert sorted(counts) == [2, 3, 3, 5, 6, 8]
    assert [int(together[number]) for number in order] == counts


@pytest.mark.slow
def test_instant_and_adapted_models_are_tested_apart(data: Data, tmp_path: Path) -> None:
    result = accuracy.run(TINY, "abd:drift", 0, data, tmp_path, "cpu", QUICK)
    first, later = result["candidates"]
    assert first == {}  # an untrained network has no instant model
    assert later.keys() == {"instant", "adapted"}
    assert all(0 <= later[kind]["accuracy"] <= 1 and later[kind]["expected_error"] >= 0 for kind in later)
    assert result["accuracy"][1] in {later[kind]["accuracy"] for kind in later}
    assert "## Instant and adapted\n\n| protocol |" in report.write(tmp_path)


def test_the_choice_between_instant_and_adapted_by_hand() -> None:
    def pair(instant: tuple[float, float], adapted: tuple[float, float]) -> dict[str, Any]:
        both = {"instant": instant, "adapted": adapted}
        return {kind: {"accuracy": accuracy, "expected_error": error} for kind, (accuracy, error) in both.items()}

    pairs = [
        pair((0.6, 0.4), (0.7, 0.3)),  # taken, and better
        pair((0.6, 0.4), (0.5, 0.405)),  # taken, and worse
        pair((0.6, 0.4), (0.5, 0.8)),  # dropped, and worse
        {},  # a task without an instant model
    ]
    trains, fixed = ({"schedule": {"adapt": adapt}} for adapt in ("always", "first"))
    ours = [
        {"seed": 0, "candidates": pairs, "recipe": trains},
        {"seed": 1, "candidates": pairs[:1], "recipe": trains, "expected_errors": 2},
    ]
    table = candidates.describe({"tiny": {"abd": ours, "frozen": [{"seed": 0, "candidates": [{}, {}, {}], "recipe": fixed}]}})
    assert "serve the instant model: 2 later tasks, runs: 1." in table
    assert "| tiny | abd | 0 | 1 | 3 | 60.0 | 56.7 | 2 | 2 | -10.0 | 1 | 2 of 3 | 60.0 |" in table
    assert "| tiny | abd | 1 | 2 | 1 | 60.0 | 70.0 | 0 | 0 | 0.0 | 0 | 1 of 1 | 70.0 |" in table


def test_mid_by_hand() -> None:
    reference = torch.tensor([[0.0, 0.0], [2.0, 0.0]])  # mean (1, 0), every image at distance 1 from it
    assert embedding.mid(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), reference) == pytest.approx(2)
    assert embedding.mid(reference, reference) == 0


def test_a_packed_file_is_small_and_says_how_it_was_packed(data: Data, tmp_path: Path) -> None:
    said = pack(data, tmp_path / "small.npz", limit=60_000)
    packed = load(tmp_path / "small.npz")
    assert packed.packed == said
    assert "JPEG" in said
    assert (tmp_path / "small.npz").stat().st_size <= 60_000
    assert (packed.arrays["test_x"] == data.arrays["test_x"]).all()
    assert (packed.arrays["train_y"] == data.arrays["train_y"]).all()
    smooth = Data(data.arrays | {"train_x": np.full_like(data.arrays["train_x"], 7)})
    pack(smooth, tmp_path / "smooth.npz", limit=60_000)
    assert np.abs(load(tmp_path / "smooth.npz").arrays["train_x"].astype(int) - 7).max() <= 1
    with pytest.raises(DataError, match="does not fit"):
        pack(data, tmp_path / "tiny.npz", limit=1000)


def test_torchvisions_folder_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the form that torchvision downloads, with their own checksums in place of the published ones."""
    (folder := tmp_path / CIFAR100.base_folder).mkdir()
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 32, 32, 3), dtype=np.uint8)
    for which, (part, listed) in enumerate((("train", "train_list"), ("test", "test_list"))):
        rows = images[which].transpose(0, 3, 1, 2).reshape(6, 3072)
        (folder / part).write_bytes(pickle.dumps({"data": rows, "fine_labels": [0, 1, 2, 0, 1, 2]}))
        monkeypatch.setattr(CIFAR100, listed, [[part, _md5(folder / part)]])
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["ant", "bee", "cow"]}))
    monkeypatch.setitem(CIFAR100.meta, "md5", _md5(folder / "meta"))
    found = load(tmp_path)
    assert found.names == ["ant", "bee", "cow"]
    for which, part in enumerate(("train", "test")):
        assert np.array_equal(found.arrays[f"{part}_x"], images[which])
        assert found.arrays[f"{part}_y"].tolist() == [0, 1, 2, 0, 1, 2]


def _md5(path: Path) -> Any:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_folders_of_pictures_are_a_data_set(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name, shade in (("dark", 10), ("light", 200)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (20, 20), (shade,) * 3).save(tmp_path / part / name / f"{number}.png")
    found = load(tmp_path, "folder", 16)
    assert found.names == ["dark", "light"]
    assert found.arrays["train_x"].shape == (6, 16, 16, 3)
    assert set(found.part("test", [1], 8).images.flatten().tolist()) == {200}
    with pytest.raises(DataError, match=r"cifar100\.npz.*train/"):
        load(tmp_path / "train", "cifar100")


@pytest.mark.parametrize("preset", ["edge-5x4", "paper-10"])
def test_the_command_runs_resumes_and_tells(preset: str, data: Data, tmp_path: Path) -> None:
    arguments = [
        "accuracy",
        "--preset",
        preset,
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--methods",
        "abd",
        "--device",
        "cpu",
    ]
    other = ["--classes", "4", "--tasks", "2", "--backbone", "resnet8", "--image-size", "16", "--batch-size", "8"]
    changes = [part for key, value in QUICK.items() for part in ("--set", f"{key}={value}")]
    for _ in range(2):
        done = CliRunner().invoke(main, [*arguments, *other, *changes], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert "all of it has been run" in done.output
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text())["protocol"]["tasks"] == 2
    arguments[arguments.index("abd")] = "magic"
    done = CliRunner().invoke(main, [*arguments, *other, *changes])
    assert done.exit_code == 1
    assert "magic" in done.output


@pytest.mark.slow
def test_speed_checks_that_both_do_the_same_and_prints_its_ratios() -> None:
    done = CliRunner().invoke(main, ["speed", "--quick", "--json", "--device", "cpu"], catch_exceptions=False)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["losses_differ_by"] <= 1e-4
    assert found["classifier_step_ratio"] > 0
    assert found["generator_step_ratio"] > 0
    for shares in found["profile"].values():
        assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
def test_precision_times_every_way_and_tells_the_accuracy_of_both(data: Data, tmp_path: Path) -> None:
    command = ["precision", "--data", str(tmp_path), "--quick", "--remark", "alone on it"]
    shown = CliRunner().invoke(main, command, catch_exceptions=False).stdout
    assert "| backbone | float32 | bfloat16 | float32, contiguous | bfloat16, contiguous |" in shown
    assert "alone on it" in shown and "\nbfloat16: " in shown and not (tmp_path / "precision.json").exists()


@pytest.mark.slow
def test_the_workshop_runs_every_step_and_goes_on_where_it_stopped(data: Data, tmp_path: Path) -> None:
    out, models = tmp_path / "out", tmp_path / "models"
    shop = ["workshop", "--data", str(tmp_path), "--quick", "--out", str(out), "--models", str(models)]
    done = CliRunner().invoke(main, [*shop, "--parts", "dreams,distill,adopt"], catch_exceptions=False)
    assert "| resnet8 adaptive |" in done.stdout and "| resnet8 adaptive by the pixel |" in done.stdout
    assert "| lwf_mc |" in done.stdout and "pruned" not in done.stdout
    assert (out / "workshop-dreams.png").stat().st_size > 0
    found = json.loads((out / "workshop.json").read_text())
    again = CliRunner().invoke(main, shop, catch_exceptions=False)
    assert "teacher" not in again.stderr, "finished steps are not repeated"
    assert "prune by importance and latency" in again.stdout and "calibrated on dreams" in again.stdout
    after = json.loads((out / "workshop.json").read_text())
    assert {name: after[name] for name in found if name not in ("commit", "versions", "machine")}.items() <= after.items()
    assert 0 <= after["adopt abd"]["old"] <= 1 and after["adopt upper bound"]["combined"] <= 1

    timed = ["latency", "--quick", "--model", str(models / "teacher.safetensors")]
    timed += ["--distilled", str(models / "resnet8-adaptive.safetensors"), "--out", str(out)]
    done = CliRunner().invoke(main, timed)
    if done.exit_code:  # a teacher of four steps may answer differently in INT8, and is then not exported
        assert "another answer than the model" in done.output
    else:
        assert "| onnx float, distilled |" in done.stdout and "with ONNX Runtime alone" in done.stdout


def test_the_workshop_tells_seeds_together() -> None:
    def row(after: Any, agreement: Any) -> dict[str, Any]:
        return {"accuracy": [0.8, after], "agreement": agreement, "parameters": [2, 1], "dreams": 64, "minutes": 1.0}

    made = {"teacher": {"accuracy": 0.8}, "distill resnet20 noise": row(0.1, 1.0)}
    long = {"machine": {"device": "some card"}, "at_once": 2}
    long |= {f"distill resnet20 adaptive, seed {seed}": row(after, 0.9) for seed, after in enumerate((0.60, 0.64))}
    text = workshop_tables.describe(made, long)
    assert "| resnet20 noise | 1 | 1 | 64 | 80.0 | 10.0 | 12.5 | 100.0 | 1.0 |" in text
    assert "| resnet20 adaptive | 2 | 1 | 64 | 80.0 | 62.0 ± 2.8 | 77.5 ± 3.5 | 90.0 | 1.0 |" in text
    assert "on some card, 2 rows at a time" in text


@pytest.mark.slow
def test_the_memory_benchmark_runs_each_cell_in_a_process_and_tells(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {f"{part}_y": np.repeat(np.arange(4, dtype=np.uint8), 8) for part in ("train", "test")}
    arrays |= {f"{part}_x": random.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "cifar100.npz", allow_pickle=False, class_names=np.array([*"abcd"]), **arrays)
    small: dict[str, Any] = {"images": 8, "batch_size": 8, "epochs": 1, "generator_steps": 2}
    chosen = [memory.Cell("budget", "resnet32", 32, budget=budget, **small) for budget in ("16MB", None)]
    chosen += [memory.Cell("restarted", "resnet32", 32, **small)]

    said: list[str] = []
    found = memory.run(chosen, tmp_path, tmp_path, said.append)
    assert said == [cell.key for cell in chosen]
    refused, free, restarted = (found["cells"][cell.key] for cell in chosen)
    assert "nothing was trained" in refused["refused"] and not refused["tasks"]
    assert len(free["tasks"]) == 2 and free["tasks"][1]["kernel_peak"] > 0
    assert [task["accuracy"] for task in restarted["tasks"]] == [task["accuracy"] for task in free["tasks"]]
    assert memory.run(chosen, tmp_path, tmp_path, said.append) == found and len(said) == 3, "finished cells are not run again"

    full, short = memory_tables.describe(found), memory_tables.summary(found)
    assert "| resnet32, 32 px | 16MB | refused: 'learn' needs" in full
    assert "| resnet32, 32 px | refused |" in short and "(1.00) |" in short
    assert "| resnet32, 32 px, a process per task | none |" in full


def test_a_task_that_failed_and_a_run_above_its_budget_are_told() -> None:
    stage = {"name": "learn", "peak_bytes": 100, "seconds": 2.0, "steps": 4, "at_once": 8}
    task = {"kernel_peak": 130e6, "planned_peak": 100, "stages": [stage], "accuracy": 0.5}
    done = {"tasks": [task], "kept": {"model": 1, "more": 0}}
    cells = {
        "budget resnet32 32 abd 128MB 0": done,
        "budget resnet32 32 abd 128MB 1": {"refused": "stage 'learn' needs 2 GB even so", "tasks": []},
        "budget resnet32 32 abd 192MB 0": {"failed": "took more", "tasks": []},
        "budget resnet32 32 abd None 0": done,
    }
    full = memory_tables.describe({"cells": cells, "machine": {"processor": "x", "threads": 1}, "versions": {"torch": "2"}})
    assert "| 130 | 0 of 1, 1 refused |" in full
    assert "failed while learning: took more" in full
    short = memory_tables.summary({"cells": cells})
    assert "within the budget in 0 of the 1 runs" in short
    assert "|  |  | 130 (1.00), 1 of 2 refused | failed |" in short, "a cell that was not run is empty, not refused"


def test_few_images_has_a_row_for_each_method_that_was_run_with_few() -> None:
    found = report.read(accuracy.RESULTS)
    whole, few = "edge-5x4", "edge-5x4-per_class=150"
    name, results = next(iter(found[few].items()))
    others = {other: runs for other, runs in found[whole].items() if other != name}
    assert others
    rows = [
        row for row in report.few_images({whole: others, few: {name: results}}).splitlines() if row.startswith(f"| {whole} |")
    ]
    assert len(rows) == 1 and f"| {name} | {report.marked(results)} |" in rows[0]


def test_a_preset_with_few_images_of_other_data_has_a_section_of_its_own() -> None:
    """It is no row beside the preset, which has other classes."""
    methods = report.read(accuracy.RESULTS)["edge-5x4-per_class=150"]
    other = "edge-5x4-dataset=sign_digits-per_class=150"
    assert report.has_section(other) and not report.has_section("edge-5x4-per_class=150")
    assert report.few_images({other: methods}) == ""


def test_committed_figures_come_from_committed_files() -> None:
    """The README of the results equals what the report makes from them now."""
    text = (accuracy.RESULTS / "README.md").read_text()
    found = report.read(accuracy.RESULTS)
    assert report.few_images(found) in text
    assert images.describe(json.loads((accuracy.RESULTS / images.FILE).read_text())) in text
    assert report.imbalanced(found) in text
    assert candidates.describe(found) in text
    for protocol, methods in found.items():
        if not report.has_section(protocol):
            continue
        assert f"## {protocol}" in text
        assert report.table(accuracy.RESULTS, methods) in text


@pytest.mark.slow
def test_photographs_of_many_sizes_are_compared_with_the_learners_answers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in "01234":
        (tmp_path / "test" / name).mkdir(parents=True)
        for number in range(2):
            picture = Image.fromarray(random.integers(0, 256, (20, 20, 3)).astype(np.uint8))
            picture.save(tmp_path / "test" / name / f"{number}.png")
    golden = Path(__file__).parent / "golden" / "schema1" / "cifar.safetensors"
    sizes = ((16, 16), (24, 40), (90, 17))
    found = images.run(tmp_path, golden, lambda line: None, sizes, per_size=5)
    assert found["photographs"] == 15
    assert {"Pillow BILINEAR, squeezed", "Pillow BICUBIC, scaled and cropped"} < set(found["ways"])
    for way in (images.GRAPH, images.CLASSIFIER):
        assert found["ways"][way]["same"] == 1
        assert list(found["ways"][way]["largest_by_size"]) == ["16 x 16", "24 x 40", "90 x 17"]
    assert "15 photographs of 3 sizes, 16 x 16 to 90 x 17" in images.describe(found)
    picture = Image.fromarray(random.integers(0, 256, (20, 20, 3)).astype(np.uint8))
    assert images.photograph(picture, 90, 17).size == (17, 90)


def of_colours(folder: Path) -> accuracy.Protocol:
    """Eight classes that differ by their colour, in four tasks."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    colours = random.integers(0, 200, (8, 1, 1, 3))
    for part, per_class in (("train", 16), ("test", 8)):
        arrays[f"{part}_y"] = np.repeat(np.arange(8, dtype=np.uint8), per_class)
        noise = random.integers(0, 56, (8 * per_class, 16, 16, 3))
        arrays[f"{part}_x"] = (colours[arrays[f"{part}_y"]] + noise).astype(np.uint8)
    np.savez(folder / "cifar100.npz", allow_pickle=False, class_names=np.array([*"abcdefgh"]), **arrays)
    return accuracy.Protocol("tiny", 8, 4, "resnet8", "edge", image_size=16, batch_size=8)


@pytest.mark.slow
def test_an_audit_is_made_with_and_without_class_statistics(tmp_path: Path) -> None:
    protocol, short = of_colours(tmp_path), QUICK | {"pool": 64}
    for recipe in audits.RECIPES.split(","):
        found = audits.run(protocol, recipe, 0, load(tmp_path), tmp_path, "cpu", short)
        names = [one["name"] for one in found["audit"]["attacks"]]
        assert ("class statistics" in names) == (recipe == "frozen")
        assert (found["audit"]["members"], found["audit"]["others"]) == (128, 64) and found["commit"]
        assert audits.run(protocol, recipe, 0, load(tmp_path), tmp_path, "cpu", short) == found, "from its file"
    assert "| tiny | strict-" in audits.describe(tmp_path) and ", version 2 |" in audits.describe(tmp_path)
    assert "What models reveal" in report.write(tmp_path)


def test_rejection_is_measured_on_classes_that_were_not_learnt(tmp_path: Path) -> None:
    protocol = of_colours(tmp_path)
    found = rejection.run(protocol, 0, load(tmp_path), tmp_path, "cpu", QUICK)
    assert found["classes"] == {"known": 4, "unseen": 4}
    assert set(found["auroc"]) == set(rejection.KINDS)
    assert len(found["false_rejections_by_task"]) == 2
    assert 0 <= found["ece_after"] <= 1 and found["commit"]
    assert rejection.run(protocol, 0, load(tmp_path), tmp_path, "cpu", QUICK) == found, "from its file"
    assert "| tiny | 0 | 4, 4 |" in rejection.describe(tmp_path)
    assert "Rejection and calibration" in report.write(tmp_path)
