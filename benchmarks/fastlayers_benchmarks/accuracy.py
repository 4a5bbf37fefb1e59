"""How far a contender's output and gradients are from the same computed in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import activations, masks
from fastlayers_benchmarks.cases import SEED, Case, Inputs

# Where ReLU's slope jumps, rounding decides which of both slopes an element has, whoever computes it: there the
# gradient of the output is zero. The widest rounding is that of bfloat16.
KINK_WIDTH = 0.02

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

    def reference(activation: activations.Activation) -> Tensor:
        return fl.reference.batch_norm_act_masked(
            leaves["input"], leaves["weight"], leaves["bias"], leaves.get("residual"), mask, None, None, None,
            training=True, momentum=0.1, eps=1e-5, activation=activation, drop_p=case.variant.drop_p,
        )  # fmt: skip

    grad_output = inputs.grad_output
    if activation.derivatives is not None:
        with torch.no_grad():
            before = reference(activations.IDENTITY)
        grad_output = grad_output.masked_fill(before.abs() < KINK_WIDTH, 0)
    output = reference(activation)
    output.backward(grad_output.double())
    return _results(output, leaves), grad_output


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
