"""Damaged and hostile files are refused with an error of the package, in bounded memory; `tests.damage` makes longer runs."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_dfcil import EdgeDfcilError, Learner, ModelFileError
from edge_dfcil.model import file
from edge_dfcil.recipe import read_recipe
from exporters import OnnxClassifier
from tests import damage
from tests.attacks.make import ATTACKS
from tests.conftest import slow_but
from tests.damage import Checks, check_valid

QUIET = [HealthCheck.function_scoped_fixture]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(damage.VALUES[:-1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> Checks:
    return Checks(tmp_path_factory.mktemp("damage"))


def test_a_short_run_of_damage(tmp_path: Path) -> None:
    account = damage.run(20, tmp_path, seed=1)
    assert all(account.refused[kind] + account.same[kind] == 20 for kind in damage.KINDS[:4])
    assert all(account.refused.values()) and not any(account.other.values())


@pytest.mark.slow
def test_a_longer_run_of_damage(tmp_path: Path) -> None:
    account = damage.run(1000, tmp_path, seed=2)
    assert not any(account.other.values())


def test_the_files_are_read_as_they_are(checks: Checks) -> None:
    for kind, content in checks.contents.items():
        assert getattr(checks, kind)(content), kind


@pytest.mark.parametrize("mutation", damage.MUTATIONS)
def test_a_mutation_changes_a_file(checks: Checks, mutation: Any) -> None:
    content = checks.contents["recipe"]
    assert any(mutation(content, random.Random(seed)) != content for seed in range(20))


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=QUIET)
@given(
    name=st.sampled_from(("seed", "mean", "std", "tasks", "statistics", "calibration", "recipe", "scales", "method")), value=JSON
)
def test_a_setting_of_any_value_is_valid_or_refused(checks: Checks, name: str, value: Any) -> None:
    path = checks.folder / "h.safetensors"
    try:
        file.write(path, checks.tensors, {**checks.settings, name: value})
        found = Learner.load(path, "cpu")
    except ModelFileError as error:
        damage.check_message(error, path)
    else:
        check_valid(found)


@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_content_of_a_recipe_is_a_recipe_or_refused(checks: Checks, content: bytes) -> None:
    checks.recipe(content)


def open_attack(path: Path) -> None:
    readers: dict[str, Any] = {".onnx": OnnxClassifier, ".json": read_recipe}
    readers.get(path.suffix, lambda path: Learner.load(path, "cpu"))(path)


SLOW = {"backbone-of-gigabytes.safetensors", "backbone-from-a-folder.safetensors"}  # they load torchvision and timm


@pytest.mark.parametrize("name", slow_but(ATTACKS.keys() - SLOW, ATTACKS))
def test_an_attack_is_refused(name: str, tmp_path: Path) -> None:
    path = ATTACKS[name](tmp_path)
    with pytest.raises(EdgeDfcilError) as caught:
        open_attack(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500, "safe to show on a terminal"


def test_every_attack_is_described() -> None:
    described = (Path(__file__).parent / "attacks" / "README.md").read_text()
    assert {line.split("`")[1] for line in described.splitlines() if line.startswith("- `")} == set(ATTACKS)


@pytest.mark.slow
def test_attacks_take_no_memory(tmp_path: Path) -> None:
    """A process that may take at most 700 MB more than after loading a valid model refuses all attacks, too."""
    paths = [str(write(tmp_path)) for write in ATTACKS.values()]
    code = f"""
        import resource
        from pathlib import Path
        from edge_dfcil import EdgeDfcilError
        from tests import damage, test_damage
        from exporters import OnnxClassifier
        test_damage.open_attack(damage.GOLDEN / "closed_form.safetensors")
        OnnxClassifier(damage.GOLDEN / "closed_form-any.onnx")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 700_000_000, used + 700_000_000))
        for path in {paths!r}:
            try:
                test_damage.open_attack(Path(path))
            except EdgeDfcilError as error:
                assert "alloc" not in str(error), error
            else:
                raise SystemExit(path)
        print("refused")
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("the memory of a process cannot be read here")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_the_fuzzer_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.attacks.fuzz", "-runs=2000", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
