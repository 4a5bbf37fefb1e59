"""What only a GPU shows: the kernels at its own sizes, on streams of their own, in graphs, without waiting for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastlayers as fl
from tests.cases import Case, make_sample
from tests.oracle import check, fused, run

f32, bf16 = torch.float32, torch.bfloat16


@pytest.fixture
def gpu(device: torch.device) -> Iterator[torch.device]:
    """A CUDA device that the compiled kernels serve, whatever "auto" would take."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: pytest --device=cuda")
    with fl.use_backend("cuda"):
        yield device


# Sizes at which a GPU of today takes each of the paths of csrc/kernels/cuda/plan.h.
@pytest.mark.parametrize(
    "case",
    [
        Case((8, 40, 9, 7), drop_p=0.3),
        Case((32, 64, 32, 32), dtype=bf16, drop_p=0.5, act="relu"),  # a channel in a block
        Case((64, 32, 56, 56), drop_p=0.5, act="relu"),  # in a cluster
        Case((4, 3, 301, 303), act="silu", residual="contiguous"),  # in several blocks and two kernels
        Case((100, 1024), drop_p=0.5, drop_mode="element"),  # rows in one block
        Case((32, 64, 33, 31), layout="channels_last", act="relu", drop_p=0.5),  # on chip, all blocks together
        Case((64, 256, 56, 56), dtype=bf16, layout="channels_last", act="relu"),  # in three kernels
        Case((8, 40, 9, 7), training=False, act="gelu"),
        Case((8, 40, 9, 7), training=False, layout="channels_last", act="gelu"),
    ],
    ids=str,
)
def test_each_path_on_a_gpu(case: Case, gpu: torch.device) -> None:
    check(case, gpu)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_the_same_each_time_to_the_last_bit(layout: str, gpu: torch.device) -> None:
    sample = make_sample(Case((16, 48, 33, 31), act="gelu", layout=layout, drop_p=0.3, residual=layout), gpu)
    first, second = run(fused, sample.fresh()), run(fused, sample.fresh())
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def _layer_and_input(gpu: torch.device, drop_p: float = 0.0) -> tuple[fl.BatchNormAct2d, Tensor]:
    layer = fl.BatchNormAct2d(48, act_layer="relu", drop_p=drop_p).to(gpu)
    return layer, torch.randn(16, 48, 14, 14, device=gpu)


def test_kernels_wait_for_what_is_on_the_current_stream(gpu: torch.device) -> None:
    layer, values = _layer_and_input(gpu)
    expected = layer(values)
    x = torch.full_like(values, float("nan"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: long enough that a kernel elsewhere would see the NaN
        x.copy_(values)
        output = layer(x)
    stream.synchronize()
    assert torch.equal(output, expected)


def test_nothing_waits_for_the_gpu(gpu: torch.device) -> None:
    layer, x = _layer_and_input(gpu, drop_p=0.4)
    x.requires_grad_()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert x.grad is not None


def _captured(step_inputs: tuple[fl.BatchNormAct2d, Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A graph of forward and backward, with the output and the input's gradient that it writes."""
    layer, x = step_inputs
    x.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(x).square().sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(x)
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
    return graph, output, gradient


def test_a_graph_does_what_was_captured(gpu: torch.device) -> None:
    layer, x = _layer_and_input(gpu)
    graph, output, gradient = _captured((layer, x))
    with torch.no_grad():
        x.copy_(torch.randn_like(x) * 3 + 1)
    statistics = layer.running_mean.clone()  # type: ignore[union-attr]  # Tensor | None in torch's module
    graph.replay()
    replayed = layer.running_mean.clone()  # type: ignore[union-attr]  # the same
    expected = layer(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(output, expected)
    assert torch.equal(gradient, expected_gradient)
    assert not torch.equal(replayed, statistics)


@pytest.mark.parametrize("mode", ["channel", "element"])
def test_each_replay_draws_another_mask(mode: str, gpu: torch.device) -> None:
    layer = fl.BatchNormAct2d(48, act_layer="sigmoid", drop_p=0.5, drop_mode=mode).to(gpu)
    graph, output, gradient = _captured((layer, torch.randn(16, 48, 14, 14, device=gpu)))
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(output != 0)
        assert not gradient[output == 0].isnan().any()
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])
    torch.cuda.manual_seed(5)
    graph.replay()
    first = output.clone()
    torch.cuda.manual_seed(5)
    graph.replay()
    assert torch.equal(output, first)
