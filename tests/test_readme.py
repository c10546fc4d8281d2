"""The README's blocks run, in order, in one folder: Python here, `edge-dfcil` commands through the command line's own parser.

The settings are made quick, not the commands: the `edge` recipe takes a few steps instead of hundreds.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import readme
from edge_dfcil import recipe
from edge_dfcil.cli import main
from edge_dfcil.compression import Distillation, Pruning
from edge_dfcil.compression.distillation import REPAIR
from edge_dfcil.demo import Batches
from tests.test_cli import folder_of

# A reader adopts a network "with your weights in it"; here it has none.
pytestmark = pytest.mark.filterwarnings("ignore:.*nothing to invert")

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", README, re.M | re.S)

FEW = {
    "schedule.min_steps": 40,  # so that the network answers in INT8 as in floats
    "schedule.epochs": 1,
    "schedule.first_epochs": 1,
    "generator.steps": 4,
    "generator.width": 8,
    "remember.pool": 64,
    "refine.min_steps": 2,
}
SHORT: dict[str, Any] = {"rounds": 1, "dreams": 32, "generator_steps": 2, "steps": 2, "batch": 16}


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few steps for all blocks: in the recipe, and in the defaults of the lessons of a smaller model."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("edge", "frozen"):
            patch.setitem(recipe.RECIPES, name, recipe.RECIPES[name].changed(FEW))
        for settings, shorter in ((Distillation, SHORT), (Pruning, {"repair": replace(REPAIR, **SHORT)})):
            for name, value in shorter.items():
                patch.setattr(settings, name, value)
            make: Any = settings.__init__
            defaults = {field.name: value for field, value in zip(fields(settings), make.__defaults__, strict=True)}
            patch.setattr(make, "__defaults__", tuple((defaults | shorter).values()))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, train: Batches) -> Path:
    """A new user's folder: three folders of pictures, and a photo."""
    root = tmp_path_factory.mktemp("readme")
    folder_of(root / "fruit", train, ("0", "1"))
    folder_of(root / "tools", train, ("2", "3"))
    folder_of(root / "toys", train, ("4", "5"))
    (root / "photo.jpg").write_bytes((root / "fruit" / "0" / "0.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    return {}


# They build on each other; commands train, prune and quantize a MobileNetV3, which takes a minute or two.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*statistics that were never learnt")  # a reader has weights of their own there
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number: int, folder: Path, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    language, code = BLOCKS[number]
    if "make " in code or "git clone" in code or "pip install" in code:
        pytest.skip("set-up, which CI does before the tests run")
    monkeypatch.chdir(folder)
    if language == "python":
        exec(compile(code, "README.md", "exec"), namespace)
        return
    for line in code.splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "edge-dfcil", f"no other command runs here: {line}"
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"


def test_the_readme_has_blocks_of_both_kinds() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def test_what_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_is_that_of_the_result_file() -> None:
    result = json.loads((ROOT / "docs" / "demo.json").read_text())
    shown = README[README.index("<!-- demo:") : README.index("<!-- /demo -->")]
    for accuracies in result["accuracy_after_task"].values():
        assert " | ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies) in shown
    assert f"{100 * result['final_accuracy']['upper_bound']:.1f}" in shown


@pytest.mark.parametrize("mark", readme.SUMMARIES)
def test_the_figures_are_those_of_the_result_files(mark: str) -> None:
    shown = README[README.index(f"<!-- {mark}:") : README.index(f"<!-- /{mark} -->")]
    assert readme.SUMMARIES[mark](ROOT / "benchmarks" / "results") in shown


def test_the_readme_promises_what_is_true() -> None:
    assert "keeps no samples" in README
    assert "derived from" in README, "weights and dreams are derived from data, and it says so"
