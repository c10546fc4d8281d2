"""Naive rehearsal: cross-entropy on new and stored images alike."""

from __future__ import annotations

from benchmarks.yardsticks.coreset import CoresetMethod


class Rehearsal(CoresetMethod):
    name = "rehearsal"
