"""How many times the design reads or writes a full-size tensor, and how fast the machine copies one.

The model is that of the design: the passes over memory that a fused layer cannot do without. Bits and per-channel
numbers are left out: a mask of one bit per element is 1/32 of a float32 pass. With p the share of dropped channels,
without a residual:

| forward + backward in training | contiguous | channels_last, (N, C) |
|---|---|---|
| data kept on chip between the two walks | 5 - p | 5 |
| data read again for the second walk | 4 + 4 (1 - p) | 8 |

Contiguous tensors are walked channel by channel, and a dropped plane is read only where its values matter: for the
statistics, and for the gradient of the input. In channels_last a cache line holds several channels, so all are read.

- Forward, first walk: the input (statistics). Second: the input again, unless it is on chip; the output is written. A
  residual is read in the second walk only, so once, and where it is dropped not at all.
- Backward, first walk: the kept planes of the input and of the output's gradient. Second: both again, unless they are
  on chip, then only what the first did not read of the input; the input's gradient is written, and the residual's. Of a
  residual, ReLU needs one bit per element, which forward saved; other activations read it wherever they read the
  output's gradient.
- Evaluation: input, and residual, are read once, and the output is written.

With max-pool at the end nothing is of the full size but the input, read for the statistics, for the output and in
backward, and its gradient. What is pooled counts by its size, f of the full one: 1/4 for windows of 2 by 2, 0.12 for
those of 5 with stride 3 on (32, 32). Forward writes the output, and for backward the largest element of each window and
its position, of one byte: f (2 + 1 / bytes of an element) in all. Backward reads as much: the output's gradient and
both of those, kept planes only in contiguous tensors; that it reads them again for its second walk is not counted, for
they fit on chip sooner than the input. So, with P for these passes over what is pooled:

| forward + backward in training, with max-pool | contiguous | channels_last |
|---|---|---|
| data kept on chip between the two walks | 3 + P (2 - p) | 3 + 2 P |
| data read again for the second walk | 3 + (1 - p) + P (2 - p) | 4 + 2 P |

What is on chip: a channel of a contiguous tensor where the input and its gradient of that channel fit in the
second-level cache of a core, that is where a channel fits in half of it; a channels_last tensor where both fit as a
whole in the caches of the threads: their second-level caches and their share of the third. On a GPU the
second-level cache is all there is, of which a channel in work has an equal share per multiprocessor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from fastlayers import activations
from fastlayers_benchmarks.cases import DTYPES, LAYOUTS, Case, Phase
from fastlayers_benchmarks.machine import CpuCaches, cpu_caches
from fastlayers_benchmarks.timing import Run

COPY_PASSES = 2  # one read, one write


@dataclass(frozen=True)
class Caches:
    """Bytes of cache: of one worker (a core or a multiprocessor), and of all that take part together."""

    per_worker: float
    together: float


def caches_of(device: torch.device) -> Caches:
    """What `device` has, on CPU for the threads that torch uses."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        size = properties.L2_cache_size
        return Caches(size / properties.multi_processor_count, size)
    return _cpu_share(cpu_caches(), torch.get_num_threads())


def _cpu_share(caches: CpuCaches, threads: int) -> Caches:
    third = caches.third * min(1.0, threads / caches.third_shared_by) if caches.third_shared_by else 0.0
    return Caches(caches.second, caches.second * threads + third)


def kept_on_chip(case: Case, caches: Caches) -> bool:
    """Whether the second walk finds in cache what the first has read."""
    if _by_rows(case):
        return 2 * case.nbytes <= caches.together
    return 2 * case.nbytes / case.shape[1] <= caches.per_worker


def _by_rows(case: Case) -> bool:
    return len(case.shape) == 2 or case.layout == "channels_last"


def passes(case: Case, phase: Phase, on_chip: bool) -> float:
    """Reads and writes of full-size tensors in one call."""
    residual = case.variant.residual
    if phase == "eval":
        return 1.0 + residual + math.prod(case.output_shape) / case.elements
    read = 1.0 if _by_rows(case) else 1 - case.variant.drop_p  # the share that a walk reads of what is dropped
    again = 0.0 if on_chip else 1.0
    if case.variant.pool:
        # The output, or its gradient; the largest elements; their positions.
        pooled = math.prod(case.output_shape) / case.elements * (2 + 1 / case.itemsize)
        forward = 1 + read * again + pooled
        return forward if phase == "forward" else forward + read * pooled + 2
    forward = 1 + read * again + 1 + read * residual
    if phase == "forward":
        return forward
    two_valued = activations.resolve(case.variant.act).derivatives is not None
    like_the_gradient = 1 + (residual and not two_valued)
    backward = 1 + read * again + read * (1 + again) * like_the_gradient + 1 + residual
    return forward + backward


def copy_run(case: Case, device: torch.device) -> Run:
    """A copy between two tensors of the case's kind that exist already: takes turns with what it is compared with."""
    layout, dtype = LAYOUTS[case.layout], DTYPES[case.variant.dtype]
    source = torch.ones(case.shape, dtype=dtype, device=device).contiguous(memory_format=layout)
    target = torch.empty_like(source)
    return Run(lambda: target.copy_(source))


def copy_rate(case: Case, samples: Sequence[float]) -> float:
    """Bytes read and written per second, by the median of a copy's times."""
    return COPY_PASSES * case.nbytes / median(samples)
