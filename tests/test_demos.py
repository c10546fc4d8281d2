"""The demos do what they show. Their recipes are shortened here; the tests check what they print, not how well they learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from demos import adopt_and_ship, camera
from exporters import OnnxClassifier
from tests.conftest import NAMES, QUICK

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "demos" / "first_task.ipynb"
FEW = {name: value for name, value in QUICK.differences().items() if not name.startswith("schedule.adapt")}


@pytest.mark.slow
def test_the_camera_answers_while_it_learns() -> None:
    lines: list[str] = []
    answers = camera.run(camera.RECIPE.changed(FEW), pause=0, after=20, say=lines.append)
    assert list(answers.frames)[-1] == "adapted"
    assert answers.frames["adapted"] >= 20
    assert sum(answers.frames.values()) > 20, "frames were classified before the task had ended"
    assert not any(answers.right.get("before", [])), "a model cannot name what it has not learnt"
    commits = [line for line in lines if line.startswith("frame ")]
    assert [line.split(": ")[1].split()[0] for line in commits] == ["instant", "adapted"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*statistics that were never learnt")
def test_an_adopted_classifier_is_taught_and_shipped(tmp_path: Path) -> None:
    lines: list[str] = []
    found = adopt_and_ship.run(tmp_path, adopt_and_ship.RECIPE.changed(FEW), epochs=1, say=lines.append)
    assert abs(found["onnx"] - found["learner"]) < 0.01, "the file predicts as the model does"
    assert OnnxClassifier(tmp_path / "digits.onnx").classes == tuple(NAMES)
    int8 = tmp_path / "digits.int8.onnx"
    assert int8.exists() == ("onnx-int8" in found)
    # After so little training, it agrees with its INT8 form on enough dreams on some CPUs only.
    assert int8.exists() or "no INT8 file: the INT8 graph gives another answer" in "\n".join(lines)
    assert not int8.exists() or int8.stat().st_size < 0.3 * (tmp_path / "digits.onnx").stat().st_size


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def stored() -> Any:
    """The notebook as it is in the repository, with its outputs."""
    return nbformat.read(NOTEBOOK, as_version=4)


class TestTheNotebook:
    def test_it_was_executed_from_top_to_bottom(self, stored: Any) -> None:
        counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
        assert not [output for output in outputs(stored) if output.output_type == "error"]

    def test_it_shows_progress_and_plots(self, stored: Any) -> None:
        shown = [output.data for output in outputs(stored) if output.output_type == "display_data"]
        assert any("━" in data.get("text/html", "") and "learn" in data["text/plain"] for data in shown)
        assert sum("image/png" in data for data in shown) >= 3

    def test_it_is_small_and_of_no_machine(self, stored: Any) -> None:
        assert NOTEBOOK.stat().st_size < 300_000
        text = json.dumps(stored)
        for path in (str(ROOT), str(Path.home()), "site-packages", "/tmp"):
            assert path not in text
        assert all(output.get("name") != "stderr" for output in outputs(stored))

    @pytest.mark.slow
    def test_it_runs(self, stored: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this checkout, whatever is installed
        notebook = nbformat.from_dict(json.loads(json.dumps(stored)))
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
        assert [output.output_type for output in outputs(notebook)] == [output.output_type for output in outputs(stored)]
        assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
