"""The model file: read back bit for bit, with no undeclared content, and never half written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import edge_dfcil
from edge_dfcil import Learner, ModelFileError
from edge_dfcil.demo import Batches
from edge_dfcil.model import file as storage
from edge_dfcil.privacy import account as privacy
from tests.conftest import same_weights, weights


def test_round_trip_to_the_bit(learnt: Learner, test: Batches, tmp_path: Path) -> None:
    path = learnt.save(tmp_path / "model.safetensors")
    loaded = Learner.load(path, "cpu")
    assert same_weights(weights(learnt), loaded)
    assert torch.equal(loaded.network(test.images), learnt.network(test.images))
    assert (loaded.tasks, loaded.recipe, loaded.seed, loaded.method.name) == (learnt.tasks, learnt.recipe, learnt.seed, "abd")
    assert loaded.settings() == learnt.settings()


@pytest.mark.slow
def test_learning_goes_on_from_a_file_as_from_memory(learnt: Learner, train: Batches, tmp_path: Path) -> None:
    loaded = Learner.load(learnt.save(tmp_path / "m"), "cpu")
    for learner in (learnt, loaded):
        learner.learn_task(train.of(("2", "3")), [*"0123456789"], progress=False)
    assert same_weights(weights(learnt), loaded)


def test_an_untaught_learner_can_be_kept(tmp_path: Path) -> None:
    loaded = Learner.load(Learner("resnet8", image_size=16).save(tmp_path / "m"), "cpu")
    assert loaded.classes == ()


def test_everything_in_the_file_is_accounted_for(learnt: Learner, train: Batches, tmp_path: Path) -> None:
    learnt.learn_task(train.of(("2", "3")), [*"0123456789"], progress=False)
    path = learnt.save(tmp_path / "m")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(metadata) == {"edge_dfcil", "settings"}
    assert set(json.loads(metadata["edge_dfcil"])) == {"schema", "sha256", "kind"}
    assert set(json.loads(metadata["settings"])) == {
        *("version", "backbone", "architecture", "image_size", "mean", "std", "method", "recipe", "seed", "tasks"),
        *("mirrored", "last_task", "statistics", "scales", "spread", "pretrained", "calibration"),
    }
    settings = json.loads(metadata["settings"])
    kept = privacy.account(tensors, settings)
    assert {k.name for k in kept} == set(tensors) == set(learnt.network.state_dict())
    assert {k.kind for k in kept} == {privacy.WEIGHT, privacy.STATISTIC, privacy.COUNTER}
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + sum(k.bytes for k in kept), "bytes that belong to no tensor"
    with pytest.raises(ModelFileError, match="keepsake"):
        privacy.account({**tensors, "keepsake": torch.zeros(1)}, settings)


@pytest.fixture(scope="module")
def content(_learnt: Learner, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return _learnt.save(tmp_path_factory.mktemp("model") / "m").read_bytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_byte_is_noticed(content: Any, tmp_path: Path, data: Any) -> None:
    header = 8 + int.from_bytes(content[:8], "little")
    # Half of the draws fall into the header, which is small but contains all the structure.
    at = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1)))
    flipped = bytes([content[at] ^ data.draw(st.integers(1, 255))])
    path = tmp_path / "m"
    path.write_bytes(content[:at] + flipped + content[at + 1 :])
    with pytest.raises(ModelFileError):
        storage.read(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_is_noticed(content: Any, tmp_path: Path, data: Any) -> None:
    path = tmp_path / "m"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ModelFileError):
        storage.read(path)


def test_foreign_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is not a file"):
        Learner.load(tmp_path / "nothing")
    with pytest.raises(ModelFileError, match="is not a file"):
        Learner.load(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelFileError, match="not an edge-dfcil model file"):
        Learner.load(tmp_path / "text")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ModelFileError, match="did not write it"):
        Learner.load(tmp_path / "other")


def test_a_later_schema_and_a_stranger_in_the_settings_are_told(
    learnt: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SCHEMA", 99)
    path = learnt.save(tmp_path / "m")
    monkeypatch.undo()
    with pytest.raises(ModelFileError, match="schema 99"):
        Learner.load(path)
    with pytest.raises(ModelFileError, match="does not fit"):
        Learner.load(storage.write(tmp_path / "n", learnt.network.state_dict(), {"backbone": "resnet8"}))
    with pytest.raises(ModelFileError, match="does not fit"):
        Learner.load(storage.write(tmp_path / "o", learnt.network.state_dict(), {**learnt.settings(), "backbone": "resnet20"}))


def test_no_such_folder(learnt: Learner, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="make it first"):
        learnt.save(tmp_path / "nowhere" / "m")


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_file(learnt: Learner, tmp_path: Path) -> None:
    """A real process whose files may not grow past 64 KiB, as on a full disk."""
    path = learnt.save(tmp_path / "m")
    before = path.read_bytes()
    code = f"""
        import resource, signal
        from edge_dfcil import Learner, ModelFileError
        learner = Learner.load({str(path)!r}, "cpu")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            learner.save({str(path)!r})
        except ModelFileError as error:
            print("refused:", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "refused:" in done.stdout
    assert "unchanged" in done.stdout
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    path = storage.write(tmp_path / "c", {"a": torch.zeros(2)}, {}, kind="checkpoint")
    assert storage.read(path, kind="checkpoint")[1] == {}
    with pytest.raises(ModelFileError, match="is a checkpoint, not a model"):
        storage.read(path)
    with pytest.raises(ModelFileError, match="is a model, not a checkpoint"):
        storage.read(storage.write(tmp_path / "m", {}, {}), kind="checkpoint")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    about=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["schema", "sha256", "kind"]), inner),
    ),
    written=st.text(max_size=8) | st.just("[" * 100_000) | st.just("9" * 10_000),
)
def test_any_header_ends_in_a_message(tmp_path: Path, about: Any, written: str) -> None:
    for metadata in (
        {"edge_dfcil": json.dumps(about), "settings": written},
        {"edge_dfcil": written, "settings": "{}"},
        {"edge_dfcil": json.dumps({"schema": 2, "sha256": about, "kind": "model"}), "settings": written},
    ):
        save_file({"a": torch.zeros(2)}, tmp_path / "m", metadata)
        with pytest.raises(ModelFileError):
            storage.read(tmp_path / "m")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_tensors_of_any_dtype_come_back(tmp_path: Path, dtype: Any) -> None:
    tensors = {"scalar": torch.ones((), dtype=dtype), "empty": torch.ones(0, 3, dtype=dtype), "m": torch.ones(2, 3, dtype=dtype)}
    found, _ = storage.read(storage.write(tmp_path / "m", tensors, {}))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == dtype for name in tensors)


def test_a_later_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SCHEMA", 99)
    path = storage.write(tmp_path / "m", {}, {"version": "7.8.9"})
    monkeypatch.undo()
    with pytest.raises(ModelFileError, match=rf"edge-dfcil 7\.8\.9; this is edge-dfcil {edge_dfcil.__version__}"):
        storage.read(path)


@pytest.mark.parametrize("settings", [{"tasks": [["caf\udce9"]]}, {"x": object()}, {"caf\udce9": 1}])
def test_settings_that_cannot_be_stored_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match="cannot be stored") as caught:
        storage.write(tmp_path / "m", {}, settings)
    str(caught.value).encode()
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_name_is_not_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    path = storage.write(folder / "m", {"a": torch.zeros(2)}, {})
    assert storage.digest_of(path) is not None
    assert list(storage.read(path)[0]) == ["a"]
