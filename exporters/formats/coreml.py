"""Core ML (.mlmodel, a neural network), floats: an image classifier as Apple's Vision framework takes it. `image` is RGB of S x S
pixels; it gives `probabilities`, by class name, and `class`, the name of the largest. Its metadata is user-defined."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.checks import Run, max_difference
from exporters.errors import ExportError
from exporters.registry import About, Artifact, register_exporter
from exporters.tracing import metadata, needed, one_by_one, serving, tracing

if TYPE_CHECKING:
    from torch import nn

NAME = "coreml"


def runs_here() -> bool:
    """Whether this system can run a Core ML file."""
    return sys.platform == "darwin"


def to_coreml(classifier: nn.Module, about: About, *, unchecked: bool = False) -> Artifact:
    """One image at a time, as Vision requires.

    Parameters
    ----------
    unchecked
        Core ML runs only on macOS. Elsewhere a file cannot be compared with the classifier, and is made only if this is True;
        its `max_difference` is None. On macOS it is compared in any case.

    Raises `ExportError` when the file cannot be made, cannot be compared, or disagrees with the classifier.
    """
    if not runs_here() and not unchecked:
        raise ExportError(
            "Core ML runs only on macOS, so the file cannot be compared with the model here. Nothing was written. "
            "Export on a Mac, or pass unchecked=True (--unchecked) and compare its answers there yourself"
        )
    coremltools = needed("coremltools", NAME)
    with tracing(NAME):
        content = _converted(classifier, about, coremltools)
        if not runs_here():
            return Artifact(content, None)
        answer = run(content, coremltools)
    return Artifact(content, max_difference(one_by_one(answer), classifier, about.image_size))


def _converted(classifier: nn.Module, about: About, coremltools: Any) -> bytes:
    import torch

    shape = (1, 3, about.image_size, about.image_size)
    # The converter reads the trace's uint8 images as the floats from 0 to 255 that Core ML makes of pixels.
    traced = torch.jit.trace(serving(classifier), torch.zeros(shape, dtype=torch.uint8))
    made = coremltools.convert(  # its progress stays on stderr: redirecting that would hide what other threads write
        traced,
        convert_to="neuralnetwork",  # one file; an ML program is a folder
        inputs=[coremltools.ImageType(name="image", shape=shape, color_layout=coremltools.colorlayout.RGB)],
        outputs=[coremltools.TensorType(name="probabilities")],
        classifier_config=coremltools.ClassifierConfig(
            list(about.classes), predicted_feature_name="class", predicted_probabilities_output="probabilities"
        ),
        skip_model_load=True,
    )
    made.user_defined_metadata.update(metadata(about, "edge-dfcil/coreml/1"))
    content: bytes = made.get_spec().SerializeToString()
    return content


def run(content: bytes, coremltools: Any) -> Run:
    """A function that runs a file on one image (1, 3, S, S), with the module `coremltools`; only on macOS."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mlmodel"
        path.write_bytes(content)
        model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    names = list(model.get_spec().neuralNetworkClassifier.stringClassLabels.vector)

    def answer(images: Any) -> Any:
        found = model.predict({"image": Image.fromarray(np.ascontiguousarray(images[0].transpose(1, 2, 0)))})["probabilities"]
        return np.array([[found[name] for name in names]], dtype=np.float32)

    return answer


register_exporter(NAME, ".mlmodel", to_coreml)
