"""Max-pooling behind the fused layers: its parameters, its sizes, and how torch's layers are read as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Positions inside a window are kept in one byte each.
MOST_POSITIONS = 256

_FUNCTIONS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_ALLOWED = "nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, a mapping of their keyword arguments, or None"
#: Torch's layers, and how many spatial dimensions each has.
MODULES: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
#: The arguments of torch's layers that are parameters of `Pool`.
KEYWORDS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


@dataclass(frozen=True)
class Pool:
    """`torch.nn.functional.max_pool1d`, 2d or 3d with these parameters, one number for each spatial dimension.

    Attributes:
        is_fusible: whether the operators take it: one or two dimensions, and positions that fit in a byte.
        most_dilation: the largest; inputs of that size have an element in every window.
        window: what they take: kernel, stride, padding, dilation, each of height and width (height 1 in 1d); of three
            dimensions nothing.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    # Found once: layers need them at each call.
    is_fusible: bool = field(init=False, repr=False, compare=False)
    most_dilation: int = field(init=False, repr=False, compare=False)
    window: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_fusible", self.dims <= 2 and self.positions <= MOST_POSITIONS)
        object.__setattr__(self, "most_dilation", max(self.dilation))
        object.__setattr__(self, "window", self._window() if self.dims <= 2 else ())

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

    def _window(self) -> tuple[int, ...]:
        missing = 2 - self.dims
        heights = ((1, self.kernel_size), (1, self.stride), (0, self.padding), (1, self.dilation))
        return tuple(number for of_height, values in heights for number in ((of_height,) * missing + values))

    @staticmethod
    def of_window(window: Sequence[int], ceil_mode: bool, dims: int) -> Pool:
        """The pool of 1 or 2 dimensions that has this `window`."""
        kernel_size, stride, padding, dilation = (tuple(window[i : i + 2][2 - dims :]) for i in range(0, 8, 2))
        return Pool(kernel_size, stride, padding, dilation, ceil_mode)

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
#: One for all spatial dimensions, or one for each.
Numbers = int | Sequence[int]


def _short(values: tuple[int, ...]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else values


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """As torch: with `ceil_mode`, a last window may go beyond the input, but starts in it or before it."""
    last_start = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (last_start + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def indices(pool: Pool, positions: Tensor, spatial: Sequence[int]) -> Tensor:
    """Where in the input's (H, W) or (L,), row by row, the elements are that the fused operator took.

    Args:
        pool: of one or two dimensions.
        positions: uint8, (N, C, ...) of the pooled sizes: in each window, which of its elements, counted row by row.
        spatial: the sizes of the input.

    Returns:
        int64, of the shape of `positions`: what torch's max-pooling gives with ``return_indices=True``.
    """
    within, result = positions.to(torch.int64), torch.zeros((), dtype=torch.int64, device=positions.device)
    parts = [within] if pool.dims == 1 else [within // pool.kernel_size[1], within % pool.kernel_size[1]]
    for dim, part in enumerate(parts):
        sizes = [1] * positions.dim()
        sizes[dim + 2] = -1
        starts = torch.arange(positions.shape[dim + 2], device=positions.device) * pool.stride[dim] - pool.padding[dim]
        result = result * spatial[dim] + starts.view(sizes) + part * pool.dilation[dim]
    return result


def take(input: Tensor, indices: Tensor) -> Tensor:
    """The elements of `input` (N, C, ...) at `indices`, as `indices` gives them."""
    return input.flatten(2).gather(2, indices.flatten(2)).view(indices.shape)


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
    if dims not in _FUNCTIONS:
        raise ValueError(f"{name}: {pool} is for inputs with 1, 2 or 3 spatial dimensions, not {dims}")
    if isinstance(pool, Pool):
        resolved = pool
    elif isinstance(pool, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) and type(pool) in MODULES:
        if pool.return_indices:
            raise ValueError(f"{name}: {pool} has return_indices=True; a fused layer returns none; allowed: False")
        resolved = _pool(MODULES[type(pool)], {key: getattr(pool, key) for key in KEYWORDS}, name)
    elif isinstance(pool, Mapping):
        resolved = _pool(dims, pool, name)
    else:
        raise TypeError(f"{name}: cannot fuse {pool!r}; allowed: {_ALLOWED}")
    if resolved.dims != dims:
        raise ValueError(f"{name}: {resolved} is for {resolved.dims} spatial dimensions, not {dims}")
    return resolved


def dims_of(pool: PoolLayer, name: str = "pool") -> int:
    """How many spatial dimensions `pool` itself says it has.

    Raises:
        ValueError: it does not, being keyword arguments with one number for all of them.
        TypeError: it is no pool.
    """
    if isinstance(pool, Pool):
        return pool.dims
    if isinstance(pool, Mapping):
        size = pool.get("kernel_size")
        if isinstance(size, Sequence) and len(size) in _FUNCTIONS:
            return len(size)
        raise ValueError(f"{name}: kernel_size should have one number per dimension, 1, 2 or 3, but is {size!r}")
    dims = MODULES.get(type(pool)) if isinstance(pool, nn.Module) else None
    if dims is None:
        raise TypeError(f"{name}: cannot fuse {pool!r}; allowed: {_ALLOWED}")
    return dims


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
