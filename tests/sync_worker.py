"""What torchrun has each rank do for test_sync_batch_norm.py: all checks in turn, their outcomes into a file.

Run as ``torchrun --nproc-per-node N sync_worker.py FOLDER``. Needs no other file of the tests.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastlayers as fl

C = 5

CHECKS: dict[int, dict[str, Callable[[], None]]] = {2: {}, 3: {}}


def check(*worlds: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Registers a check, to be run with so many ranks."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        for world in worlds:
            CHECKS[world][function.__name__] = function
        return function

    return register


@dataclass(frozen=True)
class Case:
    """A batch, how it is shared out, and a layer."""

    name: str
    shape: tuple[int, ...] = (9, C, 4, 3)  # the whole batch
    parts: tuple[int, ...] = (4, 5)  # of its first dimension, by rank
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    act: str = "relu"
    residual: bool = False
    offset: float = 1.0
    backend: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    2: (
        Case("float64", dtype=torch.float64),
        Case("float32", act="gelu"),
        Case("bfloat16", dtype=torch.bfloat16),
        Case("float16 with parameters of its own", dtype=torch.float16, options={"dtype": torch.float16}),
        Case("rows", (9, C), act="tanh", dtype=torch.float64),
        Case("signals", (9, C, 7), act="leaky_relu"),
        Case("volumes", (9, C, 2, 3, 2), act="silu", residual=True),
        Case("channels last", channels_last=True),
        Case("channels last and residual", channels_last=True, residual=True, dtype=torch.float64),
        Case("planes of several blocks", (5, C, 40, 37), (2, 3), residual=True, act="mish"),
        Case("identity and residual", act="identity", residual=True),
        Case("relu and residual", residual=True),
        Case("gelu and residual in bfloat16", act="gelu", residual=True, dtype=torch.bfloat16),
        Case("a mean of 10000 standard deviations", (64, C, 8, 8), (30, 34), offset=1e4),
        Case("very uneven", parts=(1, 8)),
        Case("one value per channel on a rank", (4, C), (1, 3)),
        Case("one value per channel on each", (2, C), (1, 1), dtype=torch.float64),
        Case("empty on the first", parts=(0, 9)),
        Case("empty on the last", parts=(9, 0), residual=True, channels_last=True),
        Case("cumulative average", options={"momentum": None}),
        Case("momentum", options={"momentum": 0.7}),
        Case("no affine", options={"affine": False}),
        Case("no bias", options={"bias": False}),
        Case("no running statistics", options={"track_running_stats": False}),
        Case("nothing but the input", options={"track_running_stats": False, "affine": False}, dtype=torch.float64),
        Case("tiny eps", options={"eps": 1e-12}),
        Case("a pool", options={"pool": nn.MaxPool2d(2, 1)}, act="gelu"),
        Case(
            "a pool, channels last, in bfloat16",
            options={"pool": nn.MaxPool2d(3, 2, 1), "affine": False},
            channels_last=True,
            dtype=torch.bfloat16,
            act="identity",
        ),
        Case("a pool and an empty batch", parts=(0, 9), options={"pool": nn.MaxPool2d(2)}, residual=True),
        Case("reference", backend="reference", residual=True, act="gelu"),
        Case("reference without dropout and residual", backend="reference", dtype=torch.float64),
        Case("compiled kernels", backend="cpp"),
    ),
    3: (
        Case("float64 on three", parts=(2, 3, 4), dtype=torch.float64, residual=True),
        Case("an empty batch on one of three", parts=(4, 0, 5)),
        Case("empty batches on two of three", parts=(0, 9, 0), options={"momentum": None}),
    ),
}


def _check_case(case: Case) -> None:
    with fl.use_backend(case.backend):
        expected = _whole(case, case.dtype, torch.float64)
        eager = _whole(case, case.dtype, case.dtype)
        got = _shared(case)
    assert torch.equal(got.pop("num_batches_tracked", torch.tensor(2)), torch.tensor(2))
    for name in got:
        exact = expected[name]
        error, excused = ((t.double() - exact).abs().max().item() for t in (got[name], eager[name]))
        ulps = 64 if case.dtype == torch.float64 else 4
        # At least of terms of size 1, which of two values per channel cancel to almost nothing.
        size = max(1.0, exact.abs().max().item())
        allowed = 2 * excused + ulps * torch.finfo(eager[name].dtype).eps * size
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


for _world, _cases in CASES.items():
    for _case in _cases:
        CHECKS[_world][_case.name] = lambda case=_case: _check_case(case)  # type: ignore[misc]


def _batch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Input, residual and the output's gradient, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    if "pool" in case.options:
        made[2] = torch.randn(case.options["pool"](made[2]).shape, generator=generator, dtype=torch.float64)
    made[0] += case.offset
    if case.channels_last:
        made = [t.to(memory_format=torch.channels_last) for t in made]
    return made[0].to(case.dtype), made[1].to(case.dtype), made[2].to(case.dtype)


def _layer_for(case: Case, cls: type[nn.Module]) -> nn.Module:
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    layer = cls(C, act_layer=case.act, **{"dtype": wide, **case.options})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(C, generator=generator))
    return layer


def _results(layer: nn.Module, x: Tensor, residual: Tensor | None, gradient: Tensor) -> dict[str, Tensor]:
    found: dict[str, Any] = {}
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    for _ in range(2):  # running statistics twice
        output = layer(x, residual)
    output.backward(gradient)
    assert output.stride() == torch.empty_like(gradient).stride()
    found |= {"output": output.detach(), "gradient of input": x.grad, **dict(layer.named_buffers())}
    if residual is not None:
        found["gradient of residual"] = residual.grad
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        found[f"gradient of {name}"] = parameter.grad
    return found


def _whole(case: Case, dtype: torch.dtype, computed: torch.dtype) -> dict[str, Tensor]:
    """By one process: `computed` in float64, or as it comes."""
    x, residual, gradient = (t.to(computed) for t in _batch(case))
    cls = {2: fl.BatchNormAct1d, 3: fl.BatchNormAct1d, 4: fl.BatchNormAct2d, 5: fl.BatchNormAct3d}[len(case.shape)]
    layer = _layer_for(case, cls)
    if computed == torch.float64:
        layer = layer.double()
    return _results(layer, x, residual if case.residual else None, gradient)


def _shared(case: Case) -> dict[str, Tensor]:
    """By all ranks, each with its part; put together again."""
    mine = [t.split(case.parts)[dist.get_rank()] for t in _batch(case)]
    if case.channels_last:
        mine = [t.contiguous(memory_format=torch.channels_last) for t in mine]
    layer = _layer_for(case, fl.SyncBatchNormAct)
    found = _results(layer, mine[0], mine[1] if case.residual else None, mine[2])
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, found)
    whole: dict[str, Tensor] = {}
    for name in found:
        tensors = [part[name] for part in everything]
        if name in ("output", "gradient of input", "gradient of residual"):
            whole[name] = torch.cat(tensors)
        elif name.startswith("gradient"):
            whole[name] = torch.stack(tensors).sum(0)
        else:
            assert all(torch.equal(t, tensors[0]) for t in tensors), f"{name} differs between ranks"
            whole[name] = tensors[0]
    return whole


def _raised(function: Callable[..., object], *arguments: object) -> Exception:
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def _collectives(function: Callable[..., Any], *arguments: object) -> tuple[Counter[str], Any]:
    """The collectives that `function` starts, by name, and its result."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record:
        result = function(*arguments)
    return Counter(e.name for e in record.events() if e.name.startswith("c10d::")), result


def _input(*shape: int, requires_grad: bool = True) -> Tensor:
    """Another one on each rank."""
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    return torch.randn(shape, generator=generator).requires_grad_(requires_grad)


@check(2, 3)
def one_gather_forward_and_one_sum_backward() -> None:
    layer = fl.SyncBatchNormAct(C, act_layer="gelu", drop_p=0.3)
    x, residual = _input(4, C, 3, 3), _input(4, C, 3, 3)
    forward, output = _collectives(layer, x, residual)
    assert forward.total() == 1, forward
    assert "allgather" in next(iter(forward)), forward
    backward, _ = _collectives(output.sum().backward)
    assert backward.total() == 1, backward
    assert "allreduce" in next(iter(backward)), backward


@check(2)
def none_in_evaluation_and_frozen() -> None:
    layer, x = fl.SyncBatchNormAct(C), _input(4, C, 3, 3)
    plain = fl.BatchNormAct2d(C)
    for other in (layer.eval(), fl.freeze_batch_norm(fl.SyncBatchNormAct(C)).train()):
        started, output = _collectives(other, x)
        assert not started
        assert torch.equal(output, plain.eval()(x))


@check(2)
def no_sum_backward_where_no_rank_needs_it() -> None:
    layer, x = fl.SyncBatchNormAct(C), _input(4, C, 3, 3, requires_grad=False)
    output = layer(x)
    started, _ = _collectives(output.sum().backward)
    assert not started
    assert layer.weight.grad is not None


@check(2, 3)
def gradients_that_only_some_need() -> None:
    """As when all need them: the sum is taken on all."""
    layer, x = fl.SyncBatchNormAct(C, act_layer="silu"), _input(4, C, 3, 3)
    layer(x).square().sum().backward()
    expected, expected_weight = x.grad, layer.weight.grad
    layer.zero_grad()
    needed = dist.get_rank() == 1
    again = x.detach().requires_grad_(needed)
    layer(again).square().sum().backward()
    assert (again.grad is None) == (not needed)
    if needed:
        torch.testing.assert_close(again.grad, expected, rtol=0, atol=0)
    torch.testing.assert_close(layer.weight.grad, expected_weight, rtol=0, atol=0)


@check(2)
def a_rank_without_a_graph() -> None:
    layer, x = fl.SyncBatchNormAct(C), _input(4, C, 3, 3)
    with torch.no_grad() if dist.get_rank() == 0 else nullcontext():
        output = layer(x)
    if dist.get_rank() == 1:
        error = _raised(output.sum().backward)
        assert "rank 0 ran forward without recording a graph" in str(error), error
    _works(layer)


def _works(layer: nn.Module) -> None:
    """No rank waits for another after an error."""
    x = _input(3, C, 2, 2)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@check(2, 3)
def an_error_on_one_rank_is_raised_on_all() -> None:
    layer = fl.SyncBatchNormAct(C)
    before = copy.deepcopy(layer.state_dict())
    wrong: list[tuple[type[Exception], str, Any]] = [
        (RuntimeError, "running_mean should contain 4 elements", (torch.zeros(2, 4, 3, 3),)),
        (ValueError, "expected at least 2D input", (torch.zeros(C),)),
        (ValueError, "channels should be non-zero", (torch.zeros(2, 0, 3, 3),)),
        (NotImplementedError, "not implemented for 'Int'", (torch.zeros(2, C, 3, 3, dtype=torch.int32),)),
        (RuntimeError, "mixed dtype", (torch.zeros(2, C, 3, 3, dtype=torch.float64),)),
        (RuntimeError, "must match the size of tensor b", (torch.zeros(2, C, 3, 3), torch.zeros(1, C, 3, 3))),
        (TypeError, "must be Tensor, not NoneType", (None,)),
    ]
    for kind, text, arguments in wrong:
        if dist.get_rank() == 1:
            error = _raised(layer, *arguments)
            assert isinstance(error, kind), error
            assert text in str(error), error
        else:
            error = _raised(layer, _input(2, C, 3, 3))
            assert isinstance(error, RuntimeError), error
            assert "rank 1 failed" in str(error), error
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    _works(layer)


@check(3)
def errors_on_several_ranks() -> None:
    layer, rank = fl.SyncBatchNorm(C, affine=False, track_running_stats=False), dist.get_rank()
    error = _raised(layer, torch.zeros(2, C if rank == 1 else 4, 3))
    assert ("rank 0, 2 failed" if rank == 1 else "expected 5 channels") in str(error), error
    _works(layer)


@check(2)
def too_few_values_on_all_ranks_together() -> None:
    layer = fl.SyncBatchNorm(C)
    for values in (0, 1):
        error = _raised(layer, torch.zeros(values * dist.get_rank(), C))
        assert isinstance(error, ValueError)
        assert f"Expected more than 1 value per channel when training, got {values}" in str(error), error
    assert layer.num_batches_tracked == 0
    _works(layer)


@check(2)
def dropout_is_that_of_the_dropout_layers() -> None:
    for mode, dropout in (("channel", fl.Dropout2d(0.4)), ("element", fl.Dropout(0.4))):
        for act in ("gelu", "rrelu"):
            for residual in (None, _input(6, C, 8, 8)):
                fused = fl.SyncBatchNormAct(C, act_layer=act, drop_p=0.4, drop_mode=mode)
                chain = fl.SyncBatchNormAct(C, act_layer=act)
                found = []
                for function in (fused, lambda x, r, chain=chain, dropout=dropout: dropout(chain(x, r))):
                    torch.manual_seed(dist.get_rank())
                    x = _input(6, C, 8, 8)
                    y = function(x, residual)
                    y.square().sum().backward()
                    found.append((y.detach(), x.grad))
                assert (found[0][0] == 0).float().mean() > 0.1
                torch.testing.assert_close(found[0], found[1])


@check(3)
def process_groups() -> None:
    """Ranks 0 and 2 together, 1 alone; who is in no group hears so."""
    rank = dist.get_rank()
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    layer = fl.convert_sync_batchnorm(fl.BatchNormAct2d(C), pair if rank != 1 else alone)
    x = _input(4, C, 3, 3)
    others = [torch.empty_like(x) for _ in range(3)]
    dist.all_gather(others, x.detach())
    output, plain = layer(x), fl.BatchNormAct2d(C)
    whole = plain(torch.cat((others[0], others[2])) if rank != 1 else others[1])
    torch.testing.assert_close(output, whole[:4] if rank != 2 else whole[4:])
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))
    output.sum().backward()
    again = copy.deepcopy(layer)
    assert again.process_group is layer.process_group
    _works(again)
    error = _raised(fl.SyncBatchNorm(C, process_group=alone if rank != 1 else pair), x)
    assert "not a member" in str(error), error


@check(2)
def it_cannot_be_differentiated_twice() -> None:
    layer, x = fl.SyncBatchNormAct(C, act_layer="tanh"), _input(4, C, 3, 3)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert gradient.requires_grad
    error = _raised(gradient.square().sum().backward)
    assert "SyncBatchNorm: trying to differentiate twice" in str(error), error


@check(2)
def compiled_as_one_graph() -> None:
    choices: list[dict[str, Any]] = [{}, {"act_layer": "gelu", "momentum": None}]
    for options in choices:
        layer = fl.SyncBatchNormAct(C, **options)
        twin, found = copy.deepcopy(layer), []
        compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
        for function, module in ((layer, layer), (compiled, twin)):
            x, residual = _input(4 + dist.get_rank(), C, 3, 3), _input(4 + dist.get_rank(), C, 3, 3)
            y = function(x, residual)
            y.square().sum().backward()
            found.append((y.detach(), x.grad, residual.grad, module.weight.grad, list(module.buffers())))
        torch.testing.assert_close(found[1], found[0])


@check(2)
def while_forward_mode_is_on() -> None:
    """What looks on operator by operator sees no kernel: plain PyTorch serves, which finds the same."""
    layer, found = fl.SyncBatchNormAct(C, act_layer="gelu"), []
    twin = copy.deepcopy(layer)
    for module, context in ((layer, nullcontext()), (twin, forward_ad.dual_level())):
        x, residual = _input(4 + dist.get_rank(), C, 3, 3), _input(4 + dist.get_rank(), C, 3, 3)
        with context:
            y = module(x, residual)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, residual.grad, module.weight.grad, list(module.buffers())))
    torch.testing.assert_close(found[1], found[0])


@check(2)
def checkpointed() -> None:
    """Forward runs again in backward, and gathers again, on all ranks."""
    layer, found = fl.SyncBatchNormAct(C), []
    for again in (False, True):
        x = _input(4, C, 3, 3)
        y: Any = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        y.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@check(2)
def under_autocast() -> None:
    conv, layer = nn.Conv2d(3, C, 3), fl.SyncBatchNormAct(C)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(conv(_input(4, 3, 6, 6)))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = fl.BatchNormAct2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = fl.BatchNormAct2d(channels, act_layer="gelu")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm2(self.conv2(self.norm1(self.conv1(x))), x)
        return y


class _PlainBlock(nn.Module):
    """The same of torch's layers, for `fuse`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + x)


def _plain_network() -> nn.Sequential:
    torch.manual_seed(3)
    stem = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    return nn.Sequential(*stem, _PlainBlock(8), _PlainBlock(8), *head).double()


def _network() -> nn.Sequential:
    """A small ResNet."""
    torch.manual_seed(3)
    stem = (nn.Conv2d(3, 8, 3, bias=False), fl.BatchNormAct2d(8, act_layer="silu"))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), fl.BatchNorm1d(4))
    return nn.Sequential(*stem, _Block(8), _Block(8), *head).double()


def _train(network: nn.Module, rank: int, world: int) -> None:
    """Three steps of gradient descent on the rank's share of each batch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(8, 3, 7, 7, generator=generator, dtype=torch.float64)
        target = torch.randint(4, (8,), generator=generator)
        loss = F.cross_entropy(network(x.chunk(world)[rank]), target.chunk(world)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _check_training(network: nn.Sequential, build: Callable[[], nn.Sequential]) -> None:
    """Whether `network`, whole or in shards, has come to where one process comes from `build`."""
    alone = build()
    _train(alone, 0, 1)
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in network.state_dict().items()}
    torch.testing.assert_close(whole, dict(alone.state_dict()), rtol=1e-9, atol=1e-9)


def _fused() -> nn.Sequential:
    network = _plain_network()
    fl.convert_sync_batchnorm(fl.fuse(network))
    assert len(fl.fusion_report(network).fused) == 5
    return network


def _shard(network: nn.Sequential) -> None:
    # Not above: three ranks need not wait for it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in network.children():
        if isinstance(part, (_Block, _PlainBlock)):
            fully_shard(part, mesh=mesh)
    fully_shard(network, mesh=mesh)


@check(2)
def trained_by_ddp() -> None:
    network = _network()
    fl.convert_sync_batchnorm(network)
    _train(DistributedDataParallel(network), dist.get_rank(), 2)
    _check_training(network, _network)


@check(2)
def fused_and_trained_by_ddp() -> None:
    network = _fused()
    _train(DistributedDataParallel(network), dist.get_rank(), 2)
    assert not fl.fusion_report(network).fell_back
    _check_training(network, _plain_network)


@check(2)
def trained_by_fsdp2() -> None:
    network = _network()
    fl.convert_sync_batchnorm(network)
    _shard(network)
    _train(network, dist.get_rank(), 2)
    _check_training(network, _network)


@check(2)
def fused_and_trained_by_fsdp2() -> None:
    network = _fused()
    _shard(network)
    _train(network, dist.get_rank(), 2)
    _check_training(network, _plain_network)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    outcomes: dict[str, str | None] = {}
    for name, function in CHECKS[dist.get_world_size()].items():
        outcomes[name] = None
        try:
            function()
        except Exception:
            outcomes[name] = traceback.format_exc()
        try:
            dist.barrier()
        except RuntimeError:
            break  # the ranks are not in step any more, so that what follows would fail too
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
