"""Makes the demo's pictures and figures for `docs/` from the output of `make demo`, and runs the demo first if there is none.

Writes docs/demo.json, docs/accuracy.png, docs/dreams.png (dreams next to real digits), and the demo's table.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.machine import commit
from benchmarks.pages import fill
from edge_dfcil import Learner
from edge_dfcil.demo import NAMES, digits, run

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGE = DOCS / "benchmarks" / "accuracy.md"
DEMO = ROOT / "edge-dfcil-demo"  # where `make demo` writes its output
COLUMNS = 6


def draw(learner: Learner, path: Path) -> None:
    """Real digits on the left, dreams on the right; one row per class."""
    train, _ = digits()
    images = learner.dream(100 * len(learner.classes))
    labels = [prediction.label for prediction in learner.predict(images)]
    dreams = {name: images[[label == name for label in labels]] for name in NAMES}
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    sides: Any = figure.subfigures(1, 2, wspace=0.06)
    real_side, dream_side = sides
    real = {name: train.of((name,)).images for name in NAMES}
    for side, title, pictures in ((real_side, "real, not kept", real), (dream_side, "generated from the weights", dreams)):
        side.suptitle(title)
        grid = side.subplots(len(NAMES), COLUMNS)
        for row, name in enumerate(NAMES):
            for column, axes in enumerate(grid[row]):
                axes.axis("off")
                if column < len(pictures[name]):
                    axes.imshow(pictures[name][column].permute(1, 2, 0).numpy())
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any]) -> str:
    """The demo's figures as the page shows them."""
    seen = [f"{2 * (task + 1)} digits" for task in range(len(result["accuracy_after_task"]["abd"]))]
    lines = ["| accuracy on all digits so far, % | " + " | ".join(seen) + " |", "|---|" + "---|" * len(seen)]
    for method, accuracies in result["accuracy_after_task"].items():
        lines.append(f"| {method} | " + " | ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies) + " |")
    lines.append("| trained on everything |" + " |" * (len(seen) - 1) + f" {100 * result['final_accuracy']['upper_bound']:.1f} |")
    where = f"One run, seed {result['seed']}, torch {result['torch']}, {result['threads']} CPU threads"
    return "\n".join([*lines, "", f"{where}; all learning took {result['seconds']:.0f} s ([docs/demo.json](../demo.json)).", ""])


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    if not (DEMO / "demo.json").exists():
        run(DEMO)
    result = json.loads((DEMO / "demo.json").read_text())
    result |= {"commit": commit()}
    (DOCS / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    shutil.copy(DEMO / "accuracy.png", DOCS)
    fill(PAGE, "demo", table(result))
    draw(Learner.load(DEMO / "digits.safetensors"), DOCS / "dreams.png")
    print(f"wrote demo.json, accuracy.png and dreams.png to {DOCS}, and the new table to {PAGE}")


if __name__ == "__main__":
    main()
