"""Two wheels: edge-dfcil contains everything, edge-dfcil-runtime only the files that predict without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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
# Besides Python's and its own modules, the runtime imports these: two for pictures given as files, one for signatures.
LIBRARIES = {"numpy", "onnxruntime", "PIL", "pillow_heif", "cryptography"}

# What is listed


@pytest.mark.parametrize("name", [name for name in OF_RUNTIME if name.endswith(".py") and name != "__init__.py"])
def test_the_runtime_imports_only_its_own_files_and_its_libraries(name: str) -> None:
    own = {f"exporters.{Path(other).stem}" for other in OF_RUNTIME}
    for module in imports(ROOT / "exporters" / name):
        first = module.split(".")[0]
        ours = module == "exporters" or any(f"{module}.".startswith(f"{other}.") for other in own)
        assert ours if first == "exporters" else first in LIBRARIES | sys.stdlib_module_names, f"{name} imports {module}"


def test_both_have_one_version_and_one_set_of_requirements() -> None:
    ours, theirs = RUNTIME["project"], WHOLE["project"]
    assert exporters.__version__ == __version__
    assert not [line for line in theirs["dependencies"] if line.startswith("edge-dfcil")]
    assert {*ours["dependencies"], *ours["optional-dependencies"]["pillow"]} <= set(theirs["dependencies"])
    assert ours["optional-dependencies"]["sign"] == theirs["optional-dependencies"]["sign"]
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


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ("sys.modules['exporters._version'] = None", "missing"),
        ("import exporters._version; exporters._version.__version__ = '0.0.7'", "0.0.7"),
    ],
)
def test_files_of_exporters_that_are_missing_or_of_another_version_are_refused(left: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import sys; {left}; import edge_dfcil.errors"], capture_output=True, text=True)
    expected = f"ImportError: edge-dfcil is {__version__} and its package exporters is {said}: "
    assert done.returncode == 1 and expected in done.stderr, done.stderr
    assert f"pip install --force-reinstall --no-deps edge-dfcil=={__version__}" in done.stderr


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

    def __init__(self, folder: Path, *arguments: Any) -> None:
        called(sys.executable, "-m", "venv", folder)
        self.folder, self.python = folder, folder / "bin" / "python"
        self.packages = next(folder.glob("lib/python*/site-packages"))
        self.install(*arguments)

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


@pytest.fixture(scope="module")
def whole(wheels: dict[str, Path]) -> Iterator[Environment]:
    """edge-dfcil with torch and the other libraries of the tests: installing them again would take gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(Path(folder), "--no-deps", wheels["edge-dfcil"])
        others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (environment.packages / "libraries_of_the_tests.pth").write_text("\n".join(sorted(others)))
        yield environment


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as opened:
        return message_from_bytes(opened.read(next(name for name in opened.namelist() if name.endswith("/METADATA"))))


def photographs(folder: Path) -> list[Path]:
    """Photographs of 3,000 x 2,000 pixels, and of 2,000 x 3,000."""
    found = []
    for name in ("china", "flower"):
        photo = Image.fromarray(load_sample_image(f"{name}.jpg")).resize((3000, 2000), Image.Resampling.BICUBIC)
        for number, shown in enumerate((photo, photo.transpose(Image.Transpose.ROTATE_90))):
            found.append(folder / f"{name}{number}.jpg")
            shown.save(found[-1], quality=95)
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel that are not its metadata."""
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_edge_dfcil_holds_everything_and_the_runtime_the_same_files(wheels: dict[str, Path]) -> None:
    runtime, whole = contents(wheels["edge-dfcil-runtime"]), contents(wheels["edge-dfcil"])
    assert set(runtime) == {f"exporters/{name}" for name in OF_RUNTIME}
    assert runtime.items() <= whole.items()
    sources = {path for folder in ("edge_dfcil", "exporters") for path in (ROOT / folder).rglob("*.py")}
    others = {"edge_dfcil/py.typed", "exporters/py.typed", "edge_dfcil/digits.npz"}
    assert set(whole) == {path.relative_to(ROOT).as_posix() for path in sources} | others


@pytest.mark.slow
def test_the_metadata_of_both(wheels: dict[str, Path]) -> None:
    for name, wheel in wheels.items():
        about = metadata(wheel)
        assert (about["Name"], about["Version"]) == (name, __version__)
        assert about["Summary"] and about["License-Expression"] == "Apache-2.0"
        assert str(about.get_payload()).startswith(f"# {name}\n")


@pytest.mark.slow
def test_the_source_archive_holds_the_tests(wheels: dict[str, Path]) -> None:
    (archive,) = wheels["edge-dfcil"].parent.glob("edge_dfcil-*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "exporters/pyproject.toml", "tests/conftest.py"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")} <= names


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
        try:
            from exporters.registry import register_exporter
        except ModuleNotFoundError as error:
            messages.append(str(error))
        print(json.dumps({"messages": messages, "names": dir(exporters)}))
    """)
    assert len(found["messages"]) == 7
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


ROUND_TRIP = f"""
    import json, sys
    import numpy as np
    from edge_dfcil import ExportError, Learner, Prediction
    from exporters import OnnxClassifier, errors
    learner = Learner.load({str(GOLDEN / "cifar.safetensors")!r}, "cpu")
    report = learner.export("x.onnx")
    (mine,), (theirs,) = (one.predict(np.zeros((1, 3, 16, 16), np.uint8)) for one in (learner, OnnxClassifier(report.path)))
    print(json.dumps({{
        "homes": [sys.modules[name].__file__ for name in ("edge_dfcil", "exporters", "exporters.registry")],
        "same": [mine.label == theirs.label, type(mine) is type(theirs) is Prediction, ExportError is errors.ExportError],
    }}))
"""


def assert_works(whole: Environment) -> None:
    found = whole.answer(ROUND_TRIP)
    assert all(Path(home).is_relative_to(whole.packages) for home in found["homes"])
    assert found["same"] == [True, True, True]


@pytest.mark.slow
def test_edge_dfcil_needs_no_runtime_wheel(whole: Environment) -> None:
    assert_works(whole)


@pytest.mark.slow
def test_both_work_together_and_after_one_is_removed_it_says_how_to_repair(whole: Environment, wheels: dict[str, Path]) -> None:
    whole.install("--no-deps", wheels["edge-dfcil-runtime"])
    assert_works(whole)
    called(whole.python, "-m", "pip", "uninstall", "--quiet", "--yes", "edge-dfcil-runtime")
    done = subprocess.run([whole.python, "-I", "-m", "edge_dfcil", "demo"], capture_output=True, text=True, cwd=whole.folder)
    assert done.returncode == 1
    assert f"pip install --force-reinstall --no-deps edge-dfcil=={__version__}" in done.stderr
    whole.install("--force-reinstall", "--no-deps", wheels["edge-dfcil"])
    assert_works(whole)
