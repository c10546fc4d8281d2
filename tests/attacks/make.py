"""Writes every attack as a small file: `python -m tests.attacks.make FOLDER`. README.md says what each one tries."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import save

from edge_dfcil.model import file
from exporters import seals
from exporters.onnx import FORMAT

GOLDEN = Path(__file__).parent.parent / "golden" / "schema2"
ATTACKS: dict[str, Callable[[Path], Path]] = {}


def attack(ending: str) -> Callable[[Callable[[Path], None]], Callable[[Path], Path]]:
    """Registers a function that writes an attack; its name and an ending make the name of the file."""

    def register(write: Callable[[Path], None]) -> Callable[[Path], Path]:
        name = write.__name__.replace("_", "-") + ending

        def make(folder: Path) -> Path:
            write(folder / name)
            return folder / name

        ATTACKS[name] = make
        return make

    return register


def lying(name: str, **changes: Any) -> None:
    """Registers a model file with other settings and a correct digest."""

    def write(path: Path) -> None:
        tensors, settings = file.read(GOLDEN / "closed_form.safetensors")
        file.write(path, tensors, {**settings, **changes})

    write.__name__ = name
    attack(".safetensors")(write)


def header(path: Path, values: dict[str, Any], data: bytes = b"") -> None:
    """Writes a safetensors file with this header."""
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def about(**settings: Any) -> dict[str, str]:
    return {
        "edge_dfcil": json.dumps({"schema": 2, "sha256": "0" * 64, "kind": "model"}),
        "settings": json.dumps(settings),
    }


lying("seed_of_text", seed="x")
lying("huge_seed", seed=10**300)
lying("mean_that_is_no_number", mean=[float("nan")] * 3)
lying("infinite_deviation", std=[float("inf")] * 3)
lying("deviation_of_zero", std=[0.0] * 3)
lying("unknown_method", method="../../magic")
lying("unknown_recipe", recipe={"preset": "edge", "version": 1, "warp": 9})
lying("recipe_that_is_a_list", recipe=[1])
lying("tasks_that_are_text", tasks="abc")
lying("one_output_too_many", tasks=[["0", "1", "2"], ["3", "4", "5"]])
lying("name_of_control_characters", tasks=[["0", "1", "2"], ["3", "\x1b[2J\x1b]0;owned\x07"]])
lying("name_with_hidden_direction", tasks=[["0", "1", "2"], ["3", "\u202egpj.exe"]])
lying("image_of_a_terapixel", image_size=2**20)
lying("image_of_text", image_size="16")
lying("scales_elsewhere", scales=["../../etc/passwd"])
lying("backbone_of_gigabytes", backbone="torchvision:regnet_y_128gf")
lying("backbone_from_a_folder", backbone="timm:local-dir:/etc")
lying("temperature_of_nothing", calibration={"temperature": 1e-300, "thresholds": [], "images": 0, "false_rejections": 0.0})
lying("temperature_beyond_floats", calibration={"temperature": 10**390, "thresholds": [], "images": 0, "false_rejections": 0.0})
lying("unknown_role", statistics={"mean": {"role": "image", "images": [1]}})
lying("settings_that_nest", x=json.loads("[" * 400 + "]" * 400), seed=-1)


@attack(".safetensors")
def header_of_an_exabyte(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


@attack(".safetensors")
def header_of_a_hundred_megabytes(path: Path) -> None:
    with open(path, "wb") as target:
        target.write(struct.pack("<Q", 99_000_000) + b"{")
        target.truncate(99_000_008)  # sparse: it takes no room on the disk


def with_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Writes the golden model with one tensor replaced or added, and a correct digest."""
    tensors, settings = file.read(GOLDEN / "closed_form.safetensors")
    file.write(path, {**tensors, name: tensor}, settings)


@attack(".safetensors")
def tensor_of_a_trillion(path: Path) -> None:
    header(path, {"__metadata__": about(), "x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, bytes(4))


@attack(".safetensors")
def empty_tensor_of_a_trillion_rows(path: Path) -> None:
    with_tensor(path, "head.weight", torch.zeros(5, 0))


@attack(".safetensors")
def covariance_of_a_million_features(path: Path) -> None:
    with_tensor(path, "statistics.covariance:variances", torch.ones(1_000_000))


@attack(".safetensors")
def weights_that_are_no_numbers(path: Path) -> None:
    with_tensor(path, "head.bias", torch.full((5,), torch.nan))


@attack(".safetensors")
def variances_below_zero(path: Path) -> None:
    tensors, settings = file.read(GOLDEN / "closed_form.safetensors")
    name = next(name for name in tensors if name.endswith("running_var"))
    file.write(path, {**tensors, name: -torch.ones_like(tensors[name])}, settings)


@attack(".safetensors")
def tensor_that_leaves_the_folder(path: Path) -> None:
    with_tensor(path, "../../x\x1b[2J", torch.zeros(1))


@attack(".safetensors")
def names_given_twice(path: Path) -> None:
    metadata = about()
    path.write_bytes(save({"x": torch.zeros(1)}, {**metadata, "settings": '{"seed": 0, "seed": 1}'}))


@attack(".safetensors")
def json_bomb(path: Path) -> None:
    path.write_bytes(save({"x": torch.zeros(1)}, {**about(), "settings": "[" * 1_000_000 + "]" * 1_000_000}))


@attack(".safetensors")
def number_of_a_million_digits(path: Path) -> None:
    path.write_bytes(save({"x": torch.zeros(1)}, {**about(), "settings": '{"seed": ' + "9" * 1_000_000 + "}"}))


@attack(".safetensors")
def schema_that_is_no_number(path: Path) -> None:
    stated = '{"schema": NaN, "sha256": "", "kind": "model"}'
    path.write_bytes(save({"x": torch.zeros(1)}, {**about(), "edge_dfcil": stated}))


@attack(".safetensors")
def later_version_with_terminal_codes(path: Path) -> None:
    stated = json.dumps({"schema": 3, "sha256": "", "kind": "model"})
    path.write_bytes(save({"x": torch.zeros(1)}, {**about(version="\x1b[2J9.9"), "edge_dfcil": stated}))


@attack(".json")
def recipe_bomb(path: Path) -> None:
    path.write_text("[" * 100_000)


@attack(".json")
def recipe_of_many_digits(path: Path) -> None:
    path.write_text('{"schedule": {"epochs": ' + "9" * 500_000 + "}}")


@attack(".json")
def recipe_of_a_gigabyte(path: Path) -> None:
    with open(path, "wb") as target:
        target.truncate(10**9)


@attack(".json")
def recipe_with_two_answers(path: Path) -> None:
    path.write_text('{"schedule": {"epochs": 3}, "schedule.epochs": 4}')


@attack(".json")
def recipe_with_a_name_twice(path: Path) -> None:
    path.write_text('{"schedule": {"epochs": 3, "epochs": 4}}')


def resealed(path: Path, **metadata: str) -> None:
    """Writes an ONNX file with other metadata and a correct digest."""
    model = onnx.load(GOLDEN / "closed_form-any.onnx")
    for entry in model.metadata_props:
        entry.value = ({"format": FORMAT} | metadata).get(entry.key, entry.value)
    path.write_bytes(seals.seal(model.SerializeToString()))


def lying_onnx(name: str, **metadata: str) -> None:
    def write(path: Path) -> None:
        resealed(path, **metadata)

    write.__name__ = name
    attack(".onnx")(write)


lying_onnx("classes_that_nest", classes="[" * 100_000)
lying_onnx("classes_that_are_a_text", classes='"abcde"')
lying_onnx("classes_of_terminal_codes", classes='["0", "1", "2", "3", "\\u001b[2J"]')
lying_onnx("classes_too_few", classes='["0"]')
lying_onnx("image_of_a_terapixel_in_onnx", image_size=str(2**20))
lying_onnx("temperature_that_is_no_number", temperature="nan")
lying_onnx("threshold_beyond_floats", thresholds="[" + ",".join(["9" * 390] * 5) + "]")


@attack(".onnx")
def weights_from_another_folder(path: Path) -> None:
    tensor = TensorProto(name="w", data_type=1, dims=[5], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../../etc/passwd"), ("offset", "0"), ("length", "20")):
        tensor.external_data.add(key=key, value=value)
    given = [helper.make_tensor_value_info("probabilities", 1, [5])]
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["probabilities"])], "g", [], given, [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    path.write_bytes(seals.seal(model.SerializeToString()))


@attack(".onnx")
def another_graph(path: Path) -> None:
    given = helper.make_tensor_value_info("probabilities", 1, [1, 5])
    taken = helper.make_tensor_value_info("images", 1, [1, 5])
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["probabilities"])], "g", [taken], [given])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    for key, value in {"format": FORMAT, "classes": '["0","1","2","3","4"]', "image_size": "16"}.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(seals.seal(model.SerializeToString()))


def make(folder: Path) -> dict[str, Path]:
    """Writes every attack to a folder; the paths by the names of the files."""
    return {name: write(folder) for name, write in ATTACKS.items()}


if __name__ == "__main__":
    (target,) = map(Path, sys.argv[1:])
    target.mkdir(parents=True, exist_ok=True)
    print("\n".join(map(str, make(target).values())))
