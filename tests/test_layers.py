"""The package layout: imports point down, no heavy library is loaded early, and no code can pickle samples."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grimp
import pytest

import edge_dfcil

ROOT = Path(__file__).resolve().parent.parent

# Each may import from those below it in this list, and from itself.
HOUSE = ["demos", "benchmarks", "edge_dfcil", "exporters"]
STANDS_ALONE = "demos.abd_in_one_file"  # imports nothing of ours, so that benchmarks may measure against it
INSIDE = [
    "__main__ cli",
    "demo compression testing",
    "learner",
    "publishing",
    "learning exporting running card",
    "budget",
    "methods",
    "dreaming",
    "training",
    "heads",
    "privacy",
    "model",
    "devices metrics hub",
    "recipe results",
    "settings",
    "errors _version _flat_recipe",
]


def imports(path: Path) -> set[str]:
    """The dotted modules that a file imports, at any depth, those for type checking included."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", HOUSE)
def test_imports_point_down(package: Any) -> None:
    above = HOUSE[: HOUSE.index(package)]
    for path in files(package):
        for name in imports(path):
            if f"{name}.".startswith(f"{STANDS_ALONE}.") or (package == "benchmarks" and name == "demos"):
                continue
            assert name.split(".")[0] not in above, f"{path} imports {name}, which is above it"


def test_the_method_in_one_file_stands_alone() -> None:
    found = imports(ROOT / f"{STANDS_ALONE.replace('.', '/')}.py")
    assert {name.split(".")[0] for name in found}.isdisjoint(HOUSE)


def test_imports_inside_the_package_point_down() -> None:
    layer = {module: depth for depth, modules in enumerate(INSIDE) for module in modules.split()}
    for path in files("edge_dfcil"):
        module = path.relative_to(ROOT / "edge_dfcil").parts[0].removesuffix(".py")
        if module in ("__init__", "_moved", "_deprecated"):
            continue
        assert module in layer, f"{module} is in none of the layers"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "edge_dfcil" and len(parts) > 1 and parts[1] in layer:
                assert layer[parts[1]] >= layer[module], f"{path} imports {name}, which is above it"


def test_no_cycle_between_the_parts_of_the_package() -> None:
    graph = grimp.build_graph("edge_dfcil", cache_dir=None)
    assert graph.nominate_cycle_breakers("edge_dfcil") == set()


def loaded_by(code: str) -> set[str]:
    probe = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import edge_dfcil",
        "import exporters",
        "from edge_dfcil import errors, recipe, results, EdgeDfcilError, Recipe, Prediction",
        "from edge_dfcil.cli import main; main(['--help'], standalone_mode=False)",
        "from edge_dfcil.cli import main; main(['learn', '--help'], standalone_mode=False)",
    ],
)
def test_no_torch_before_it_is_needed(code: str) -> None:
    assert not loaded_by(code) & {"torch", "torchvision", "onnxruntime", "onnx"}


def test_public_names_are_there_and_no_others() -> None:
    assert set(edge_dfcil.__all__) == set(dir(edge_dfcil))
    for name in edge_dfcil.__all__:
        assert getattr(edge_dfcil, name) is not None
    with pytest.raises(AttributeError, match="replay"):
        _ = edge_dfcil.replay


def test_every_error_is_public_and_in_the_family() -> None:
    from edge_dfcil import errors

    family = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert family <= set(edge_dfcil.__all__)
    assert all(issubclass(getattr(edge_dfcil, name), edge_dfcil.EdgeDfcilError) for name in family)


def test_nothing_here_can_pickle() -> None:
    for package in ("edge_dfcil", "exporters"):
        for path in files(package):
            assert not imports(path) & {"pickle", "torch.save", "torch.load", "joblib", "cloudpickle"}, path
            assert "torch.save(" not in path.read_text(), path
            assert "torch.load(" not in path.read_text(), path
