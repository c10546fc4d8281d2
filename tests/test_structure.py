"""The diagram of the imports: cycles are found in every form of import, and every part is drawn."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest

from docs import structure


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of two folders, the upper of which imports the lower."""
    root = tmp_path / f"toy_{tmp_path.name.replace('-', '_')}"  # another name each time: imports are cached
    for name, text in (("upper", f"from {root.name}.lower import low\n"), ("lower", "")):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text(text)
    (root / "__init__.py").write_text("")
    (root / "lower" / "low.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return root


def test_a_package_without_a_cycle_has_none(package: Path) -> None:
    graph = structure.imports(package.name)
    assert set(graph.edges) == {("upper", "lower")}
    assert structure.cycle(graph) == []


@pytest.mark.parametrize(
    "hidden",
    [
        "from {0}.upper import x",
        "def f():\n    import {0}.upper",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {0}.upper import x",
    ],
)
def test_a_cycle_is_named_and_ends_the_command_with_1(hidden: str, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "lower" / "low.py").write_text(hidden.format(package.name))
    assert structure.main(package.name) == 1
    said = capsys.readouterr().err
    assert f"{package.name}.lower.low imports {package.name}.upper" in said
    assert f"{package.name}.upper imports {package.name}.lower" in said


def test_every_public_part_is_drawn(tmp_path: Path) -> None:
    graph = structure.imports("edge_dfcil")
    drawn = [name for name in graph if name[0] != "_"]
    assert {"learner", "methods", "dreaming", "training", "model"} <= set(drawn)
    picture = tmp_path / "a.svg"
    structure.draw(graph, picture)
    text = picture.read_text()
    assert all(f"<!-- {name} -->" in text for name in drawn)
    structure.draw(nx.DiGraph(graph), tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_bytes() == picture.read_bytes(), "the same imports give the same file"
