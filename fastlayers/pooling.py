"""Max-pooling behind the fused layers: its parameters, its sizes, and how torch's layers are read as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

#: Positions inside a window are kept in one byte each.
MOST_POSITIONS = 256

_FUNCTIONS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
#: Torch's layers, and how many spatial dimensions each has.
MODULES: Mapping[type[nn.Module], int] = MappingProxyType({nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3})
#: What a `Pool` is made of, in the order of torch's arguments.
KEYWORDS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


@dataclass(frozen=True)
class Pool:
    """`torch.nn.functional.max_pool1d`, 2d or 3d with these parameters, one number for each spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    @property
    def dims(self) -> int:
        """How many spatial dimensions it has."""
        return len(self.kernel_size)

    @property
    def positions(self) -> int:
        """How many elements a window has."""
        count = 1
        for size in self.kernel_size:
            count *= size
        return count

    @property
    def is_fusible(self) -> bool:
        """Whether the kernels take it: one or two dimensions, and positions that fit in a byte."""
        return self.dims <= 2 and self.positions <= MOST_POSITIONS

    @property
    def window(self) -> list[int]:
        """What the operators take: kernel, stride, padding, dilation, each of height and width (height 1 in 1d)."""
        missing = 2 - self.dims
        heights = ((1, self.kernel_size), (1, self.stride), (0, self.padding), (1, self.dilation))
        return [number for of_height, values in heights for number in ((of_height,) * missing + values)]

    def apply(self, input: Tensor) -> Tensor:
        """The pooled `input` (N, C, ...), by torch."""
        result: Tensor = _FUNCTIONS[self.dims](
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )
        return result

    def output_size(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of what comes out, for those of the input."""
        per_dim = zip(spatial, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple(_output_size(*numbers, self.ceil_mode) for numbers in per_dim)

    def __str__(self) -> str:
        described = ", ".join(f"{name}={_short(getattr(self, name))}" for name in KEYWORDS[:-1])
        return f"MaxPool{self.dims}d({described}, ceil_mode={self.ceil_mode})"


#: What a pool may be given as: `Pool`, torch's layer, or the keyword arguments of one.
PoolLayer = Pool | nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d | Mapping[str, Any] | None


def _short(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else values


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """As torch: with `ceil_mode`, a last window may go beyond the input, but starts in it or before it."""
    last_start = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (last_start + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def resolve(pool: PoolLayer, dims: int, name: str = "pool") -> Pool | None:
    """What `pool` means for inputs with `dims` spatial dimensions.

    Args:
        pool: a `Pool`; `nn.MaxPool1d`, 2d or 3d (not a subclass: its forward may be another function); a mapping of
            their keyword arguments; or None.
        dims: 1, 2 or 3.
        name: of the argument, for errors.

    Raises:
        TypeError: another type, or numbers that are no integers.
        ValueError: another number of dimensions, an unknown or a missing keyword, `return_indices`, or numbers that
            torch does not take.
    """
    if pool is None:
        return None
    if isinstance(pool, Pool):
        resolved = pool
    elif isinstance(pool, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) and type(pool) in MODULES:
        if pool.return_indices:
            raise ValueError(f"{name}: {pool!r} returns indices, which a fused layer does not; allowed: without")
        resolved = _pool(MODULES[type(pool)], {key: getattr(pool, key) for key in KEYWORDS}, name)
    elif isinstance(pool, Mapping):
        resolved = _pool(dims, pool, name)
    else:
        allowed = "nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, a mapping of their keyword arguments, or None"
        raise TypeError(f"{name}: cannot fuse {pool!r}; allowed: {allowed}")
    if resolved.dims != dims:
        raise ValueError(f"{name}: {resolved} is for {resolved.dims} spatial dimensions, not {dims}")
    return resolved


def _pool(dims: int, given: Mapping[str, Any], name: str) -> Pool:
    unknown = sorted(set(given) - set(KEYWORDS))
    if unknown:
        raise ValueError(f"{name}: unknown {', '.join(unknown)}; allowed: {', '.join(KEYWORDS)}")
    if given.get("kernel_size") is None:
        raise ValueError(f"{name}: kernel_size is missing in {dict(given)}")

    def numbers(key: str, default: Any, least: int) -> tuple[int, ...]:
        value = given.get(key)
        return _numbers(default if value is None else value, dims, least, f"{name}: {key}")

    kernel_size = numbers("kernel_size", None, 1)
    padding, dilation = numbers("padding", 0, 0), numbers("dilation", 1, 1)
    if any(2 * pad > size for size, pad in zip(kernel_size, padding, strict=True)):
        raise ValueError(
            f"pad should be smaller than or equal to half of kernel size, but got {name}: padding={padding}, "
            f"kernel_size={kernel_size}"
        )
    # As in torch, no stride, or an empty one, is the kernel's size.
    stride = kernel_size if given.get("stride") in (None, (), []) else numbers("stride", None, 1)
    return Pool(kernel_size, stride, padding, dilation, bool(given.get("ceil_mode", False)))


def _numbers(value: Any, dims: int, least: int, name: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,) * dims
    if len(values) == 1:
        values *= dims
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError(f"{name}: should be one integer or {dims}, but got {value!r}")
    if len(values) != dims or min(values) < least:
        raise ValueError(f"{name}: should be one integer or {dims}, at least {least}, but got {value!r}")
    return values
