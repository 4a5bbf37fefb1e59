"""What is measured: calls of one fused layer, as a grid of cases, and the tensors of a case."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Variant:
    """Everything about a case but its shape and layout."""

    dtype: str = "float32"
    drop_p: float = 0.5
    act: str = "relu"
    residual: bool = False


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
        """Such as "128x64x32x32-channels_last-float32-p0.5-relu", with "-residual" at the end where there is one."""
        v = self.variant
        layout = [self.layout] if len(self.shape) > 2 else []
        parts = ["x".join(map(str, self.shape)), *layout, v.dtype, f"p{v.drop_p:g}", v.act]
        return "-".join(parts + ["residual"] * v.residual)

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

    def drop_p(self, phase: Phase) -> float:
        """The probability of dropping: none in evaluation."""
        return 0.0 if phase == "eval" else self.variant.drop_p


def grid(kind: Grid = "default") -> list[Case]:
    """The cases of a grid.

    "quick" has a few small shapes, "default" six variants of each shape and layout, "full" the product of all choices,
    and "gpu" sixteen: large tensors, some that stay on chip, and small ones, of which launches take most of the time.
    """
    if kind == "gpu":
        return _gpu_grid()
    if kind == "quick":
        return _product(QUICK_SHAPES, QUICK_VARIANTS)
    if kind == "default":
        return _product(SHAPES, STAR)
    full = [Variant(*values) for values in itertools.product(DTYPES, DROP_PS, ACTS, (False, True))]
    return _product(SHAPES, tuple(full))


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
    return sized + others


def _product(shapes: tuple[tuple[int, ...], ...], variants: tuple[Variant, ...]) -> list[Case]:
    return [
        Case(shape, layout, variant)
        for shape in shapes
        for layout in (LAYOUTS if len(shape) > 2 else ("contiguous",))
        for variant in variants
    ]


SEED = 20


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case. `input` and `residual` need gradients, as in the middle of a network."""

    input: Tensor
    residual: Tensor | None
    grad_output: Tensor


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Normally distributed tensors, the same ones at each call, all of the case's layout and dtype."""
    generator = torch.Generator().manual_seed(SEED)

    def normal() -> Tensor:
        values = torch.randn(case.shape, generator=generator)
        layout = LAYOUTS[case.layout]
        return values.to(device, DTYPES[case.variant.dtype]).contiguous(memory_format=layout)

    input = (normal() * 2 + 1).requires_grad_()
    residual = normal().requires_grad_() if case.variant.residual else None
    return Inputs(input, residual, normal())
