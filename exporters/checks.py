"""Checks that an exported file gives the same answers as the classifier that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edge_dfcil.errors import ExportError

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-4  # largest difference of a probability between a file of floats and the model
CHECKED_BATCHES = (1, 7)

Run = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


def max_difference(run: Run, classifier: nn.Module, image_size: int, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a probability between a file and the classifier, over smooth and rough images.

    Parameters
    ----------
    run
        What the file answers: images (N, 3, S, S), uint8, to probabilities (N, C).
    classifier
        The same images as a tensor to logits (N, C).

    Raises `ExportError` when it exceeds the tolerance, or shapes differ.
    """
    import torch

    random, largest = np.random.default_rng(0), 0.0
    for n in CHECKED_BATCHES:
        # Flat colours and noise: smooth and rough images, dark to light.
        pixels = random.integers(0, 256, (n, 3, 1, 1)) + random.integers(-64, 65, (n, 3, image_size, image_size))
        images = pixels.clip(0, 255).astype(np.uint8)
        found = run(images)
        with torch.inference_mode():
            expected = classifier(torch.from_numpy(images)).softmax(1).numpy()
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
        if not difference < tolerance:
            raise ExportError(
                f"the exported graph disagrees with the model on a batch of {n}: probabilities differ by {difference:.2g}, "
                f"{tolerance:g} is allowed. Nothing was written"
            )
        largest = max(largest, difference)
    return largest
