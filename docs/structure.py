"""Draws the imports between the parts of the package, and fails if there is a cycle.

    make structure             writes docs/structure.svg; exit code 1 and the cycle on stderr if there is one

Nodes are the folders and files of `edge_dfcil/`, in the layers of `tests/test_layers.py`. Imports inside functions and imports
for type checking count like any other. grimp reads them, networkx looks for cycles, matplotlib draws.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import grimp
import matplotlib as mpl
import networkx as nx
from matplotlib.figure import Figure

from tests.test_layers import INSIDE

PACKAGE = "edge_dfcil"
PICTURE = Path(__file__).with_suffix(".svg")
EDGE = 0.16  # half the width of the column of names


def imports(package: str) -> nx.DiGraph:
    """The imports between the direct children of a package, as a graph; the package's own `__init__` is a node as well."""
    found, graph = grimp.build_graph(package, cache_dir=None), nx.DiGraph()
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    present = {package} | {path.stem for path in Path(spec.submodule_search_locations[0]).iterdir()}
    for importer in sorted(found.modules):
        if _child(importer) not in present:
            continue  # an old name of a module that has moved, which `__path__` finds in _deprecated/
        graph.add_node(_child(importer))
        for imported in sorted(found.find_modules_directly_imported_by(importer)):
            if _child(importer) != _child(imported):
                graph.add_edge(_child(importer), _child(imported), because=f"{importer} imports {imported}")
    return graph


def _child(module: str) -> str:
    """The folder or file of the package that contains a dotted module; the package itself for its `__init__`."""
    package, *parts = module.split(".")
    return parts[0] if parts else package


def cycle(graph: nx.DiGraph) -> list[str]:
    """The imports of one cycle, in order; empty if there is none."""
    try:
        return [graph.edges[edge]["because"] for edge in nx.find_cycle(graph)]
    except nx.NetworkXNoCycle:
        return []


def draw(graph: nx.DiGraph, path: Path) -> None:
    """One column, the highest layer on top. Arrows that others do not imply are on its right. Arrows that others imply (a to c,
    when a imports b and b imports c) are lighter and on its left."""
    layers = [layer.split() for layer in INSIDE]
    users = next(number for number, layer in enumerate(layers) if "demo" in layer)
    layers.insert(users + 1, [PACKAGE])  # its __init__ has the public names, which the layers above use
    column = [name for layer in layers for name in layer if name in graph and name[0] != "_"]
    shown, place = graph.subgraph(column), {name: -number for number, name in enumerate(column)}
    essential = nx.transitive_reduction(shown).edges
    figure = Figure(figsize=(8, 0.45 * len(column)), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-1, 1), ylim=(0.5 - len(column), 0.5))
    axes.axis("off")
    for importer, imported in sorted(shown.edges):
        right = (importer, imported) in essential
        side, color, bend = (EDGE, "black", -0.6) if right else (-EDGE, "0.7", 0.6)
        arrow = {"arrowstyle": "-|>", "color": color, "connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (side, place[imported] + 0.1), (side, place[importer] - 0.1), arrowprops=arrow)
    for name, y in place.items():
        axes.text(0, y, name, ha="center", va="center")
    for first, *_ in (row for layer in layers if (row := [name for name in layer if name in place])):
        axes.axhline(place[first] + 0.5, xmin=0.5 - EDGE / 2, xmax=0.5 + EDGE / 2, color="0.8", linewidth=0.8)
    with mpl.rc_context({"svg.hashsalt": PACKAGE}):  # so that the same imports give the same file
        figure.savefig(path, metadata={"Date": None})


def main(package: str = PACKAGE) -> int:
    graph = imports(package)
    if found := cycle(graph):
        print("a cycle of imports:", *found, sep="\n  ", file=sys.stderr)
        return 1
    draw(graph, PICTURE)
    print(f"{PICTURE}: {graph.number_of_nodes()} parts, {graph.number_of_edges()} arrows, no cycle")
    return 0


if __name__ == "__main__":
    sys.exit(main())
