"""ExecuTorch (.pte), floats on XNNPACK: `forward` takes uint8 (1, 3, S, S) and gives probabilities (1, C); `about`, its
constant method, gives the metadata as JSON."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from exporters.checks import Run, max_difference
from exporters.registry import About, Artifact, register_exporter
from exporters.tracing import metadata, needed, one_by_one, serving, tracing

if TYPE_CHECKING:
    from torch import nn

NAME = "executorch"


def to_executorch(classifier: nn.Module, about: About) -> Artifact:
    """One image at a time: the memory of a file is planned for its largest batch."""
    import torch

    exir, runtime = needed("executorch.exir", NAME), needed("executorch.runtime", NAME)
    partitioner = needed("executorch.backends.xnnpack.partition.xnnpack_partitioner", NAME).XnnpackPartitioner
    example = torch.zeros(1, 3, about.image_size, about.image_size, dtype=torch.uint8)
    # XNNPACK's passes expect weights in this order, and learning leaves them in channels-last order.
    contiguous = copy.deepcopy(classifier).to(memory_format=torch.contiguous_format)
    with tracing(NAME):
        program = torch.export.export(serving(contiguous), (example,))
        said = {"about": json.dumps(metadata(about, "edge-dfcil/executorch/1"))}
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner()], constant_methods=said)
        content = bytes(lowered.to_executorch().buffer)
        answer = run(content, runtime)
    return Artifact(content, max_difference(one_by_one(answer), classifier, about.image_size))


def run(content: bytes, runtime: Any) -> Run:
    """A function that runs a file on one image (1, 3, S, S), in `runtime`, the module `executorch.runtime`."""
    import torch

    program = runtime.Runtime.get().load_program(content)
    method = program.load_method("forward")

    # A method reads the program and the bytes, but does not keep them alive.
    def answer(images: Any, kept: Any = (program, content)) -> Any:
        return method.execute([torch.from_numpy(images).contiguous()])[0].numpy().copy()

    return answer


register_exporter(NAME, ".pte", to_executorch)
