"""Short runs of `tests.rubbish`, and the faults that longer ones found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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


@pytest.mark.parametrize("top_k", [0, -1, True, 1.5, "1", None, torch.ones(2), [1]])
def test_a_top_k_that_is_no_whole_number_is_refused_alike(learnt: Learner, top_k: Any) -> None:
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(SettingError, match="top_k="):
        learnt.predict(images, top_k)
    with pytest.raises(SettingError, match="top_k="):
        OnnxClassifier(rubbish.GOLDEN / "closed_form-any.onnx").predict(images, top_k)


def test_numbers_of_numpy_are_whole_numbers(learnt: Learner) -> None:
    assert len(learnt.predict(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), np.int64(2))[0].top) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [[], {}, {"x"}, np.ones(3), torch.ones(3), object()])
def test_what_cannot_be_compared_with_a_name_is_refused_as_one(learnt: Learner, value: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no method is called"):
        quick_learner(method=value)
    with pytest.raises(SettingError, match="no recipe is called"):
        quick_learner(recipe=value)
    for keyword in ("format", "quantize", "input"):
        with pytest.raises(ExportError, match=f"{keyword}="):
            learnt.export(tmp_path / "m.onnx", progress=False, **{keyword: value})
    with pytest.raises(SettingError, match="quality="):
        learnt.dream(1, quality=value, progress=False)
    with pytest.raises(ClassError, match="class names are strings"):
        learnt.merge(["0", value], "a")
    with pytest.raises(ClassError, match="must be a string"):
        learnt.merge(["0"], value)


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
