"""The README's blocks run, in order, in one folder: Python here, shell commands in a real shell.

The settings are made quick, not the commands: the `edge` recipe takes a few steps instead of hundreds.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme
from edge_dfcil import recipe
from tests.test_cli import folder_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(python|sh)\n(.*?)^```", README, re.M | re.S)

# The same for the lessons of a smaller model; and whatever a network that has learnt next to nothing answers in INT8 will do.
SHORT = """
from edge_dfcil.compression import distillation, pruning
from exporters import int8
short = {"rounds": 1, "dreams": 32, "generator_steps": 2, "steps": 2, "batch": 16}
for name, value in short.items():
    setattr(distillation.Distillation, name, value)  # what the command line reads
    object.__setattr__(distillation.REPAIR, name, value)
make = distillation.Distillation.__init__
make.__defaults__ = (*short.values(), *make.__defaults__[len(short) :])
int8.AGREEMENT = 0.0
"""
FEW = {
    "schedule.min_steps": 8,
    "schedule.epochs": 1,
    "schedule.first_epochs": 1,
    "generator.steps": 4,
    "generator.width": 8,
    "remember.pool": 64,
    "refine.min_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, train):
    """A new user's folder: two folders of pictures, a photo, and `edge-dfcil` on the path."""
    root = tmp_path_factory.mktemp("readme")
    folder_of(root / "fruit", train, ("0", "1"))
    folder_of(root / "tools", train, ("2", "3"))
    folder_of(root / "toys", train, ("4", "5"))
    (root / "photo.jpg").write_bytes((root / "fruit" / "0" / "0.png").read_bytes())
    command = root / "bin" / "edge-dfcil"
    command.parent.mkdir()
    command.write_text(
        f"#!{sys.executable}\nfrom dataclasses import replace\nfrom edge_dfcil import recipe\n"
        f"recipe.RECIPES['edge'] = recipe.RECIPES['edge'].changed({FEW})\n{SHORT}\nfrom edge_dfcil.cli import main\nmain()\n"
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return root


@pytest.fixture(scope="module")
def namespace():
    return {}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block(number, folder, namespace, monkeypatch):
    language, code = BLOCKS[number]
    if "make " in code or "git clone" in code or "pip install" in code:
        pytest.skip("set-up, which CI does before the tests run")
    monkeypatch.chdir(folder)
    if language == "sh":
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["sh", "-e"], input=code, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.setitem(recipe.RECIPES, "edge", recipe.RECIPES["edge"].changed(FEW))
        exec(compile(code, "README.md", "exec"), namespace)


def test_the_readme_has_blocks_of_both_kinds():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def test_what_the_readme_links_to_is_there():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_is_that_of_the_result_file():
    result = json.loads((ROOT / "docs" / "demo.json").read_text())
    shown = README[README.index("<!-- demo:") : README.index("<!-- /demo -->")]
    for accuracies in result["accuracy_after_task"].values():
        assert " | ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies) in shown
    assert f"{100 * result['final_accuracy']['upper_bound']:.1f}" in shown


@pytest.mark.parametrize("mark", readme.SUMMARIES)
def test_the_figures_are_those_of_the_result_files(mark):
    shown = README[README.index(f"<!-- {mark}:") : README.index(f"<!-- /{mark} -->")]
    assert readme.SUMMARIES[mark](ROOT / "benchmarks" / "results") in shown


def test_the_readme_promises_what_is_true():
    assert "keeps no samples" in README
    assert "derived from" in README, "weights and dreams are derived from data, and it says so"
