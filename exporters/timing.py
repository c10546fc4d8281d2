"""Timing graphs in turns: a latency is noisy, the ratio of two that were measured alternately is less so."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from exporters.telemetry import runtime_library

# The time of one thread alone, so that other processes do not count. Windows measures it in steps of 15 ms.
OF_THREAD = time.perf_counter if sys.platform == "win32" else time.thread_time


def in_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call, all of them made once a round; the first `warm_up` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            begin = clock()
            call()
            if number >= warm_up:
                seconds[name].append(clock() - begin)
    return {name: median(found) for name, found in seconds.items()}


def session(graph: bytes | str, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU, of a graph or of its path; with 0 threads ONNX Runtime chooses."""
    onnxruntime = runtime_library()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def latencies(
    graphs: Mapping[str, bytes], image_size: int, *, batch: int = 1, threads: int = 1, rounds: int = 30
) -> dict[str, float]:
    """Median seconds for `batch` images of each classifier that `export_onnx` made, in turns; with one thread, its CPU time."""
    images = np.random.default_rng(0).integers(0, 256, (batch, 3, image_size, image_size)).astype(np.uint8)
    sessions = {name: session(graph, threads) for name, graph in graphs.items()}

    def call(one: Any) -> Callable[[], Any]:
        return lambda: one.run(["probabilities"], {"images": images})

    clock = OF_THREAD if threads == 1 else time.perf_counter
    return in_turns({name: call(one) for name, one in sessions.items()}, rounds, clock=clock)
