"""`fastlayers info`: versions, what was compiled, and which backend serves each op and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import click
import torch

import fastlayers as fl
from fastlayers import activations, dtypes, plans

BACKEND_COLUMNS = ("op", "device", "backend", "why")


def collect() -> dict[str, Any]:
    """The facts that `fastlayers info` prints.

    "versions", "build" and "run time" map names to values; "backends" lists rows of
    BACKEND_COLUMNS.
    """
    return {
        "versions": _versions(),
        "build": dict(fl.ops.build_info()),
        "run time": _run_time(),
        "backends": list(fl.backends.explain()),
    }


def _versions() -> dict[str, str]:
    return {
        "fastlayers": fl.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": installed_version("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def installed_version(package: str) -> str:
    """The version of a package, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _run_time() -> dict[str, str]:
    lowered = os.environ.get("FASTLAYERS_CPU_CAPABILITY")
    reason = f"FASTLAYERS_CPU_CAPABILITY={lowered}" if lowered else "the best of this CPU and build"
    return {
        "instruction set": f"{fl.ops.cpu_capability()} ({reason})",
        "dropout masks": _mask_drawing(),
        "threads": str(torch.get_num_threads()),
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backend": fl.get_backend(),
    }


def _mask_drawing() -> str:
    if fl.masks.predicts_bernoulli():
        return "MT19937 in vectors, from the state of torch's CPU generator (it draws what bernoulli_ draws)"
    return "bernoulli_ (it draws other numbers than MT19937 in vectors: on Intel processors, torch draws through MKL)"


def render(facts: Mapping[str, Any]) -> str:
    """The result of `collect` as text."""
    sections = [_section(title, values) for title, values in facts.items() if isinstance(values, Mapping)]
    return "\n\n".join([*sections, _table([BACKEND_COLUMNS, *facts["backends"]])])


def _section(title: str, values: Mapping[str, Any]) -> str:
    rows = [(name.replace("_", " "), _text(value)) for name, value in values.items()]
    return f"{title}\n{_table(rows)}"


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text or "none"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` with their columns aligned, indented by two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _shape(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Reads sizes with commas between them."""
    if value is None:
        return None
    sizes = value.split(",")
    if len(sizes) < 2 or not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise click.BadParameter(
            f"{value!r} should be at least two positive sizes with commas between, as 128,64,32,32"
        )
    return tuple(int(size) for size in sizes)


def _pool(context: click.Context, parameter: click.Parameter, value: str | None) -> dict[str, int] | None:
    """The numbers of ``--pool``."""
    if value is None:
        return None
    numbers = value.split(",")
    if not 1 <= len(numbers) <= 3 or not all(number.strip().isdecimal() for number in numbers):
        raise click.BadParameter(f"{value!r} should be a kernel size, stride and padding with commas between, as 5,3,2")
    return dict(zip(("kernel_size", "stride", "padding"), map(int, numbers), strict=False))


def explanation(shape: tuple[int, ...], dtype: str, layout: str, act: str, pool: dict[str, int] | None) -> str:
    """What ``--explain`` prints."""
    gpu = plans.current_gpu()
    try:
        rows = plans.explain(shape, getattr(torch, dtype), layout, act, gpu, pool)
    except (ValueError, RuntimeError) as error:  # sizes and a pool that do not go together
        raise click.UsageError(str(error)) from error
    what = ", ".join(["x".join(map(str, shape)), dtype, layout, act, *([] if pool is None else [f"pool {pool}"])])
    title = f"CUDA kernels of {gpu.name} for {what}"
    return f"{title}\n{_table(rows)}"


@click.command(short_help="Versions, what was compiled, and backends.")
@click.option(
    "--explain",
    "shape",
    metavar="SHAPE",
    callback=_shape,
    help="Instead, say which CUDA kernels serve a tensor (N,C,...), and why. Without a GPU: those of an H200.",
)
@click.option(
    "--dtype",
    type=click.Choice([str(d).removeprefix("torch.") for d in dtypes.SUPPORTED]),
    default="float32",
    show_default=True,
    help="With --explain.",
)
@click.option(
    "--layout", type=click.Choice(plans.LAYOUTS), default="contiguous", show_default=True, help="With --explain."
)
@click.option("--act", type=click.Choice(sorted(activations.NAMES)), default="relu", show_default=True,
              help="With --explain.")  # fmt: skip
@click.option("--pool", metavar="KERNEL[,STRIDE[,PADDING]]", callback=_pool,
              help="With --explain: max-pooling behind the layer.")  # fmt: skip
def info(shape: tuple[int, ...] | None, dtype: str, layout: str, act: str, pool: dict[str, int] | None) -> None:
    """Shows versions, what was compiled, and which backend serves each op and why."""
    click.echo(render(collect()) if shape is None else explanation(shape, dtype, layout, act, pool))
