"""What a classifier answers for an image: the same for `Learner.predict` and `OnnxClassifier.predict`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prediction:
    """One image's answer.

    Attributes
    ----------
    label
        The most probable class name; None for an image that belongs to no known class, with `reject` only.
    score
        The probability of the most probable class, in [0, 1].
    top
        The `top_k` most probable names with their probabilities, best first.
    """

    label: str | None
    score: float
    top: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        """The name and its probability, and those after it: "cat 0.93, dog 0.05"; or "unknown (cat 0.93)"."""
        names = ", ".join(f"{name} {score:.2f}" for name, score in self.top or ((self.label, self.score),))
        return f"unknown ({names})" if self.label is None else names

    def to_dict(self) -> dict[str, Any]:
        return {"label": self.label, "score": self.score, "top": [list(pair) for pair in self.top]}
