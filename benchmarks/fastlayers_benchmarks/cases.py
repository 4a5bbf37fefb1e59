"""What is measured: calls of one fused layer, as a grid of cases, and the tensors of a case."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastlayers import pooling

Phase = Literal["forward", "forward+backward", "eval"]
PHASES: tuple[Phase, ...] = get_args(Phase)

Grid = Literal["quick", "default", "full", "gpu"]
GRIDS: tuple[Grid, ...] = get_args(Grid)

SHAPES = (
    (100, 1024),
    (100, 256, 32, 32),
    (100, 1024, 11, 11),
    (128, 64, 32, 32),
    (128, 128, 16, 16),
    (128, 256, 8, 8),
    (128, 512, 4, 4),
    (32, 256, 56, 56),
    (32, 2048, 7, 7),
    (4, 32, 256, 256),
    (1, 3, 512, 512),
    (2, 16, 8, 8),
)
QUICK_SHAPES = ((100, 1024), (128, 256, 8, 8), (128, 512, 4, 4), (2, 16, 8, 8))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DROP_PS = (0.0, 0.5)
ACTS = ("relu", "gelu")


Window = tuple[int, int, int]


@dataclass(frozen=True)
class Variant:
    """Everything about a case but its shape and layout."""

    dtype: str = "float32"
    drop_p: float = 0.5
    act: str = "relu"
    residual: bool = False
    #: Kernel, stride and padding of the max-pool behind it.
    pool: Window | None = None


BASE = Variant()
# The base and, from it, one step in each direction: the full product takes hours.
STAR = (
    BASE,
    Variant(drop_p=0.0),
    Variant(dtype="bfloat16"),
    Variant(dtype="bfloat16", drop_p=0.0),
    Variant(drop_p=0.0, residual=True),
    Variant(act="gelu"),
)
QUICK_VARIANTS = (BASE, Variant(drop_p=0.0))

# Max-pool behind the layer, as in the convolutional networks of the studies. Shapes with their pools.
POOLED_SHAPES = (
    ((100, 256, 32, 32), (5, 3, 2)),
    ((100, 64, 32, 32), (5, 3, 2)),
    ((100, 64, 32, 32), (2, 2, 0)),
    ((128, 64, 28, 28), (2, 2, 0)),
)
QUICK_POOLED_SHAPES = POOLED_SHAPES[-1:]
POOLED_BASE = Variant(drop_p=0.4)
# GELU is evaluated before the maximum is taken, ReLU after it.
POOLED_STAR = (
    POOLED_BASE,
    Variant(drop_p=0.0),
    Variant(dtype="bfloat16", drop_p=0.4),
    Variant(drop_p=0.4, act="gelu"),
)

# Of the "gpu" grid. Tensors of 200 MB and more, which no cache holds, by dtype; and one that stays on chip.
LARGE_SHAPES = {
    "float32": ((64, 256, 56, 56), (128, 64, 112, 112)),
    "bfloat16": ((128, 256, 56, 56), (128, 64, 112, 112)),
}
ON_CHIP_SHAPE = (128, 128, 16, 16)


@dataclass(frozen=True)
class Case:
    """One layer on one kind of tensor.

    Attributes:
        shape: (N, C), where dropout is by element, or (N, C, H, W), where it is by channel.
        layout: a name of LAYOUTS; for (N, C) always "contiguous".
    """

    shape: tuple[int, ...]
    layout: str = "contiguous"
    variant: Variant = BASE

    @property
    def name(self) -> str:
        """Such as "128x64x32x32-channels_last-float32-p0.5-relu"; "-residual" or "-pool5-3-2" where there is one."""
        v = self.variant
        layout = [self.layout] if len(self.shape) > 2 else []
        parts = ["x".join(map(str, self.shape)), *layout, v.dtype, f"p{v.drop_p:g}", v.act]
        pool = ["pool" + "-".join(map(str, v.pool))] if v.pool else []
        return "-".join(parts + ["residual"] * v.residual + pool)

    @property
    def about(self) -> dict[str, Any]:
        """What it is made of, as a record has it; the pool as "5/3/2", or empty."""
        pool = "/".join(map(str, self.variant.pool or ()))
        return {"shape": list(self.shape), "layout": self.layout, **asdict(self.variant), "pool": pool}

    @property
    def elements(self) -> int:
        """Elements of one full-size tensor."""
        return torch.Size(self.shape).numel()

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.variant.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of one full-size tensor."""
        return self.elements * self.itemsize

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of what the layer gives: that of the input, or the pooled one."""
        pool = pooling.resolve(self.pool_layer(), len(self.shape) - 2)
        return self.shape if pool is None else (*self.shape[:2], *pool.output_size(self.shape[2:]))

    def pool_layer(self) -> nn.MaxPool2d | None:
        """Torch's layer for the max-pool; None where there is none."""
        return None if self.variant.pool is None else nn.MaxPool2d(*self.variant.pool)

    def drop_p(self, phase: Phase) -> float:
        """The probability of dropping: none in evaluation."""
        return 0.0 if phase == "eval" else self.variant.drop_p


def grid(kind: Grid = "default") -> list[Case]:
    """The cases of a grid.

    "quick" has a few small shapes, "default" six variants of each shape and layout, "full" the product of all choices,
    and "gpu" large tensors, some that stay on chip, and small ones, of which launches take most of the time. Each has
    some with max-pool at its end.
    """
    if kind == "gpu":
        return _gpu_grid()
    if kind == "quick":
        return _product(QUICK_SHAPES, QUICK_VARIANTS) + _pooled(QUICK_POOLED_SHAPES, (POOLED_BASE,))
    if kind == "default":
        return _product(SHAPES, STAR) + _pooled(POOLED_SHAPES, POOLED_STAR)
    full = [Variant(*values) for values in itertools.product(DTYPES, DROP_PS, ACTS, (False, True))]
    pooled = [Variant(*values) for values in itertools.product(DTYPES, (0.0, POOLED_BASE.drop_p), ACTS)]
    return _product(SHAPES, full) + _pooled(POOLED_SHAPES, pooled)


def _gpu_grid() -> list[Case]:
    sized = [
        Case(shape, layout, Variant(dtype=dtype))
        for layout in LAYOUTS
        for dtype, shapes in LARGE_SHAPES.items()
        for shape in (*shapes, ON_CHIP_SHAPE)
    ]
    others = [
        Case((100, 1024)),
        Case((2, 16, 8, 8)),
        Case((128, 512, 4, 4), variant=Variant(dtype="bfloat16")),
        Case((32, 256, 56, 56), "channels_last", Variant(dtype="bfloat16", drop_p=0.0, residual=True)),
    ]
    return sized + others + _pooled(POOLED_SHAPES, (POOLED_BASE,))


def _pooled(shapes: Iterable[tuple[tuple[int, ...], Window]], variants: Sequence[Variant]) -> list[Case]:
    """Each shape with its pool, in both layouts and all variants."""
    return [
        case
        for shape, pool in shapes
        for case in _product([shape], [replace(variant, pool=pool) for variant in variants])
    ]


def _product(shapes: Sequence[tuple[int, ...]], variants: Sequence[Variant]) -> list[Case]:
    return [
        Case(shape, layout, variant)
        for shape in shapes
        for layout in (LAYOUTS if len(shape) > 2 else ("contiguous",))
        for variant in variants
    ]


SEED = 20


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. `input` and `residual` need gradients, as in the middle of a network.

    `grad_output` is of the output's shape, which is smaller than the input's where there is a max-pool.
    """

    input: Tensor
    residual: Tensor | None
    grad_output: Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normally distributed tensors, the same ones at each call, all of the case's layout and dtype."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(shape: tuple[int, ...] = case.shape) -> Tensor:
        values = torch.randn(shape, generator=generator)
        layout = LAYOUTS[case.layout]
        return values.to(device, DTYPES[case.variant.dtype]).contiguous(memory_format=layout)

    input = (normal() * 2 + 1).requires_grad_()
    residual = normal().requires_grad_() if case.variant.residual else None
    return Inputs(input, residual, normal(case.output_shape))
