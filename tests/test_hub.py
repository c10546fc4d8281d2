"""Folders and repositories of the Hugging Face Hub: what is written, what is loaded, and the errors.

The real client talks to a fake Hub on localhost, so that no test needs the network.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard, constants

from edge_dfcil import HubError, Learner, Model, ModelFileError, NotLearnedError, SettingError
from edge_dfcil.cli import main
from edge_dfcil.demo import Batches
from edge_dfcil.privacy.account import account
from exporters import OnnxClassifier
from tests.conftest import NAMES, quick_learner
from tests.golden.make import own_classifier
from tests.hub import COMMIT, TOKEN, Hub
from tests.test_cli import folder_of

REPO = "someone/digits"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The fake Hub, set as the one that `huggingface_hub` uses, with a cache and a token of this test."""
    with Hub() as found:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def same_answers(one: Any, other: Any, images: torch.Tensor) -> bool:
    return one.classes == other.classes and torch.equal(one.probabilities(images), other.probabilities(images))


def card_of(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


class TestAFolder:
    def test_it_gives_back_what_was_saved(self, learnt: Learner, test: Batches, tmp_path: Path) -> None:
        folder = learnt.save_pretrained(tmp_path / "a" / "digits")
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "README.md"}
        for found in (Model.from_pretrained(folder), Model.from_pretrained(str(folder / "model.safetensors"))):
            assert same_answers(found, learnt, test.images)
        learner = Learner.from_pretrained(folder, device="cpu", memory_budget="1GB")
        assert learner.recipe == learnt.recipe
        assert learner.memory_budget == 10**9

    def test_a_second_call_replaces_what_the_first_wrote(self, learnt: Learner, tmp_path: Path) -> None:
        learnt.save_pretrained(tmp_path)
        (tmp_path / "model.onnx").write_text("as an earlier call with onnx= wrote it")
        learnt.rename({"0": "zero"})
        learnt.save_pretrained(tmp_path)
        assert Model.from_pretrained(tmp_path).classes == ("zero", "1")
        assert not (tmp_path / "model.onnx").exists(), "it belongs to the earlier model"
        assert "| zero |" in card_of(tmp_path).text

    @pytest.mark.slow
    def test_the_onnx_file_is_the_model(self, learnt: Learner, test: Batches, tmp_path: Path) -> None:
        learnt.save_pretrained(tmp_path, onnx="any")
        found = OnnxClassifier(tmp_path / "model.onnx").predict(test.images[:8].numpy())
        assert [one.label for one in found] == [one.label for one in learnt.predict(test.images[:8])]
        assert "images of every size" in card_of(tmp_path).text

    def test_nothing_is_written_before_the_first_task(self, tmp_path: Path) -> None:
        with pytest.raises(NotLearnedError):
            quick_learner().save_pretrained(tmp_path / "empty")
        assert not (tmp_path / "empty").exists()

    def test_an_evaluation_of_other_classes_is_refused(self, learnt: Learner, test: Batches, tmp_path: Path) -> None:
        evaluation = learnt.evaluate(test.of(("0", "1")), NAMES)
        learnt.rename({"0": "zero"})
        with pytest.raises(SettingError, match="what evaluate"):
            learnt.save_pretrained(tmp_path / "other", evaluation=evaluation)
        assert not (tmp_path / "other").exists()

    def test_a_folder_that_cannot_be_made(self, learnt: Learner, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ModelFileError, match="cannot be created"):
            learnt.save_pretrained(tmp_path / "file" / "folder")

    @pytest.mark.parametrize("name", ["missing.safetensors", "a/b/c", "folder"])
    def test_what_is_not_there_and_no_name_of_a_repository(self, name: str, tmp_path: Path, hub: Hub) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(ModelFileError, match="is not a file"):
            Model.from_pretrained(str(tmp_path / name) if name == "folder" else name)
        assert not hub.requests

    def test_a_path_object_is_never_a_repository(self, hub: Hub) -> None:
        with pytest.raises(ModelFileError, match="is not a file"):
            Model.from_pretrained(Path(REPO))
        assert not hub.requests


class TestTheCard:
    def test_it_states_classes_accuracy_and_metadata(self, learnt: Learner, test: Batches, tmp_path: Path) -> None:
        evaluation = learnt.evaluate(test.of(("0", "1")), NAMES)
        about: Any = {"description": "Digits of mine.", "license": "apache-2.0"}
        card = card_of(learnt.save_pretrained(tmp_path, evaluation=evaluation, **about))
        assert card.data.library_name == "edge-dfcil"
        assert card.data.pipeline_tag == "image-classification"
        assert card.data.license == "apache-2.0"
        assert "Digits of mine." in card.text
        assert f"Accuracy {evaluation.accuracy:.1%} on {evaluation.n} images" in card.text
        for name, accuracy in evaluation.per_class.items():
            assert f"| {name} | 1 | {100 * accuracy:.1f} |" in card.text

    def test_it_says_what_was_not_measured(self, learnt: Learner, tmp_path: Path) -> None:
        card = card_of(learnt.save_pretrained(tmp_path))
        assert "accuracy was not measured" in card.text
        assert "no thresholds" in card.text
        assert card.data.license is None

    @pytest.mark.slow
    def test_its_account_is_that_of_inspect(self, train: Batches, tmp_path: Path) -> None:
        learner = quick_learner(method="lda")
        learner.learn_task(train.of(("0", "1")), NAMES, progress=False)
        card = card_of(learner.save_pretrained(tmp_path))
        shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "model.safetensors"), "--json"])
        kept = json.loads(shown.stdout)["kept"]
        assert "class_mean" in kept
        for kind, count in kept.items():
            assert re.search(rf"\| {kind.replace('_', ' ')} \| \d+ \| {count} \| (yes|no) \|", card.text)
        model = learner.model
        assert sum(kept.values()) == sum(one.bytes for one in account(model.tensors(), model.settings()))
        assert model.digest() in card.text

    def test_its_promises_are_those_of_the_package(self, learnt: Learner, tmp_path: Path) -> None:
        text = card_of(learnt.save_pretrained(tmp_path)).text
        assert "derived from the images" in text
        assert "No differential privacy is claimed" in text
        assert str(tmp_path.parent) not in text, "a local path"

    def test_names_are_shown_as_they_are(self, learnt: Learner, tmp_path: Path) -> None:
        learnt.rename({"0": "a|b_[c]*<d>"})
        assert r"| a\|b\_\[c\]\*\<d\> | 1 |" in card_of(learnt.save_pretrained(tmp_path)).text

    def test_merged_classes_stand_in_the_task_that_brought_them_first(self, learnt: Learner, tmp_path: Path) -> None:
        learnt._replace(replace(learnt.model, tasks=(("0",), ("1",))))
        learnt.merge(["0", "1"], into="digit")
        assert "| digit | 1 | - |" in card_of(learnt.save_pretrained(tmp_path)).text

    @pytest.mark.filterwarnings("ignore:.*statistics that were never learnt")
    def test_a_backbone_of_ones_own_is_named(self, tmp_path: Path) -> None:
        module = own_classifier()
        learner = Learner.from_classifier(module, ["cat", "dog", "bird"], image_size=16, device="cpu")
        text = card_of(learner.save_pretrained(tmp_path)).text
        assert f'Model.from_pretrained("{tmp_path.name}", backbone=module)' in text
        assert Model.from_pretrained(tmp_path, backbone=module).classes == ("cat", "dog", "bird")


class TestTheHub:
    @pytest.mark.slow
    def test_an_onnx_file_is_pushed_on_request(self, learnt: Learner, hub: Hub) -> None:
        learnt.push_to_hub(REPO, onnx="fixed")
        assert set(hub.files[REPO]) == {"model.safetensors", "README.md", "model.onnx"}
        assert "squares of 16 pixels" in hub.files[REPO]["README.md"].decode()

    def test_what_is_pushed_is_what_is_loaded(self, learnt: Learner, test: Batches, hub: Hub) -> None:
        assert learnt.push_to_hub(REPO) == f"{hub.url}/{REPO}/commit/{COMMIT}"
        assert set(hub.files[REPO]) == {"model.safetensors", "README.md"}
        assert hub.private[REPO] is True
        assert hub.messages == ["Push a model of 2 classes"]
        assert same_answers(Model.from_pretrained(REPO), learnt, test.images)
        assert Learner.from_pretrained(REPO, revision=COMMIT).recipe == learnt.recipe

    def test_a_second_push_replaces_the_first(self, learnt: Learner, hub: Hub) -> None:
        learnt.push_to_hub(REPO, private=False)
        hub.files[REPO]["model.onnx"] = b"as a push with onnx= wrote it"
        learnt.rename({"0": "zero"})
        learnt.push_to_hub(REPO, message="Call it zero")
        assert set(hub.files[REPO]) == {"model.safetensors", "README.md"}, "the ONNX file belonged to the earlier model"
        assert hub.private[REPO] is False, "the visibility is unchanged"
        assert hub.messages[1] == "Call it zero"
        assert Model.from_pretrained(REPO).classes == ("zero", "1")

    def test_the_code_of_the_card_runs(self, learnt: Learner, hub: Hub, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
        learnt.push_to_hub(REPO)
        (code,) = re.findall(r"```python\n(.*?)```", hub.files[REPO]["README.md"].decode(), re.S)
        folder_of(tmp_path, Batches(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)), ("0",))
        (tmp_path / "0" / "0.png").rename(tmp_path / "photo.jpg")
        monkeypatch.chdir(tmp_path)
        exec(compile(code, "README.md", "exec"), {})
        assert "Prediction(" in capsys.readouterr().out

    def test_no_telemetry(self, learnt: Learner, hub: Hub) -> None:
        learnt.push_to_hub(REPO)
        Model.from_pretrained(REPO)
        assert not [path for _, path in hub.requests if "telemetry" in path or "agent" in path]
        assert all("torch/" not in agent and "edge-dfcil/" in agent for agent in hub.agents if "hf_hub" in agent)

    @pytest.mark.parametrize(
        ("files", "revision", "says"),
        [
            (None, None, "no such repository.*hf auth login"),
            ({"README.md": b""}, None, "has no model.safetensors"),
            ({"model.safetensors": b"x"}, "v2", "no such revision"),
        ],
    )
    def test_what_the_hub_does_not_have(self, hub: Hub, files: Any, revision: Any, says: str) -> None:
        if files is not None:
            hub.files[REPO] = files
        with pytest.raises(HubError, match=f"{REPO} is not a local path.*{says}"):
            Model.from_pretrained(REPO, revision=revision)

    def test_a_damaged_download_is_not_loaded(self, learnt: Learner, hub: Hub) -> None:
        learnt.push_to_hub(REPO)
        content = bytearray(hub.files[REPO]["model.safetensors"])
        content[-1] ^= 1
        hub.files[REPO]["model.safetensors"] = bytes(content)
        with pytest.raises(ModelFileError, match="damaged"):
            Model.from_pretrained(REPO)

    def test_offline_the_cache_answers(self, learnt: Learner, test: Batches, hub: Hub, monkeypatch: Any) -> None:
        learnt.push_to_hub(REPO)
        Model.from_pretrained(REPO)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        asked = len(hub.requests)
        assert same_answers(Model.from_pretrained(REPO), learnt, test.images)
        with pytest.raises(HubError, match="cannot be reached, and the cache has no copy"):
            Model.from_pretrained("someone/other")
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            learnt.push_to_hub(REPO)
        assert len(hub.requests) == asked

    def test_a_push_that_is_refused(self, learnt: Learner, hub: Hub, monkeypatch: Any) -> None:
        with pytest.raises(HubError, match=r"does not permit this.*status 401"):
            learnt.push_to_hub(REPO, token="hf_wrong")
        with pytest.raises(HubError, match="name a repository as owner/name"):
            learnt.push_to_hub("a/b/c")
        hub.refuses = 400
        with pytest.raises(HubError, match="status 400"):
            learnt.push_to_hub(REPO)
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match=r"no token.*hf auth login"):
            learnt.push_to_hub(REPO)
        assert not hub.files

    def test_without_the_extra(self, learnt: Learner, hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        for call in (
            lambda: learnt.save_pretrained(tmp_path / "folder"),
            lambda: learnt.push_to_hub(REPO),
            lambda: Model.from_pretrained(REPO),
        ):
            with pytest.raises(SettingError, match=r"pip install 'edge-dfcil\[hub\]'"):
                call()
        assert not (tmp_path / "folder").exists()
        path = learnt.save(tmp_path / "model.safetensors")
        assert Model.from_pretrained(path.parent).classes == learnt.classes, "a folder needs no extra"


class TestTheCommand:
    def test_it_pushes_and_measures(self, learnt: Learner, test: Batches, hub: Hub, tmp_path: Path) -> None:
        model = learnt.save(tmp_path / "model.safetensors")
        images = folder_of(tmp_path / "images", test, ("0", "1"), per_class=4)
        options = ["--public", "--eval", str(images), "--license", "mit", "--description", "Mine.", "--json"]
        done = CliRunner().invoke(main, ["push", str(model), REPO, *options])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout) == {"repository": REPO, "url": f"{hub.url}/{REPO}/commit/{COMMIT}"}
        card: Any = ModelCard(hub.files[REPO]["README.md"].decode())
        assert "on 8 images" in card.text
        assert "Mine." in card.text
        assert card.data.license == "mit"
        assert hub.private[REPO] is False

    def test_an_error_is_one_line(self, learnt: Learner, hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.delenv("HF_TOKEN")
        done = CliRunner().invoke(main, ["push", str(learnt.save(tmp_path / "m.safetensors")), REPO])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: there is no token") and done.stderr.count("\n") == 1
