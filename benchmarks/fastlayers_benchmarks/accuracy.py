"""How far a contender's output and gradients are from the same computed in float64."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import activations, masks
from fastlayers.pooling import resolve
from fastlayers_benchmarks.cases import SEED, Case, Inputs

# Where ReLU's slope jumps, rounding decides which of both slopes an element has, whoever computes it: there the
# gradient of the output is zero. The widest rounding is that of bfloat16.
KINK_WIDTH = 0.02
# Likewise where a window of a max-pool has two elements that rounding can make equal, or swap: the largest is larger
# than the next by less than this part of it.
TIE_WIDTH = 0.02

Results = dict[str, Tensor]


def expected(case: Case, inputs: Inputs) -> tuple[Results, Tensor]:
    """Output and gradients in float64, with the mask that torch draws, and the output's gradient that was used."""
    mode = "element" if len(case.shape) == 2 else "channel"
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        mask = masks.draw(inputs.input, case.variant.drop_p, mode, training=True)
    activation = activations.resolve(case.variant.act)
    device, channels = inputs.input.device, case.shape[1]
    leaves = {
        "input": inputs.input.detach().double().requires_grad_(),
        "weight": torch.ones(channels, dtype=torch.float64, device=device, requires_grad=True),
        "bias": torch.zeros(channels, dtype=torch.float64, device=device, requires_grad=True),
    }
    if inputs.residual is not None:
        leaves["residual"] = inputs.residual.detach().double().requires_grad_()

    def before_pool(activation: activations.Activation) -> Tensor:
        return fl.reference.batch_norm_act_masked(
            leaves["input"], leaves["weight"], leaves["bias"], leaves.get("residual"), mask, None, None, None,
            training=True, momentum=0.1, eps=1e-5, activation=activation, drop_p=case.variant.drop_p,
        )  # fmt: skip

    pool = case.pool_layer()

    def reference(activation: activations.Activation) -> Tensor:
        output: Tensor = before_pool(activation) if pool is None else pool(before_pool(activation))
        return output

    grad_output = inputs.grad_output
    with torch.no_grad():
        if activation.derivatives is not None:
            # Of max-pooling too: an activation of this kind nowhere falls, so that the largest values are the same.
            grad_output = grad_output.masked_fill(reference(activations.IDENTITY).abs() < KINK_WIDTH, 0)
        if pool is not None:
            grad_output = grad_output.masked_fill(_is_tie(before_pool(activation), pool), 0)
    output = reference(activation)
    output.backward(grad_output.double())
    return _results(output, leaves), grad_output


def _is_tie(input: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """For each window on `input` (N, C, H, W), whether its two largest elements are nearly the same."""
    numbers = resolve(pool, 2)
    assert numbers is not None
    (height, width), (down, right) = numbers.output_size(input.shape[2:]), numbers.stride
    top, left = numbers.padding
    padded = F.pad(input, (left, left, top, top), value=-math.inf)
    largest = second = input.new_full((*input.shape[:2], height, width), -math.inf)
    for row, column in itertools.product(*map(range, numbers.kernel_size)):
        these = padded[:, :, row : row + down * height : down, column : column + right * width : right]
        second = torch.maximum(second, torch.minimum(largest, these))
        largest = torch.maximum(largest, these)
    return largest - second < TIE_WIDTH * largest.abs().clamp_min(1)


def results_of(layer: nn.Module, inputs: Inputs, grad_output: Tensor) -> Results:
    """Output and gradients of a training step of `layer`, whose parameters have to be as they were made."""
    leaves = {"input": inputs.input.detach().requires_grad_()}
    if inputs.residual is not None:
        leaves["residual"] = inputs.residual.detach().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        output = layer(*leaves.values())
    output.backward(grad_output)
    parameters = {name.rpartition(".")[2]: parameter for name, parameter in layer.named_parameters()}
    return _results(output, leaves | parameters)


def _results(output: Tensor, leaves: dict[str, Tensor]) -> Results:
    gradients = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), **gradients}


def errors(found: Results, expected: Results) -> dict[str, float]:
    """For each tensor, the root mean square of the error over that of the expected values."""
    return {
        name: float((found[name].double() - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
        for name, wanted in expected.items()
    }
