"""LiteRT (.tflite), floats: takes uint8 (1, 3, S, S) and gives probabilities (1, C). Its metadata is the buffer `edge-dfcil`,
as JSON."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.checks import Run, max_difference
from exporters.registry import About, Artifact, register_exporter
from exporters.tracing import metadata, needed, one_by_one, serving, tracing

if TYPE_CHECKING:
    from torch import nn

NAME = "litert"
KEY = "edge-dfcil"  # of the metadata


def to_litert(classifier: nn.Module, about: About) -> Artifact:
    """One image at a time: the converter cannot leave the size of a batch free."""
    import torch

    converter, interpreter = needed("litert_torch", NAME), needed("ai_edge_litert.interpreter", NAME)
    schema, flatbuffers = needed("ai_edge_litert.schema_py_generated", NAME), needed("flatbuffers", NAME)
    example = torch.zeros(1, 3, about.image_size, about.image_size, dtype=torch.uint8)
    with _quiet(needed("litert_torch.progress", NAME)), tracing(NAME), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        converter.convert(serving(classifier), (example,)).export(str(path))
        content = _described(path.read_bytes(), metadata(about, "edge-dfcil/litert/1"), schema, flatbuffers)
        answer = run(content, interpreter)
    return Artifact(content, max_difference(one_by_one(answer), classifier, about.image_size))


@contextlib.contextmanager
def _quiet(progress: Any) -> Iterator[None]:
    """Suppresses the steps that the converter prints on stdout, which is for answers."""
    before, progress.console.quiet = progress.console.quiet, True
    try:
        yield
    finally:
        progress.console.quiet = before


def _described(content: bytes, entries: dict[str, str], schema: Any, flatbuffers: Any) -> bytes:
    """The file with its metadata."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data = list(json.dumps(entries).encode())
    entry.name, entry.buffer = KEY, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def run(content: bytes, interpreter: Any) -> Run:
    """A function that runs a file on one image (1, 3, S, S), in `interpreter`, the module `ai_edge_litert.interpreter`."""
    session = interpreter.Interpreter(model_content=content, num_threads=1)
    session.allocate_tensors()
    entry, end = session.get_input_details()[0]["index"], session.get_output_details()[0]["index"]

    def answer(images: Any) -> Any:
        session.set_tensor(entry, images)
        session.invoke()
        return session.get_tensor(end)

    return answer


register_exporter(NAME, ".tflite", to_litert)
