"""torch.compile without graph breaks, and torch's own checks of how the operators are registered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import fastlayers as fl
from tests.cases import SEED
from tests.layouts import in_layout

LAYOUTS = ("contiguous", "channels_last", "channels_first", "some_channels")


@pytest.fixture(autouse=True)
def _only_compiled_operators(device: torch.device) -> Iterator[None]:
    if device.type != "cpu":
        pytest.skip("the compiled operators serve the CPU")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


_RELU: dict[str, Any] = {"activation": 1, "activation_params": [0.0, 0.0, 0.0]}


def _forward_arguments(x: Tensor, training: bool, residual: bool, mask: Tensor | None) -> dict[str, Any]:
    channels = x.shape[1]
    return _RELU | {
        "input": x,
        "weight": torch.rand(channels),
        "bias": None,
        "residual": torch.randn_like(x) if residual else None,
        "mask": mask,
        "running_mean": torch.zeros(channels),
        "running_var": torch.ones(channels),
        "num_batches_tracked": torch.tensor(2),
        "training": training,
        "momentum": None if residual else 0.1,
        "eps": 1e-5,
        "drop_scale": 2.0,
        "save_flat_bits": residual,
    }


def _backward_arguments(forward: dict[str, Any]) -> dict[str, Any]:
    """With what the forward operator returns for its arguments, and a gradient in another layout."""
    _, mean, invstd, flat_bits = fl.ops.batch_norm_act_fwd(**forward)
    shared = {name: forward[name] for name in ("input", "weight", "bias", "mask", "training", "drop_scale")}
    return (
        shared
        | _RELU
        | {
            "grad_output": in_layout(torch.randn(forward["input"].shape), "channels_last"),
            "residual": None,
            "flat_bits": flat_bits if forward["save_flat_bits"] else None,
            "mean": mean,
            "invstd": invstd,
        }
    )


@pytest.mark.parametrize(
    ("layout", "training", "masked"),
    [
        ("contiguous", True, ""),
        ("contiguous", False, "channel"),
        ("channels_last", True, "channel"),
        ("channels_last", False, "element"),
        ("channels_first", True, "element"),
        ("some_channels", True, "channel"),
    ],
)
def test_fused_operators(layout: str, training: bool, masked: str) -> None:
    """Schema, fake tensors and their strides, dynamic shapes; forward and backward."""
    x = in_layout(torch.randn(4, 10, 3, 5), layout)
    residual = layout != "contiguous"
    mask = torch.rand(4, 10) > 0.5 if masked == "channel" else None
    if masked == "element":
        mask = fl.ops.pack_mask(torch.rand_like(x) > 0.5, False)
    forward = _forward_arguments(x, training, residual, mask)
    opcheck(fl.ops.batch_norm_act_fwd, (), forward)
    backward = _backward_arguments(forward)
    for wanted in ((True, True, True), (False, True, False), (True, False, False), (False, False, False)):
        flags = dict(zip(("input_grad", "affine_grad", "residual_grad"), wanted, strict=True))
        opcheck(fl.ops.batch_norm_act_bwd, (), backward | flags)


@pytest.mark.parametrize(
    ("shape", "pool", "layout", "training", "masked"),
    [
        ((4, 10, 7, 5), nn.MaxPool2d(3, 2, 1), "contiguous", True, True),
        ((4, 10, 7, 5), nn.MaxPool2d(3, 2, ceil_mode=True), "channels_last", False, True),
        ((4, 10, 7, 5), nn.MaxPool2d((7, 5)), "channels_last", True, False),
        ((4, 10, 7, 5), nn.MaxPool2d((7, 5)), "contiguous", True, False),
        ((4, 10, 7, 5), nn.MaxPool2d((2, 3), dilation=(1, 2)), "channels_first", True, True),
        ((4, 10, 1, 1), nn.MaxPool2d(1), "contiguous", True, True),
        ((4, 1, 6, 6), nn.MaxPool2d(2), "channels_last", True, True),
        ((4, 10, 9), nn.MaxPool1d(5, 3, 2), "some_channels", True, True),
        ((4, 10, 9), nn.MaxPool1d(2), "channels_last", False, False),
    ],
    ids=str,
)
def test_pooled_operators(shape: tuple[int, ...], pool: Any, layout: str, training: bool, masked: bool) -> None:
    """Schema, fake tensors and their strides, dynamic shapes; forward and backward."""
    x = in_layout(torch.randn(shape), layout)
    resolved = fl.pooling.resolve(pool, x.dim() - 2)
    assert resolved is not None
    mask = torch.rand(shape[:2]) > 0.5 if masked else None
    window = {"window": resolved.window, "ceil_mode": resolved.ceil_mode}
    forward = _forward_arguments(x, training, False, mask) | window | {"monotone": True, "save": True}
    for name in ("residual", "save_flat_bits"):
        del forward[name]
    opcheck(fl.ops.batch_norm_act_pool_fwd, (), forward)
    opcheck(fl.ops.batch_norm_act_pool_fwd, (), forward | {"save": False, "activation": 7, "monotone": False})
    output, mean, invstd, selected, positions = fl.ops.batch_norm_act_pool_fwd(**forward)
    backward = {
        "grad_output": in_layout(torch.randn_like(output), "channels_last"), "selected": selected,
        "positions": positions, "mean": mean, "invstd": invstd,
    }  # fmt: skip
    shared = ("input", "weight", "bias", "mask", "training", "drop_scale", *_RELU, *window)
    for wanted in ((True, True), (False, True), (True, False), (False, False)):
        flags = dict(zip(("input_grad", "affine_grad"), wanted, strict=True))
        opcheck(fl.ops.batch_norm_act_pool_bwd, (), {name: forward[name] for name in shared} | backward | flags)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mask_operators(layout: str) -> None:
    x = in_layout(torch.randn(4, 10, 3, 5), layout)
    kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.5)
    opcheck(fl.ops.dropout, (x, torch.rand(4, 10) > 0.5, 2.0))
    opcheck(fl.ops.draw_channel_mask, (torch.get_rng_state(), x, 0.5))
    for flat in (True, False):
        opcheck(fl.ops.draw_element_mask, (torch.get_rng_state(), x, 0.5, flat))
        opcheck(fl.ops.pack_mask, (kept, flat))
        bits = fl.ops.pack_mask(kept, flat)
        opcheck(fl.ops.unpack_mask, (bits, x, flat))
        assert torch.equal(fl.ops.unpack_mask(bits, x, flat), kept)
        if flat:
            opcheck(fl.ops.dropout, (x, bits, 2.0))


Layer = Callable[[], nn.Module]
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: fl.BatchNorm1d(6), (5, 6)),
    "BatchNorm2d": (lambda: fl.BatchNorm2d(6), (5, 6, 3, 4)),
    "BatchNorm3d": (lambda: fl.BatchNorm3d(6), (5, 6, 3, 2, 2)),
    "BatchNorm2d cumulative": (lambda: fl.BatchNorm2d(6, momentum=None), (5, 6, 3, 4)),
    "BatchNorm2d without statistics": (lambda: fl.BatchNorm2d(6, track_running_stats=False), (5, 6, 3, 4)),
    "BatchNorm2d without parameters": (lambda: fl.BatchNorm2d(6, affine=False), (5, 6, 3, 4)),
    "BatchNormAct1d": (lambda: fl.BatchNormAct1d(6, act_layer="gelu"), (5, 6, 7)),
    "BatchNormAct2d": (lambda: fl.BatchNormAct2d(6, drop_p=0.4), (5, 6, 3, 4)),
    "BatchNormAct2d element": (lambda: fl.BatchNormAct2d(6, drop_layer=nn.Dropout(0.4)), (5, 6, 3, 4)),
    "BatchNormAct2d rrelu": (lambda: fl.BatchNormAct2d(6, act_layer="rrelu"), (5, 6, 3, 4)),
    "BatchNormAct1d pool": (lambda: fl.BatchNormAct1d(6, pool_kernel_size=2, act_layer="gelu"), (5, 6, 7)),
    "BatchNormAct2d pool": (lambda: fl.BatchNormAct2d(6, drop_p=0.4, pool=nn.MaxPool2d(3, 2, 1)), (5, 6, 4, 5)),
    "BatchNormAct2d pool of elements": (
        lambda: fl.BatchNormAct2d(6, drop_layer=nn.Dropout(0.4), pool=nn.MaxPool2d(2, ceil_mode=True)), (5, 6, 5, 4)
    ),
    "BatchNormAct3d": (lambda: fl.BatchNormAct3d(6, act_layer="silu"), (5, 6, 3, 2, 2)),
    "Dropout": (lambda: fl.Dropout(0.4), (5, 6, 3)),
    "Dropout1d": (lambda: fl.Dropout1d(0.4), (5, 6, 3)),
    "Dropout2d": (lambda: fl.Dropout2d(0.4), (5, 6, 3, 4)),
    "Dropout3d": (lambda: fl.Dropout3d(0.4), (5, 6, 3, 2, 2)),
}  # fmt: skip


def _step(layer: Callable[..., Tensor], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, gradients, and the module's state after one call."""
    torch.manual_seed(SEED)
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    y = layer(*leaves)
    gradients = torch.autograd.grad(y.pow(2).sum(), [*leaves, *module.parameters()])
    return [y.detach(), *gradients, *(t.clone() for t in module.state_dict().values())]


@pytest.fixture(params=["auto", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors that are known to be tiny are left to the compiler, so all is tried with the compiled kernels too."""
    with fl.use_backend(request.param):
        yield


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_one_graph(name: str, backend: None) -> None:
    """Training and evaluation, forward and backward, several steps: the numbers of the layer itself."""
    make, shape = LAYERS[name]
    plain, compiled = make(), make()
    compiled.load_state_dict(plain.state_dict())
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        x = torch.randn(shape)
        expected = _step(plain.train(training), plain, x)
        compiled.train(training)
        got = _step(run, compiled, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_residual_in_one_graph(layout: str, act: str, backend: None) -> None:
    layer = fl.BatchNormAct2d(6, act_layer=act)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = (in_layout(torch.randn(5, 6, 3, 4), layout) for _ in range(2))
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    expected = _step(layer, layer, x, residual)
    layer.load_state_dict(state)
    got = _step(run, layer, x, residual)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("name", LAYERS)
def test_other_batch_sizes_do_not_recompile(name: str, backend: None) -> None:
    """The first change of a size makes it dynamic; every later batch runs the same code."""
    make, shape = LAYERS[name]
    module, counter = make(), CompileCounterWithBackend("aot_eager")
    run = torch.compile(module, fullgraph=True, backend=counter)
    for batch in (4, 6):
        run(torch.randn(batch, *shape[1:]))
    compilations = counter.frame_count
    for batch in (9, 17, 5):
        assert run(torch.randn(batch, *shape[1:])).shape[0] == batch
    assert counter.frame_count == compilations
    assert compilations <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"drop_layer": nn.Dropout(0.5)},
        {"drop_p": 0.5, "pool": nn.MaxPool2d(2)},
        {"drop_p": 0.5, "pool": nn.MaxPool2d(5, 3, 2)},
        {"pool": nn.MaxPool2d(2, ceil_mode=True), "act_layer": "gelu"},
    ],
    ids=str,
)
def test_dynamic_from_the_start(options: dict[str, Any]) -> None:
    """dynamic=True leaves heights and widths open too; masks of bits have sizes that depend on them."""
    layer, counter = fl.BatchNormAct2d(6, **options), CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    # No pooled width is 1: torch 2.15 compiles that once more, for its own layers, too.
    for shape in ((4, 6, 5, 7), (3, 6, 9, 5), (8, 6, 6, 6)):
        x = torch.randn(shape, requires_grad=True)
        run(x, None if "pool" in options else torch.randn(shape)).sum().backward()
        assert x.grad is not None
    assert counter.frame_count == 2  # forward and backward


def test_inductor(backend: None) -> None:
    """A small network through torch's default compiler: one graph, the numbers of eager execution."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        fl.BatchNormAct2d(8, act_layer="gelu"),
        nn.Conv2d(8, 8, 3),
        fl.BatchNormAct2d(8, pool_kernel_size=2),
        fl.BatchNorm2d(8),
        fl.Dropout2d(0.0),
    )
    state = {name: t.clone() for name, t in network.state_dict().items()}
    x = torch.randn(4, 3, 8, 8)
    expected = _step(network, network, x)
    network.load_state_dict(state)
    got = _step(torch.compile(network, fullgraph=True), network, x)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_inductor_draws_whole_planes() -> None:
    """Compiled code draws its own numbers, as with torch's dropout, but what it drops is the same kind of thing."""
    run = torch.compile(fl.BatchNormAct2d(64, act_layer="sigmoid", drop_p=0.3), fullgraph=True)
    kept = run(torch.randn(32, 64, 3, 3)) != 0
    planes = kept.flatten(2)
    assert torch.equal(planes.all(2), planes.any(2))
    assert 0.6 < planes.float().mean() < 0.8


def test_training_with_evaluation_in_between_recompiles_nothing() -> None:
    """After the first epoch no step compiles, whatever its batch and statistics."""
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        fl.BatchNormAct2d(6, drop_p=0.3),
        fl.BatchNormAct2d(6, drop_p=0.3, pool=nn.MaxPool2d(3, 2, 1)),
        fl.Dropout(0.2),
        fl.BatchNorm2d(6, momentum=None),
    )
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    optimiser = torch.optim.SGD(network.parameters(), 0.1)
    compiled = []
    for epoch in range(3):
        with torch._dynamo.config.patch(error_on_recompile=epoch > 0):
            network.train()
            for batch in (8, 12, 5):
                optimiser.zero_grad()
                run(torch.randn(batch, 3, 7, 7)).pow(2).sum().backward()
                optimiser.step()
            network.eval()
            with torch.no_grad():
                for batch in (7, 300):
                    run(torch.randn(batch, 3, 7, 7))
        compiled.append(counter.frame_count)
    assert compiled[0] <= 4  # with gradients and without, training and evaluation
    assert compiled == compiled[:1] * 3
    assert not torch._dynamo.utils.counters["graph_break"]
    norms = [module for module in network if isinstance(module, nn.BatchNorm2d)]
    assert [int(norm.num_batches_tracked or 0) for norm in norms] == [9, 9, 9]


@pytest.mark.parametrize("make", [lambda: fl.BatchNormAct1d(6), lambda: fl.BatchNormAct1d(6, act_layer="gelu")])
def test_transforms_inside_of_a_compiled_function(make: Layer) -> None:
    """torch.func within the graph: torch's own operators stand for ours there too."""
    layer = make().eval()
    x = torch.randn(5, 6)

    def gradient(x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda x: layer(x).pow(2).sum())(x)
        return found

    torch.testing.assert_close(torch.compile(gradient, fullgraph=True, backend="aot_eager")(x), gradient(x))
    batched = torch.compile(lambda x: torch.func.vmap(lambda x: layer(x))(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(batched(x.expand(3, 5, 6)), layer(x).expand(3, 5, 6))


@pytest.mark.parametrize(
    ("shape", "options", "ours"),
    [((2, 6, 4, 4), {}, False), ((2, 6, 4, 4), {"dynamic": True}, True), ((32, 6, 16, 16), {}, True)],
)
def test_tensors_known_to_be_tiny_are_left_to_the_compiler(
    shape: tuple[int, ...], options: dict[str, Any], ours: bool
) -> None:
    """There a call of an operator costs more than all its work; sizes that may change get no guard for it."""
    found: list[str] = []

    def note(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    layer = fl.BatchNormAct2d(6).eval().requires_grad_(False)
    torch.compile(layer, fullgraph=True, backend=note, **options)(torch.randn(shape))
    assert any("fastlayers" in name for name in found) == ours, found


@pytest.mark.parametrize("mode", ["channel", "element"])
def test_what_is_dropped_is_zero_in_tiny_tensors_too(mode: str) -> None:
    layer = fl.BatchNormAct2d(2, act_layer="sigmoid", drop_p=0.5, drop_mode=mode)
    x = torch.randn(64, 2, 4, 4)
    x[0, 0, 0, 0] = torch.nan
    x.requires_grad_()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    poisoned = y[:, 0]
    assert poisoned.isnan().any()
    assert (poisoned == 0).any()
    assert (poisoned.isnan() | (poisoned == 0)).all()
