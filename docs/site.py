"""Hooks that mkdocs calls while it builds the site: they add generated pages, and files of the repository that pages link to.

A page links to any file of the repository by its relative path, as it does on a code host. Files outside `docs/` are added to the
site under `repository/`, Markdown as pages, and links are changed to match.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import click
import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from edge_dfcil.cli import main
from edge_dfcil.recipe import GROUPS, RECIPES, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OUTSIDE = "repository/"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
PUBLISHED = "paper"  # the preset that has every group's defaults
NEVER_APART = re.compile(r"(?<=\d) ([±/]) (?=\d)")
WIDTH = 92  # characters of a help text
CLI = """# Command line

The output of `--help` for every command. Answers go to stdout, progress and errors to stderr. Exit status: 0 for success, 1 for
an error that was reported, 2 for wrong usage. `python -m edge_dfcil` is the same command. A first run:
[pictures in folders](../tutorial/folders.md).
"""
RECIPE = """# The recipe

Every number of a learning run is a setting in a group, with its source; "ours" marks settings that the ABD paper (Smith et al.,
ICCV 2021) does not have. `RECIPES["edge"].changed({"schedule.epochs": 3})` makes another recipe, and so does
`--set schedule.epochs=3` on the command line. The defaults are those of the preset `paper`. A model file stores the name and
version of the preset, so that an upgrade never changes an old model.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and the files outside `docs/` that pages link to."""
    files.append(File.generated(config, "reference/recipe.md", content=recipe_page()))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    pages = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    # Pages in the navigation need not be linked from another page.
    found = {ROOT / name for name in re.findall(rf"{OUTSIDE}(\S+)", (ROOT / "mkdocs.yml").read_text())}
    pages += found
    while pages:
        linked = {path for path in linked_files(pages.pop()) if not path.is_relative_to(DOCS)} - found
        pages += [path for path in linked if path.suffix == ".md"]
        found |= linked
    for path in sorted(found):
        files.append(File.generated(config, f"{OUTSIDE}{path.relative_to(ROOT).as_posix()}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrites links that lead out of `docs/`, or into it from outside."""
    if page.file.abs_src_path is None:
        return markdown
    source, here = Path(page.file.abs_src_path), posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        path = (source.parent / link[1]).resolve()
        if not path.is_file() or (source.is_relative_to(DOCS) and path.is_relative_to(DOCS)):
            return link[1]
        inside = path.is_relative_to(DOCS)
        place = path.relative_to(DOCS).as_posix() if inside else OUTSIDE + path.relative_to(ROOT).as_posix()
        return posixpath.relpath(place, here or ".")

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keeps a figure and its deviation, and the figures of one cell, on one line."""
    return NEVER_APART.sub(r"&nbsp;\1&nbsp;", html)


def linked_files(page: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    paths = {(page.parent / link).resolve() for link in LINK.findall(page.read_text())}
    return {path for path in paths if path.is_file() and path.is_relative_to(ROOT)}


def cli_page() -> str:
    """The help text of every command, as `--help` shows it."""
    parts = [CLI]
    for name, command in main.commands.items():
        context = click.Context(command, info_name=f"edge-dfcil {name}", terminal_width=WIDTH, max_content_width=WIDTH)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


def recipe_page() -> str:
    """Every setting with its default, the values of other presets, and its description, from `recipe.py`."""
    source: Any = griffe.load("edge_dfcil.recipe", search_paths=[str(ROOT)])
    parts = [RECIPE]
    for group, kind in GROUPS.items():
        described = source[kind.__name__]
        rows = [["setting", "default", "in presets", "what it is, and its source"], ["---"] * 4]
        for name in (name for name in SETTINGS if name.startswith(f"{group}.")):
            short = name.partition(".")[2]
            values = {preset: _shown(getattr(getattr(recipe, group), short)) for preset, recipe in RECIPES.items()}
            default = values.pop(PUBLISHED)
            others = {value: [p for p in values if values[p] == value] for value in values.values() if value != default}
            changed = "; ".join(f"{value} in {', '.join(presets)}" for value, presets in others.items())
            rows.append([f"`{short}`", default, changed, " ".join(described[short].docstring.value.split())])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts += [f"## {group}", described.docstring.value, table]
    return "\n\n".join(parts) + "\n"


def _shown(value: Any) -> str:
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`"
