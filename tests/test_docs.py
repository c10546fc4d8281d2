"""The README and the pages of `docs/`: their blocks run, their figures are those of the result files, and the site builds.

A page's blocks run from top to bottom in an empty folder, as a new user would: Python here, `edge-dfcil` commands through the
command line's own parser, the block for a browser in Node. The settings are shortened, not the commands: the recipes take a few
steps instead of hundreds.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import pages
from benchmarks.__main__ import main as benchmarks
from demos import figures
from docs import site
from edge_dfcil import Learner, recipe
from edge_dfcil.cli import main
from edge_dfcil.compression import Distillation, Pruning
from edge_dfcil.compression.distillation import REPAIR
from edge_dfcil.model import backbones
from exporters import registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]}
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.M | re.S)
WITH_BLOCKS = [name for name, text in PAGES.items() if BLOCK.search(text)]
GENERATED = {"recipe.md", "cli.md"}
SET_UP = ("make", "pip")  # commands that CI runs before the tests

FEW = {
    "schedule.min_steps": 40,  # so that the network predicts the same in INT8 as in floats
    "schedule.epochs": 1,
    "schedule.first_epochs": 1,
    "generator.steps": 4,
    "generator.width": 8,
    "remember.pool": 64,
    "refine.min_steps": 2,
}
SHORT: dict[str, Any] = {"rounds": 1, "dreams": 32, "generator_steps": 2, "steps": 2, "batch": 16}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps for all blocks: in the recipes, and in the defaults of distillation and pruning."""
    for name in ("edge", "frozen", "strict"):
        monkeypatch.setitem(recipe.RECIPES, name, recipe.RECIPES[name].changed(FEW))
    for settings, shorter in ((Distillation, SHORT), (Pruning, {"repair": replace(REPAIR, **SHORT)})):
        for name, value in shorter.items():
            monkeypatch.setattr(settings, name, value)
        monkeypatch.setattr(settings, "__init__", _with_defaults(settings.__init__, shorter))


def _with_defaults(make: Any, defaults: dict[str, Any]) -> Any:
    def __init__(self: Any, **given: Any) -> None:  # noqa: N807
        make(self, **{**defaults, **given})

    return __init__


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes what a page registers, after the test."""
    monkeypatch.setattr(registry, "_EXPORTERS", dict(registry._EXPORTERS))
    monkeypatch.setattr(backbones, "_FAMILIES", dict(backbones._FAMILIES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*statistics that were never learnt")  # a reader has trained weights there
@pytest.mark.usefixtures("quick", "registered")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    monkeypatch.setitem(sys.modules, "page", type(sys)("page"))  # what a block defines has a module, as in a program
    for block in BLOCK.finditer(PAGES[page]):
        language, code = block.groups()
        if language == "python":
            above = "\n" * PAGES[page].count("\n", 0, block.start(2))  # so that a traceback names the line of the page
            exec(compile(above + code, ROOT / page, "exec"), namespace)
        else:
            run_shell(code)


def run_shell(code: str) -> None:
    for line in code.splitlines():
        command, *arguments = shlex.split(line, comments=True) or [""]
        if command in ("", *SET_UP):
            continue
        if command == "openssl":
            subprocess.run([command, *arguments], check=True, capture_output=True)
            continue
        assert command == "edge-dfcil", f"no other command runs here: {line}"
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"


NODE, WEB = shutil.which("node"), ROOT / "demos" / "teach" / "node_modules"
CANVAS = """
import {{ readFileSync }} from "node:fs";
globalThis.fetch = async (path) => ({{ json: async () => JSON.parse(readFileSync(path)) }});
const {{ classify }} = await import("./page.mjs");
const data = readFileSync("pixels.rgba");
const canvas = {{ width: {width}, height: {height}, getContext: () => ({{ getImageData: () => ({{ data }}) }}) }};
console.log(JSON.stringify(await classify(canvas)));
"""


@pytest.mark.slow
@pytest.mark.skipif(NODE is None or not (WEB / "onnxruntime-web").exists(), reason="needs Node and `make runtime`")
def test_the_block_for_a_browser_answers_as_the_learner(learnt: Learner, tmp_path: Path) -> None:
    code = re.search(r"^```js\n(.*?)^```", PAGES["docs/tutorial/ship.md"], re.M | re.S)
    assert code is not None and NODE is not None
    # A browser loads the model by its address, Node from its bytes; the rest of the block is unchanged.
    page = code[1].replace('.create("any.onnx")', '.create(new Uint8Array((await import("node:fs")).readFileSync("any.onnx")))')
    assert page != code[1]
    (tmp_path / "page.mjs").write_text(page)
    (tmp_path / "node_modules").symlink_to(WEB)
    learnt.export(tmp_path / "any.onnx", input="any", progress=False)
    (tmp_path / "classes.json").write_text(json.dumps(learnt.classes))
    photograph = np.random.default_rng(0).integers(0, 256, (31, 44, 3), np.uint8)
    opaque = np.concatenate([photograph, np.full((31, 44, 1), 255, np.uint8)], 2)
    (tmp_path / "pixels.rgba").write_bytes(opaque.tobytes())
    (tmp_path / "main.mjs").write_text(CANVAS.format(width=44, height=31))
    done = subprocess.run([NODE, "main.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = dict(learnt.predict(photograph, top_k=99)[0].top)
    answered = json.loads(done.stdout)
    assert [name for name, _ in answered] == list(expected)
    assert dict(answered) == pytest.approx(expected, abs=1e-3)


def not_installed_by_pip_install(extra: str = "") -> list[str]:
    """The modules of this environment that `pip install .` would not install, or not with an extra of this package."""
    needed, queue = set(), ["edge-dfcil"]
    while queue:
        name = canonicalize_name(queue.pop())
        if name in needed:
            continue
        needed.add(name)
        try:
            found = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # of another platform
            continue
        asked = {"extra": extra if name == "edge-dfcil" else ""}
        queue += [one.name for one in found if one.marker is None or one.marker.evaluate(asked)]
    modules = packages_distributions()
    return [name for name, homes in modules.items() if not needed & {canonicalize_name(home) for home in homes}]


@pytest.mark.slow
def test_the_first_example_runs_after_pip_install_alone(tmp_path: Path) -> None:
    missing = not_installed_by_pip_install()
    assert {"sklearn", "matplotlib", "timm", "mkdocs"} <= set(missing) and "torch" not in missing
    code = next(block[2] for block in BLOCK.finditer(README) if block[1] == "python")
    assert len(code.splitlines()) <= 10
    program = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n{code}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and (tmp_path / "digits.onnx").stat().st_size > 0


@pytest.mark.slow
def test_the_benchmarks_start_with_their_extra_alone() -> None:
    missing = not_installed_by_pip_install("bench")
    assert {"timm", "mkdocs"} <= set(missing) and "sklearn" not in missing
    program = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\nimport benchmarks.__main__"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BENCHMARKS = re.findall(r"^python -m (benchmarks [^#\n]*)", PAGES["docs/benchmarks/run.md"], re.M)


@pytest.mark.parametrize("command", BENCHMARKS)
def test_a_command_of_the_benchmarks_is_complete(command: str, tmp_path: Path) -> None:
    (tmp_path / "FILE").touch()
    places = {"PATH": str(tmp_path), "FILE": str(tmp_path / "FILE")}
    _, name, *arguments = (places.get(word, word) for word in shlex.split(command))
    with benchmarks.commands[name].make_context(name, arguments) as context:  # raises for a missing or unknown option
        assert context.params


def test_the_readme_is_short_and_promises_what_is_true() -> None:
    assert len(README.splitlines()) <= 150
    assert "keeps no samples" in README
    assert "derived from" in README, "weights and dreams are derived from data, and the README says so"


def test_there_are_blocks_of_both_kinds() -> None:
    assert {block[1] for text in PAGES.values() for block in BLOCK.finditer(text)} == {"python", "sh"}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose):
        path = (ROOT / page).parent / target
        assert path.exists() or path.name in GENERATED, f"{page} links to {target}"


MARKS = [(page, mark) for page, marks in pages.PAGES.items() for mark in marks]


def shown(page: str, mark: str) -> str:
    """The text between a page's marks."""
    text = PAGES[page]
    return text[text.index("-->", text.index(f"<!-- {mark}:")) + 4 : text.index(f"<!-- /{mark} -->")]


@pytest.mark.parametrize(("page", "mark"), MARKS)
def test_the_figures_are_those_of_the_result_files(page: str, mark: str) -> None:
    assert shown(page, mark) == pages.PAGES[page][mark](ROOT / "benchmarks" / "results")


def test_the_table_of_the_demo_is_that_of_its_file() -> None:
    result = json.loads((ROOT / "docs" / "demo.json").read_text())
    page = figures.PAGE.relative_to(ROOT).as_posix()
    assert shown(page, "demo") == figures.table(result)


def test_the_page_of_the_recipe_has_every_setting_with_its_values() -> None:
    rows = [line.split(" | ") for line in site.recipe_page().splitlines() if line.startswith("| `")]
    assert [row[0].strip("|` ") for row in rows] == [name.partition(".")[2] for name in recipe.SETTINGS]
    by_name = dict(zip(recipe.SETTINGS, rows, strict=True))
    paper, edge = recipe.RECIPES["paper"], recipe.RECIPES["edge"]
    assert by_name["schedule.epochs"][1:3] == [f"`{paper.schedule.epochs}`", f"`{edge.schedule.epochs}` in frozen, edge, strict"]
    assert by_name["schedule.momentum"][1:3] == [f"`{paper.schedule.momentum}`", ""]
    assert all(row[3].strip("| ").endswith(".") for row in rows), "each has a description"


# The site


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


class Loaded(HTMLParser):
    """The addresses from which a page loads something; links that a reader may follow are not among them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if tag != "a" and name in ("src", "srcset", "href", "data")]


def outside(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"(https?:)?//", address)]


@pytest.mark.slow
def test_the_site_builds_strict_and_loads_nothing_from_elsewhere(built: Path) -> None:
    html = list(built.rglob("*.html"))
    assert len(html) > len(PAGES) - 2
    for page in html:
        assert not outside(Loaded(page).addresses), page
    for style in built.rglob("*.css"):
        assert not outside(re.findall(r"url\([\"']?([^)\"']+)", style.read_text())), style


@pytest.mark.slow
def test_the_site_has_the_commands_and_the_names(built: Path) -> None:
    commands = (built / "reference" / "cli.html").read_text()
    assert all(f"edge-dfcil {name}" in commands for name in main.commands)
    names = (built / "reference" / "api.html").read_text()
    for name in ("Learner.learn_task", "Model.predict", "Session.pause", "Callback.on_commit"):
        assert f'id="edge_dfcil.{name}"' in names, name


def test_loading_from_elsewhere_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<a href="https://a.org"></a><script src="//b.org/x.js"></script><img src="x.png">')
    assert outside(Loaded(page).addresses) == ["//b.org/x.js"]
