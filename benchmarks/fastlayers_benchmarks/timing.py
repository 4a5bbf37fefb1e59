"""Time: calls of several contenders in turn, and what is said of the samples."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

SHORTEST_SAMPLE = 200e-6  # seconds; of shorter calls, several make one sample


class Quantiles(NamedTuple):
    """The median, and between which values the middle three fifths lie."""

    median: float
    q20: float
    q80: float

    @property
    def spread(self) -> float:
        """How wide the middle is."""
        return self.q80 - self.q20


def quantiles(values: Sequence[float]) -> Quantiles:
    """Of at least one value."""
    median, q20, q80 = np.quantile(np.asarray(values), (0.5, 0.2, 0.8))
    return Quantiles(float(median), float(q20), float(q80))


def outliers(samples: Sequence[float]) -> int:
    """How many samples are slower than the 80 % quantile by more than three times the middle's width."""
    q = quantiles(samples)
    return sum(sample > q.q80 + 3 * q.spread for sample in samples)


@dataclass(frozen=True)
class Run:
    """One contender's call.

    Attributes:
        call: what is timed.
        reset: what puts everything back as it was, untimed on CPU.
        active: makes the context in which both run.
    """

    call: Callable[[], object]
    reset: Callable[[], object] = lambda: None
    active: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def measure(runs: Mapping[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call, `rounds` samples of each run. Another run begins each round.

    Each run is called twice before: once to warm up, once to tell how many calls make a sample.
    """
    sample = _sample_on_cuda if device.type == "cuda" else _sample_on_cpu
    repeats = {}
    for name, run in runs.items():
        with run.active():
            sample(run, 1)
            repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / sample(run, 1)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with runs[name].active():
                samples[name].append(sample(runs[name], repeats[name]))
    return samples


def _sample_on_cpu(run: Run, repeats: int) -> float:
    seconds = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        run.call()
        seconds += time.perf_counter() - started
        run.reset()
    return seconds / repeats


def _sample_on_cuda(run: Run, repeats: int) -> float:
    # Not call by call: a host that waited for each would add its own latency to it.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        torch.compiler.cudagraph_mark_step_begin()
        run.call()
        run.reset()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / repeats


def captured(call: Callable[[], object], reset: Callable[[], object]) -> Callable[[], object]:
    """What `call` does on the GPU, as the replay of a CUDA graph that is captured at the first use.

    `reset` is called between the calls that warm up, as torch asks for, and before the one that is captured.
    """
    graph: torch.cuda.CUDAGraph | None = None

    def replay() -> None:
        nonlocal graph
        if graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
                    reset()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
        graph.replay()

    return replay


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`call`, returning only when `device` has done its work, for clocks that know nothing of devices."""
    if device.type != "cuda":
        return call

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return call_and_wait
