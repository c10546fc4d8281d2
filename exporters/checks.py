"""Checks that an exported file gives the same answers as the classifier that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from exporters.errors import ExportError

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-4  # largest difference of a probability between a file of floats and the model
CHECKED_BATCHES = (1, 7)

Run = Callable[[npt.NDArray[np.uint8]], npt.NDArray[Any]]
Fit = Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.uint8]]


def max_difference(run: Run, classifier: nn.Module, image_size: int, tolerance: float = TOLERANCE) -> float:
    """The largest difference of a probability between a file and the classifier, over smooth and rough images.

    Raises `ExportError` when it exceeds the tolerance, or shapes differ.

    Parameters
    ----------
    run
        Runs the file: images (N, 3, S, S), uint8, to probabilities (N, C).
    classifier
        Maps the same images as a tensor to logits (N, C); on the CPU.
    image_size
        S, in pixels.
    tolerance
        The difference from which the error is raised.
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


def max_difference_at_sizes(run: Run, scale: Run, answer: Run, image_size: int, fit: Fit) -> float:
    """The largest difference of a probability between a file that takes images of any size and its model.

    Parameters
    ----------
    run, scale
        Run the file on images (N, 3, H, W), uint8: to probabilities (N, C), and to the squares (N, 3, S, S) to which it scales
        and crops them.
    answer
        Maps squares to the expected probabilities.
    fit
        How the model scales and crops: maps images and S to squares.

    Raises an `ExportError` that names the size of the images if a pixel differs by more than 1/255, or if a probability for the
    same pixels differs by `TOLERANCE`.
    """
    random, largest = np.random.default_rng(0), 0.0
    for height, width in sizes(image_size):
        images = _images(random, height, width)
        squares, expected = scale(images), fit(images, image_size)
        of = f"images of {height} x {width} pixels"
        steps = int(np.abs(squares.astype(int) - expected).max()) if squares.shape == expected.shape else 255
        if steps > 1:
            raise ExportError(f"the exported graph scales {of} differently from the model: a pixel differs by {steps}/255")
        found = run(images)
        difference = float(np.abs(found - answer(squares)).max())
        if not difference < TOLERANCE:
            raise ExportError(
                f"the exported graph disagrees with the model on {of}: probabilities differ by {difference:.2g}, {TOLERANCE:g} "
                "is allowed. Nothing was written"
            )
        largest = max(largest, float(np.abs(found - answer(expected)).max()))
    return largest


def sizes(image_size: int) -> list[tuple[int, int]]:
    """Heights and widths that a file for any size is checked with: near S and far from it, narrow and wide, even and odd."""
    s = image_size
    near = [(s, s), (s + 1, s), (s, s + 1), (2 * s, 2 * s), (3 * s, 2 * s), (2 * s, 3 * s + 1), (max(1, s // 2), s)]
    return [*near, (1, 1), (1, 3 * s), (7 * s, s + 3), (97, 503), (480, 640), (640, 480), (768, 576), (1080, 1920)]


def _images(random: np.random.Generator, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Two images, or one of a large size: patches of colours with noise, so that there is something to see at any size."""
    n = 2 if height * width < 2**18 else 1
    rows, columns = np.arange(height) * 8 // height, np.arange(width) * 8 // width
    patches = random.integers(0, 256, (n, 3, 8, 8), np.int16)[:, :, rows][..., columns]
    noisy = patches + random.integers(-64, 65, (n, 3, height, width), np.int16)
    return noisy.clip(0, 255).astype(np.uint8)
