"""A short run of `tests.rubbish`, and the faults that longer ones found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edge_dfcil import ClassError, DataError, ExportError, Learner, ModelFileError, SettingError
from exporters import OnnxClassifier
from tests import rubbish
from tests.conftest import quick_learner


@pytest.mark.slow
def test_a_short_run_of_rubbish(tmp_path: Path) -> None:
    account = rubbish.run(36, tmp_path, seed=1)
    assert sum(account.succeeded.values()) + sum(account.refused.values()) == 36
    assert account.refused and not account.unexplained


@pytest.mark.slow
def test_a_longer_run_of_rubbish(tmp_path: Path) -> None:
    assert not rubbish.run(500, tmp_path, seed=2).unexplained


@pytest.mark.parametrize("path", [object(), None, ["m"], {}, 3])
def test_what_is_no_path_is_refused(learnt: Learner, path: Any) -> None:
    with pytest.raises(ModelFileError, match="path="):
        learnt.save(path)
    with pytest.raises(ModelFileError, match="path="):
        Learner.load(path)
    with pytest.raises(ExportError, match="path="):
        OnnxClassifier(path)
    with pytest.raises(ExportError, match="path="):
        learnt.export(path, progress=False)


def test_names_that_are_no_names_are_refused(learnt: Learner) -> None:
    before = learnt.model
    with pytest.raises(ClassError, match="old name"):
        learnt.rename(["0", "1"])  # type: ignore[arg-type]
    with pytest.raises(ClassError, match="a list of class names"):
        learnt.forget(3)  # type: ignore[arg-type]
    assert learnt.model is before


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(DataError):
        OnnxClassifier(rubbish.GOLDEN / "closed_form-any.onnx").predict(endless)


@pytest.mark.parametrize("settings", [{"device": "meta"}, {"memory_budget": 10**400}])
def test_settings_beyond_any_machine_are_refused(settings: Any) -> None:
    with pytest.raises(SettingError):
        quick_learner(**settings)


def test_nested_tensors_are_refused(learnt: Learner) -> None:
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([torch.zeros(3, 16, 16)])
    images = [nested, torch.zeros(3, 16, 16)]
    with pytest.raises(DataError, match="nested"):
        learnt.learn_task([(images, torch.zeros(2, dtype=torch.long))], ["5"], progress=False)
