"""The most memory that a call holds at one time."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch

from fastlayers_benchmarks.timing import Run


def peak_bytes(run: Run, device: torch.device) -> int:
    """Bytes that torch's allocator hands out during one call, at most at one time, above what was held before.

    Small arrays that a kernel keeps outside torch's allocator are not seen. Slow on CPU: the call is traced.
    """
    with run.active():
        run.reset()
        peak = _peak_on_cuda(run, device) if device.type == "cuda" else _peak_on_cpu(run)
        run.reset()
    return peak


def _peak_on_cuda(run: Run, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run.call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Run) -> int:
    # Otherwise the tracer announces its start and end on standard error, each time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run.call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
