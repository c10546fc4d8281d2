"""Two wheels that share no file: the runtime installs and answers without torch, and edge-dfcil adds its files beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import exporters
from edge_dfcil import ExportError, Learner, __version__
from tests.test_layers import imports

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden" / "schema1"
WHOLE = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = tomllib.loads((ROOT / "exporters" / "pyproject.toml").read_text())
OF_RUNTIME: list[str] = RUNTIME["tool"]["hatch"]["build"]["only-include"]
# Outside of Python and of its own files, the runtime imports these, the last two for pictures given as files.
LIBRARIES = {"numpy", "onnxruntime", "PIL", "pillow_heif"}

# What is listed


def test_no_file_of_exporters_is_in_both_distributions() -> None:
    excluded = set(WHOLE["tool"]["hatch"]["build"]["exclude"])
    about = {"LICENSE", "README.md", "pyproject.toml"}
    assert excluded == {f"/exporters/{name}" for name in about | set(OF_RUNTIME)}
    assert all((ROOT / "exporters" / name).is_file() for name in OF_RUNTIME)


@pytest.mark.parametrize("name", [name for name in OF_RUNTIME if name.endswith(".py") and name != "__init__.py"])
def test_the_runtime_imports_only_its_own_files_and_its_libraries(name: str) -> None:
    own = {f"exporters.{Path(other).stem}" for other in OF_RUNTIME}
    for module in imports(ROOT / "exporters" / name):
        first = module.split(".")[0]
        ours = module == "exporters" or any(f"{module}.".startswith(f"{other}.") for other in own)
        assert ours if first == "exporters" else first in LIBRARIES | sys.stdlib_module_names, f"{name} imports {module}"


def test_both_have_one_version_and_one_set_of_requirements() -> None:
    ours, theirs = RUNTIME["project"], WHOLE["project"]
    assert ours["version"] == __version__
    assert f"edge-dfcil-runtime=={__version__}" in theirs["dependencies"]
    assert {*ours["dependencies"], *ours["optional-dependencies"]["pillow"]} <= set(theirs["dependencies"])
    assert ours["requires-python"] == theirs["requires-python"]
    assert (ROOT / "exporters" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_a_name_that_needs_torch_says_so_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "exporters.onnx", None)
    monkeypatch.delattr(exporters, "onnx", raising=False)
    for name in ("onnx", "export_onnx"):
        with pytest.raises(ExportError, match=r"exporters\.onnx is not installed.*torch.*pip install edge-dfcil"):
            getattr(exporters, name)
    with pytest.raises(AttributeError, match="onyx"):
        _ = exporters.onyx


# What is built


def called(*command: Any, cwd: Path = ROOT) -> str:
    """What a command prints, run without this checkout on its search path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels by the name of their distribution, as `make wheels` builds them."""
    folder = tmp_path_factory.mktemp("dist")
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    probe = ("-m", "pip", "download", "--retries", "0", "--timeout", "20", "--no-deps", "--dest", str(folder / "probe"))
    found = subprocess.run([sys.executable, *probe, "hatchling", "build", "twine"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"no package index is reachable: {(found.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    said = called("make", "wheels", f"DIST={folder}", f"PYTHON={sys.executable}")
    assert said.count("PASSED") == 4, said  # twine on two sdists and two wheels
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


class Environment:
    """A virtual environment with a wheel in it. Its Python sees neither this checkout nor the libraries of the tests."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        called(sys.executable, "-m", "venv", folder)
        self.folder, self.python = folder, folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        self.install(wheel)

    def install(self, *arguments: Any) -> None:
        called(self.python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *arguments)

    def answer(self, code: str) -> Any:
        """What a program prints as JSON."""
        return json.loads(called(self.python, "-I", "-c", textwrap.dedent(code), cwd=self.folder))


@pytest.fixture(scope="module")
def alone(wheels: dict[str, Path]) -> Iterator[Environment]:
    with tempfile.TemporaryDirectory() as folder:
        yield Environment(Path(folder), wheels["edge-dfcil-runtime"])


@pytest.fixture
def with_pillow(alone: Environment, wheels: dict[str, Path]) -> Environment:
    alone.install(f"{wheels['edge-dfcil-runtime']}[pillow]")
    return alone


@pytest.fixture
def both(wheels: dict[str, Path]) -> Iterator[Environment]:
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder), wheels["edge-dfcil-runtime"])
        environment.install("--no-deps", wheels["edge-dfcil"])
        yield environment


def metadata(wheel: Path) -> tuple[set[str], Message]:
    """The files and the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        return names, message_from_bytes(opened.read(next(name for name in names if name.endswith("/METADATA"))))


def photographs(folder: Path) -> list[Path]:
    """Photographs of 3,000 x 2,000 pixels, and of 2,000 x 3,000."""
    found = []
    for name in ("china", "flower"):
        photo = Image.fromarray(load_sample_image(f"{name}.jpg")).resize((3000, 2000), Image.Resampling.BICUBIC)
        for number, shown in enumerate((photo, photo.transpose(Image.Transpose.ROTATE_90))):
            found.append(folder / f"{name}{number}.jpg")
            shown.save(found[-1], quality=95)
    return found


@pytest.mark.slow
def test_the_wheels_share_no_file_and_one_requires_the_other(wheels: dict[str, Path]) -> None:
    (files, runtime), (others, whole) = metadata(wheels["edge-dfcil-runtime"]), metadata(wheels["edge-dfcil"])
    assert not files & others
    assert {name for name in files if name.startswith("exporters/")} == {f"exporters/{name}" for name in OF_RUNTIME}
    assert {name for name in files | others if name.startswith("exporters/") and name.endswith(".py")} == {
        str(path.relative_to(ROOT)) for path in (ROOT / "exporters").glob("*.py")
    }
    assert f"edge-dfcil-runtime=={runtime['Version']}" in whole.get_all("Requires-Dist", [])
    for about in (runtime, whole):
        assert about["Version"] == __version__
        assert about["Summary"] and about["License-Expression"] == "Apache-2.0"
        assert str(about.get_payload()).startswith(f"# {about['Name']}\n")


@pytest.mark.slow
def test_the_runtime_alone_answers_photographs_as_the_learner_does(with_pillow: Environment, tmp_path: Path) -> None:
    paths = photographs(tmp_path)
    found = with_pillow.answer(f"""
        import importlib.util, json, sys
        from exporters import OnnxClassifier
        classifier = OnnxClassifier({str(GOLDEN / "cifar.onnx")!r}, threads=1)
        answers = classifier.predict({[str(path) for path in paths]}, top_k=5)
        print(json.dumps({{
            "labels": [answer.label for answer in answers],
            "probabilities": [dict(answer.top) for answer in answers],
            "home": sys.modules["exporters"].__file__,
            "installed": [name for name in ("torch", "onnx", "edge_dfcil") if importlib.util.find_spec(name)],
        }}))
    """)
    assert Path(found["home"]).is_relative_to(with_pillow.packages)
    assert found["installed"] == []
    expected = Learner.load(GOLDEN / "cifar.safetensors", "cpu").predict(paths, top_k=5)
    assert found["labels"] == [answer.label for answer in expected]
    for mine, answer in zip(found["probabilities"], expected, strict=True):
        assert mine == pytest.approx(dict(answer.top), abs=1e-3)  # a pixel may differ by 1/255 after scaling


@pytest.mark.slow
def test_the_runtime_alone_says_what_the_parts_with_torch_need(alone: Environment) -> None:
    found = alone.answer("""
        import json
        import exporters
        from exporters import *
        def refusal(name):
            try:
                getattr(exporters, name)
            except exporters.ExportError as error:
                return str(error)
        messages = [refusal(name) for name in ("export", "export_onnx", "Int8", "max_difference", "registry")]
        try:
            from exporters import register_exporter
        except EdgeDfcilError as error:
            messages.append(str(error))
        print(json.dumps({"messages": messages, "names": dir(exporters)}))
    """)
    assert len(found["messages"]) == 6
    assert all("torch" in message and "pip install edge-dfcil" in message for message in found["messages"])
    assert "OnnxClassifier" in found["names"] and "export" not in found["names"]


@pytest.mark.slow
def test_arrays_need_no_pillow(alone: Environment, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    found = alone.answer(f"""
        import json, sys
        sys.modules["PIL"] = None  # another test may have installed it
        import numpy as np
        from exporters import DataError, OnnxClassifier
        classifier = OnnxClassifier({str(GOLDEN / "cifar.onnx")!r}, threads=1)
        answers = classifier.predict(np.zeros((2, 2000, 3000, 3), np.uint8))
        try:
            classifier.predict({str(tmp_path / "x.jpg")!r})
        except DataError as error:
            print(json.dumps([[answer.label for answer in answers], str(error)]))
    """)
    black = Learner.load(GOLDEN / "cifar.safetensors", "cpu").predict(np.zeros((1, 3, 16, 16), np.uint8))[0]
    assert found[0] == [black.label] * 2
    assert "pip install pillow" in found[1]


@pytest.mark.slow
def test_both_wheels_work_together_and_removing_one_leaves_the_other(both: Environment, tmp_path: Path) -> None:
    # torch and the other libraries are those of the tests: to install them would take gigabytes.
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    path_file = both.packages / "libraries_of_the_tests.pth"
    path_file.write_text("\n".join(sorted(others)))
    found = both.answer(f"""
        import json, sys
        import numpy as np
        from edge_dfcil import ExportError, Learner, Prediction
        from exporters import OnnxClassifier, errors
        learner = Learner.load({str(GOLDEN / "cifar.safetensors")!r}, "cpu")
        report = learner.export({str(tmp_path / "x.onnx")!r})
        (mine,), (theirs,) = (one.predict(np.zeros((1, 3, 16, 16), np.uint8)) for one in (learner, OnnxClassifier(report.path)))
        print(json.dumps({{
            "homes": [sys.modules[name].__file__ for name in ("edge_dfcil", "exporters", "exporters.registry")],
            "same": [mine.label == theirs.label, type(mine) is type(theirs) is Prediction, ExportError is errors.ExportError],
        }}))
    """)
    assert all(Path(home).is_relative_to(both.packages) for home in found["homes"])
    assert found["same"] == [True, True, True]
    path_file.unlink()
    called(both.python, "-m", "pip", "uninstall", "--quiet", "--yes", "edge-dfcil")
    left = f"from exporters import OnnxClassifier; print(len(OnnxClassifier({str(tmp_path / 'x.onnx')!r}).classes))"
    assert both.answer(left) == 5
    assert sorted(path.name for path in (both.packages / "exporters").glob("*.py")) == sorted(
        name for name in OF_RUNTIME if name.endswith(".py")
    )
