"""The kernels' vector functions on their own: units in the last place, and every 16-bit float."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.oracle import kinds

# The first of them may have to compile all kernels.
pytestmark = pytest.mark.timeout(1200)

INF = float("inf")

# Function, interval, the largest error in units in the last place.
MATH = [
    ("exp", -INF, INF, 1.1),
    ("expm1", -INF, INF, 1.8),
    ("log1p", 0.0, 1.0, 2.1),
    ("tanh", -INF, INF, 2.2),
    ("erf", -INF, INF, 1.3),
]


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest, cpp: ModuleType) -> str:
    """An instruction set that was compiled and that this processor has."""
    name: str = request.param
    if name not in cpp.instruction_sets():
        pytest.skip(f"{name} was not compiled or is not offered by this processor")
    return name


def _floats(low: float, high: float) -> Tensor:
    """Floats between both: of all magnitudes, subnormal ones too; dense from -100 to 100; infinities."""
    magnitudes = torch.arange(0, 0x7F800000, 0x7F800000 // 1_000_000, dtype=torch.int32).view(torch.float32)
    x = torch.cat((-magnitudes, magnitudes, torch.linspace(-100, 100, 2_000_001), torch.tensor([-INF, INF])))
    return x[(x >= low) & (x <= high)]


def _ulp(x: Tensor) -> Tensor:
    """The distance of floats at `x`, float64; that of the smallest normal number below it."""
    exponent = torch.frexp(x.abs().clamp_min(torch.finfo(torch.float32).smallest_normal)).exponent
    return torch.ldexp(torch.ones_like(x), exponent - 24)


@pytest.mark.parametrize(("name", "low", "high", "allowed"), MATH, ids=[row[0] for row in MATH])
def test_units_in_the_last_place(name: str, low: float, high: float, allowed: float, isa: str, cpp: ModuleType) -> None:
    x = _floats(low, high)
    exact: Tensor = getattr(torch, name)(x.double())
    got = torch.from_numpy(getattr(cpp, name)(isa, x.numpy()))
    finite = exact.float().isfinite()
    assert torch.equal(kinds(got[~finite]), kinds(exact.float()[~finite]))
    error = (got.double() - exact)[finite].abs() / _ulp(exact[finite])
    worst = int(error.argmax())
    assert error[worst] <= allowed, f"{error[worst]:.3f} units in the last place at {x[finite][worst]}"


@pytest.mark.parametrize("name", [row[0] for row in MATH])
def test_nan_stays(name: str, isa: str, cpp: ModuleType) -> None:
    x = torch.tensor([float("nan"), 0.5, float("nan")])
    assert torch.from_numpy(getattr(cpp, name)(isa, x.numpy())).isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("name", [row[0] for row in MATH])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 31])
def test_every_lane(name: str, length: int, isa: str, cpp: ModuleType) -> None:
    """A value does not depend on its place, nor on whether its vector is full."""
    x = torch.linspace(0, 1, length)
    whole = getattr(cpp, name)(isa, x.numpy()).tolist()
    assert whole == [getattr(cpp, name)(isa, x[i : i + 1].numpy())[0] for i in range(length)]


HALVES = [("bf16", torch.bfloat16), ("f16", torch.float16)]
ALL_BITS = torch.arange(65536, dtype=torch.int32).to(torch.uint16)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, or NaN in both."""
    integers = torch.int32 if a.dtype == torch.float32 else torch.int16
    return bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_all_halves_to_float(name: str, dtype: torch.dtype, isa: str, cpp: ModuleType) -> None:
    got = torch.from_numpy(getattr(cpp, f"from_{name}")(isa, ALL_BITS.numpy()))
    assert _same(got, ALL_BITS.view(dtype).float())


def _rounded(name: str, dtype: torch.dtype, x: Tensor, isa: str, cpp: ModuleType) -> Tensor:
    return torch.from_numpy(getattr(cpp, f"to_{name}")(isa, x.numpy())).view(dtype)


def _next(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, INF))


def _previous(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -INF))


@pytest.mark.parametrize(("name", "dtype"), HALVES)
@pytest.mark.parametrize("between", [lambda a, b: a, lambda a, b: (a + b) / 2, lambda a, b: _next((a + b) / 2),
                                     lambda a, b: _previous((a + b) / 2), lambda a, b: _next(a)],
                         ids=["exact", "tie", "above a tie", "below a tie", "just above"])  # fmt: skip
def test_rounding_to_every_half(
    between: Callable[[Tensor, Tensor], Tensor], name: str, dtype: torch.dtype, isa: str, cpp: ModuleType
) -> None:
    """To nearest, ties to even, as torch rounds; from subnormal numbers to those that round to infinity."""
    halves = ALL_BITS.view(dtype).float()
    halves = halves[halves.isfinite()].sort().values
    x = between(halves[:-1], halves[1:])
    assert _same(_rounded(name, dtype, x, isa, cpp), x.to(dtype))


@pytest.mark.parametrize(("name", "dtype"), HALVES)
def test_rounding_of_what_is_no_half(name: str, dtype: torch.dtype, isa: str, cpp: ModuleType) -> None:
    """Too large, infinite and NaN of every payload; and floats of all magnitudes."""
    payloads = torch.arange(0x7F800000, 0x7FFFFFFF, 4099, dtype=torch.int32).view(torch.float32)
    largest = torch.tensor([torch.finfo(dtype).max, torch.finfo(torch.float32).max, INF])
    x = torch.cat((payloads, -payloads, largest, _next(largest), -largest, _floats(-INF, INF)))
    assert _same(_rounded(name, dtype, x, isa, cpp), x.to(dtype))
