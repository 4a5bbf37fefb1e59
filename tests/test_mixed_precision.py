"""Mixed precision, 16-bit and channels_last models, beside torch's layers; and that nothing is copied on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastlayers as fl
from tests.cases import SEED

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(autouse=True, params=["auto", "cpp"])
def _backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    """By default small tensors go to torch's kernels, so all is tried with the compiled ones alone too."""
    if device.type != "cpu":
        pytest.skip("the compiled kernels of the CPU are what copies here, or does not")
    with fl.use_backend(request.param):
        yield


def _network(ours: bool, drop_p: float = 0.0, pooled: bool = False) -> nn.Module:
    """Convolution, BatchNorm, ReLU, dropout and max-pool, twice, and a head; with equal parameters for both."""
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    pool = nn.MaxPool2d(2, 1) if pooled else None
    for channels in (3, 16):
        layers.append(nn.Conv2d(channels, 16, 3, bias=False))
        if ours:
            layers.append(fl.BatchNormAct2d(16, drop_p=drop_p, pool=pool))
        else:
            layers += [nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(drop_p), pool or nn.Identity()]
    return nn.Sequential(*layers, nn.Conv2d(16, 10, 6 if pooled else 8), nn.Flatten())


def _in_format(network: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    # The overloads of `Module.to` leave this out.
    return network.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def _norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _images(memory_format: torch.memory_format, dtype: torch.dtype = torch.float32, batch: int = 8) -> Tensor:
    x = torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(SEED))
    return x.to(dtype=dtype, memory_format=memory_format)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("pooled", [False, True])
def test_autocast_trains_as_torchs_layers_do(
    pooled: bool, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """With GradScaler, and an overflow on the way that it has to notice: the same losses and scales."""
    results = []
    for ours in (True, False):
        network = _in_format(_network(ours, drop_p=0.3, pooled=pooled), memory_format)
        optimiser = torch.optim.SGD(network.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        x, labels = _images(memory_format), torch.arange(8)
        losses = []
        for step in range(6):
            torch.manual_seed(step)
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = nn.functional.cross_entropy(network(x), labels)
            scaler.scale(loss * (1e38 if step == 4 else 1)).backward()
            scaler.step(optimiser)
            scaler.update()
            losses.append(loss.detach())
        results.append(
            (
                torch.stack(losses),
                scaler.get_scale(),
                [m.running_var for m in _norms(network) if m.running_var is not None],
            )
        )
    (got, scale, variances), (expected, expected_scale, expected_variances) = results
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)
    assert expected[-1] < expected[0]
    assert scale == expected_scale
    for variance, other in zip(variances, expected_variances, strict=True):
        assert variance.dtype == torch.float32
        torch.testing.assert_close(variance, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("float32_norms", [True, False])
def test_sixteen_bit_models(dtype: torch.dtype, memory_format: torch.memory_format, float32_norms: bool) -> None:
    """`model.half()` casts parameters and statistics of torch's layers and of ours; BatchNorm may stay in float32."""
    results = []
    for ours in (True, False):
        network = _in_format(_network(ours).to(dtype), memory_format)
        if float32_norms:
            for norm in _norms(network):
                norm.float()
        x = _images(memory_format, dtype).requires_grad_()
        output = network(x)
        output.float().pow(2).mean().backward()
        state = [t for t in network.state_dict().values() if t.is_floating_point()]
        results.append([output.detach(), x.grad, *(p.grad for p in network.parameters()), *state])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        # Errors of 16-bit convolutions, which follow.
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("parameters", ["float32", "own"])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_statistics_are_of_float32(dtype: torch.dtype, parameters: str) -> None:
    """Values whose sum and squares 16 bits cannot hold: running statistics of float32 are right to float32."""
    # In float16 the sum of squares is beyond its range, and in bfloat16 a sum stops to grow after 256 equal steps.
    x = (torch.randn(64, 4, 16, 16) * 3 + 200).to(dtype)
    layer = fl.BatchNorm2d(4, momentum=1.0)
    if parameters == "own":
        layer = layer.to(dtype)
    layer(x)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    exact = x.double()
    rtol = 1e-5 if parameters == "float32" else torch.finfo(dtype).eps
    torch.testing.assert_close(layer.running_mean.double(), exact.mean((0, 2, 3)), rtol=rtol, atol=0.0)
    torch.testing.assert_close(layer.running_var.double(), exact.var((0, 2, 3)), rtol=rtol, atol=0.0)


def test_a_16_bit_layer_in_a_float32_network_raises_as_torchs() -> None:
    """Nobody casts silently."""
    for dtype in SIXTEEN_BITS:
        messages = []
        for layer in (fl.BatchNorm2d(3).to(dtype), nn.BatchNorm2d(3).to(dtype)):
            with pytest.raises(RuntimeError) as raised:
                layer(torch.randn(2, 3, 4, 4))
            messages.append(str(raised.value))
        assert messages[0].startswith(messages[1].rstrip("."))


#: Names under which torch copies tensors.
COPIES = ("aten::copy_", "aten::contiguous", "aten::clone", "aten::_to_copy")


def _copies(call: Callable[[], object], elements: int) -> Counter[str]:
    """How often `call` copies tensors of at least so many elements, by operator."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    found: Counter[str] = Counter()
    for event in profiler.events():
        sizes = [torch.Size(shape).numel() for shape in event.input_shapes or () if shape]
        if event.name in COPIES and max(sizes, default=0) >= elements:
            found[event.name] += 1
    return found


def _step(network: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Callable[[], object]:
    def step() -> None:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            output = network(x)
        output.float().sum().backward()

    return step


@pytest.mark.parametrize(("drop_p", "pooled"), [(0.0, False), (0.5, False), (0.5, True)])
@pytest.mark.parametrize("dtype", [None, *SIXTEEN_BITS])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_silent_copies(
    memory_format: torch.memory_format, dtype: torch.dtype | None, drop_p: float, pooled: bool
) -> None:
    """A step of a whole model copies full-size tensors at most as often as with torch's layers, by the profiler."""
    # Beyond what goes to torch's kernels; the smallest full-size tensor has 16 channels of 8 x 8.
    batch = 160
    x, counts = _images(memory_format, batch=batch), []
    for ours in (True, False):
        network = _in_format(_network(ours, drop_p, pooled), memory_format)
        step = _step(network, x, dtype)
        step()
        counts.append(_copies(step, batch * 16 * (6 if pooled else 8) ** 2))
    assert all(counts[0][name] <= counts[1][name] for name in COPIES), counts


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("more", ["", "residual", "pool"])
def test_a_layer_copies_nothing(memory_format: torch.memory_format, dtype: torch.dtype, more: str) -> None:
    """Forward and backward of one layer; parameters in float32, output and gradient in the layout of the input."""
    layer = fl.BatchNormAct2d(16, drop_p=0.5, pool=nn.MaxPool2d(3, 2, 1) if more == "pool" else None)
    x, other = (
        torch.randn(160, 16, 8, 8).to(dtype=dtype, memory_format=memory_format).requires_grad_() for _ in range(2)
    )
    grad_output = torch.randn_like(layer(x.detach()))
    for gradient_wanted in (True, False):
        x.requires_grad_(gradient_wanted)

        def step() -> None:
            output = layer(x, other if more == "residual" else None)
            assert output.dtype == dtype
            assert output.is_contiguous(memory_format=memory_format)
            torch.autograd.backward(output, grad_output)

        step()
        x.grad = other.grad = None  # else they are added up
        assert not _copies(step, grad_output.numel())


@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_gradient_in_another_layout_is_copied_once(
    memory_format: torch.memory_format, pool: nn.MaxPool2d | None
) -> None:
    """Such as that of `nn.Flatten` on channels_last: the one copy there is, which the profiler shows."""
    x = torch.randn(160, 16, 8, 8).contiguous(memory_format=memory_format).requires_grad_()
    layer = fl.BatchNormAct2d(16, pool=pool)
    (other,) = (each for each in FORMATS if each != memory_format)
    output = layer(x)
    grad_output = torch.randn(output.shape).contiguous(memory_format=other)
    copied = _copies(lambda: torch.autograd.grad(output, x, grad_output), grad_output.numel())
    assert copied == {"aten::copy_": 1}
