"""What the properties in tests/fuzz have found, each as small as it can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlayers as fl
from tests.layouts import LAYOUTS

INF, NAN = math.inf, math.nan
f32, f64 = torch.float32, torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


def _channel_of_eight(values: float, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> Tensor:
    """Channels far from zero beside their spread, the first with `values` in it."""
    x = torch.randn(shape, dtype=f64, generator=torch.Generator().manual_seed(0)) + 1e6
    x[0, 0] = values
    return LAYOUTS[layout](x.to(dtype))


@pytest.mark.parametrize("special", [NAN, INF])
@pytest.mark.parametrize("shape", [(64, 8), (16, 8, 3, 3), (8, 8, 20, 20)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_a_poisoned_channel_leaves_its_neighbours_as_exact(
    dtype: torch.dtype, layout: str, shape: tuple[int, ...], special: float, capability: str
) -> None:
    """Their statistics were once taken without a shift, as (mean of squares) - (square of mean)."""
    results = []
    for value in (special, 0.0):
        running = torch.zeros(8, dtype=dtype), torch.ones(8, dtype=dtype)
        y = fl.functional.batch_norm(
            _channel_of_eight(value, dtype, layout, shape), *running, training=True, momentum=1.0
        )
        results.append([y[:, 1:], *(r[1:] for r in running)])
    for poisoned, healthy in zip(*results, strict=True):
        assert torch.equal(poisoned, healthy)


@pytest.mark.parametrize("z", [-80.0, -88.0, -88.72, -88.8, -100.0, -INF])
def test_an_exponential_that_overflows(z: float, capability: str) -> None:
    """Of CELU with a negative alpha, which once stopped growing at exp(88)."""
    x = torch.full((1, 20), z)
    got = fl.functional.batch_norm_act(x, torch.zeros(20), torch.ones(20), eps=0.0, act=nn.CELU(-1.0))
    torch.testing.assert_close(got.double(), F.celu(x.double(), -1.0).float().double(), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize(("weight", "var"), [(INF, 1.0), (-INF, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_an_infinite_scale(dtype: torch.dtype, weight: float, var: float, capability: str) -> None:
    """Infinities of the deviations' signs, as by the definition; the mean's rounding once made them NaN."""
    x = torch.tensor([[-2.0], [3.0]], dtype=dtype).expand(2, 20)
    mean, variances, weights = (torch.full((20,), v, dtype=dtype) for v in (0.1, var, weight))
    for running_mean in (mean, torch.zeros_like(mean)):
        got = fl.functional.batch_norm(x, running_mean, variances, weights, eps=0.0)
        assert torch.equal(got, fl.reference.batch_norm(x, running_mean, variances, weights, eps=0.0))


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 3, 3), (2, 3, 12, 12)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_infinite_gradient(training: bool, shape: tuple[int, ...], capability: str) -> None:
    """That of the weight is infinite, as torch's, where it once was NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad_output = torch.ones(shape)
    grad_output[0, 1].view(-1)[0] = INF
    found = []
    for functions in (fl.functional, F):
        weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
        y = functions.batch_norm(x, torch.zeros(3), torch.ones(3), weight, bias, training)
        found.append(torch.stack(torch.autograd.grad(y, [weight, bias], grad_output)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e20, 1e25, 1e30])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 6), (5, 4, 13, 13)], ids=str)
def test_gradients_of_tiny_and_huge_spreads(shape: tuple[int, ...], size: float, capability: str) -> None:
    """A coefficient that goes with the inverse square of the spread once overflowed, or was lost."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = []
    for functions, dtype in ((fl.functional, f32), (fl.reference, f64)):
        leaf = x.to(dtype).requires_grad_()
        y = functions.batch_norm(leaf, None, None, training=True, eps=1e-60)
        found.append(torch.autograd.grad(y, leaf, grad_output.to(dtype))[0].double() * size)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def _strided(values: Tensor) -> Tensor:
    """The same, every third element of a tensor that is NaN between them."""
    memory = torch.full((3 * len(values),), NAN)
    memory[::3] = values
    return memory[::3]


@pytest.mark.parametrize("strided", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5, 2)], ids=str)
def test_parameters_with_strides(shape: tuple[int, ...], layout: str, training: bool, strided: str) -> None:
    """Where channels are adjacent, torch's backward takes them to be contiguous; small layers go to torch's kernels."""
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    found = []
    for stretch in (False, True):
        layer = fl.BatchNorm1d(4) if len(shape) == 2 else fl.BatchNorm2d(4)
        for i, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            values = torch.rand(4, generator=torch.Generator().manual_seed(i)) + 0.5
            values = _strided(values) if stretch and name == strided else values
            setattr(layer, name, nn.Parameter(values) if i < 2 else values)
        leaf = x.detach().requires_grad_()
        y = layer.train(training)(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, layer.weight, layer.bias])])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (3, 4, 1, 5), (3, 4, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "channels_first"])
def test_images_one_element_wide(shape: tuple[int, ...], layout: str, grad_layout: str) -> None:
    """They are contiguous and channels_last at once, and torch's backward takes one for the other."""
    layer = fl.BatchNorm2d(4) if len(shape) == 4 else fl.BatchNorm3d(4)
    x, grad_output = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    leaf = LAYOUTS[layout](x).requires_grad_()
    y = layer(leaf)
    got = torch.autograd.grad(y, leaf, LAYOUTS[grad_layout](grad_output))[0]
    exact = x.double().requires_grad_()
    expected = fl.reference.batch_norm(exact, None, None, training=True)
    torch.testing.assert_close(
        got.double(), torch.autograd.grad(expected, exact, grad_output.double())[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("eps", [-1e-3, -INF])
def test_a_negative_eps_in_evaluation(eps: float, backend: str) -> None:
    """As in torch since 2.13."""
    with fl.use_backend(backend):
        for call in (
            lambda: fl.functional.batch_norm(torch.ones(2, 3), torch.ones(3), torch.ones(3), eps=eps),
            lambda: fl.BatchNormAct1d(3, eps=eps).eval()(torch.ones(2, 3)),
        ):
            with pytest.raises(ValueError, match="eps must be non-negative"):
                call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d", "dropout3d"])
@pytest.mark.parametrize(("size", "p"), [(0, 0.5), (3, 1.0)])
def test_dropouts_that_draw_nothing_take_any_dtype(size: int, p: float, name: str, dtype: torch.dtype) -> None:
    x = torch.ones((size, 3, 4) if name == "dropout1d" else (size, 3, 4, 5), dtype=dtype)
    assert torch.equal(getattr(fl.functional, name)(x, p), getattr(F, name)(x, p))


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize(
    "count", [torch.tensor(3.0), torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)], ids=str
)
def test_a_count_that_is_none(count: Tensor, backend: str) -> None:
    """It was counted up by the reference, and refused by the kernels."""
    statistics = torch.zeros(3), torch.ones(3)
    with fl.use_backend(backend), pytest.raises(RuntimeError, match="num_batches_tracked should be one int64"):
        fl.functional.batch_norm_act(torch.randn(2, 3), *statistics, training=True, num_batches_tracked=count)
    assert not statistics[0].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("beta", "threshold"), [(0.5, 0.0), (2.0, 5.0), (1.0, 10.0), (1.0, 20.0), (-1.0, 5.0)])
def test_a_pool_behind_a_softplus_that_falls(beta: float, threshold: float, layout: str, capability: str) -> None:
    """At its threshold; the largest input of a window was once taken for the largest output."""
    at = threshold / beta
    z = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(0)) * 0.01 + at
    x = LAYOUTS[layout](z).requires_grad_()
    exact = z.double().requires_grad_()
    act, pool = nn.Softplus(beta, threshold), nn.MaxPool2d(3, 2, 1)
    got = fl.functional.batch_norm_act(x, torch.zeros(4), torch.ones(4), eps=0.0, act=act, pool=pool)
    expected = pool(act(exact))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(y.sum(), leaf)[0].double() for y, leaf in ((got, x), (expected, exact))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_statistics_and_their_count_on_different_devices(backend: str) -> None:
    """Either may be the wrong one, so the error names both."""
    mean, var = torch.zeros(3, device="meta"), torch.ones(3)
    with fl.use_backend(backend), pytest.raises(RuntimeError, match="int64 on meta, as running_mean is, but"):
        fl.functional.batch_norm_act(torch.randn(2, 3), mean, var, training=True, num_batches_tracked=torch.tensor(0))


_X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda f: f.batch_norm(None, None, None), TypeError, "'input' must be Tensor, not NoneType"),
        (lambda f: f.batch_norm(_X, None, None, [1.0] * 3, None, True), TypeError, "'weight' must be Tensor, not list"),
        (lambda f: f.batch_norm(_X, 1.0, torch.ones(3)), TypeError, "'running_mean' must be Tensor, not float"),
        (lambda f: f.batch_norm_act(_X, None, None, training=True, residual=1), TypeError, "'residual' must be Tensor"),
        (lambda f: f.batch_norm(_X, None, None, training=True, eps="1e-5"), TypeError, "'eps' must be float, not str"),
        (lambda f: f.batch_norm(_X, torch.ones(3), torch.ones(3), eps=None), TypeError, "'eps' must be float"),
        (
            lambda f: f.batch_norm(_X, None, None, torch.ones(3).to_sparse(), training=True),
            NotImplementedError,
            "weight: layout torch.sparse_coo",
        ),
        (
            lambda f: f.batch_norm_act(_X, None, None, training=True, residual=_X.to_sparse()),
            NotImplementedError,
            "residual: layout torch.sparse_coo",
        ),
        (
            lambda f: f.batch_norm_act(_X, None, None, training=True, act="elu", act_kwargs={"alpha": "1"}),
            TypeError,
            "act_kwargs: alpha should be a number, but got '1'",
        ),
        (lambda f: f.dropout([1.0], 0.5), TypeError, "'input' must be Tensor, not list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_types(call: Callable[[Any], object], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as raised:
        call(fl.functional)
    assert says in str(raised.value)
