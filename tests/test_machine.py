"""A result says which commit it was made by."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.machine import commit


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one file of code and one result."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMIT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("edge_dfcil/a.py", "benchmarks/results/a.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit_whatever_the_results(root: Path) -> None:
    (root / "benchmarks" / "results" / "a.json").write_text("2")
    (root / "benchmarks" / "results" / "b.json").write_text("2")
    found = commit(root)
    assert found is not None and re.fullmatch(r"[0-9a-f]{40}", found)


@pytest.mark.parametrize("name", ["edge_dfcil/a.py", "edge_dfcil/new.py"])
def test_changed_or_new_code_is_dirty(root: Path, name: str) -> None:
    clean = commit(root)
    (root / name).write_text("2")
    assert commit(root) == f"{clean}-dirty"


def test_outside_git_it_is_none_or_as_the_environment_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit(root / "edge_dfcil") is None, "the enclosing repository is not that of the code"
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert commit(root / "edge_dfcil") == "abc"
    monkeypatch.setenv("PATH", "")
    assert commit(root) == "abc", "git is not installed"
