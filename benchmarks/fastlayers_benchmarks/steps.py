"""Measures whole training steps, and which share of a step the fused layers take and take away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlayers.experiments.memory import bytes_saved_by
from fastlayers.models import CNN, LayerKit, Style, fused_layers, res18, torch_layers
from fastlayers.models.layers import dense_style
from fastlayers_benchmarks.cases import LAYOUTS, SEED
from fastlayers_benchmarks.contenders import COMPILE, EAGER, FUSED_COMPILED, MAX_AUTOTUNE, EagerChain
from fastlayers_benchmarks.memory import peak_bytes
from fastlayers_benchmarks.record import STEP, Outcome, Row
from fastlayers_benchmarks.timing import Quantiles, Run, measure, quantiles

FUSED = "fastlayers"
# What torch.compile makes of torch's model. Its mode that tunes convolutions takes longer to compile.
COMPILES = (COMPILE, MAX_AUTOTUNE)
# torch's model with the layers left out that this library fuses. What it saves is their share of the step.
WITHOUT = "without"

CLASSES = 10

# Study A's CNN with 64 and 128 channels.
CNN_CHANNELS = (64, 128)
MLP_SIZES = (3 * 32 * 32, 1024)


class StandIn(nn.Module):
    """Costs nothing, but gives what follows the data that it would have had.

    Records the output of `chain` in its first call, then drops it, gives that output from then on, and hands gradients
    through; where the chain ends in a max-pool, whose output is smaller, it gives a gradient recorded like the output.
    An identity would not do: max-pooling on CPU takes up to twice as long where there are no zeros and no equal
    neighbours, and convolutions would see exploding values.
    """

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain: nn.Module | None = chain
        self.output: Tensor | None = None
        self.grad_input: Tensor | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.chain is not None:
            self._record(self.chain, input, residual)
            self.chain = None
        result: Tensor = _HandThrough.apply(input, residual, self)
        return result

    def _record(self, chain: nn.Module, input: Tensor, residual: Tensor | None) -> None:
        with torch.enable_grad():
            leaf = input.detach().requires_grad_()
            output = chain(leaf, residual)
        self.output = output.detach()
        if output.shape != input.shape:
            # As large as that of a mean over the batch.
            (self.grad_input,) = torch.autograd.grad(output, leaf, torch.randn_like(output) / len(output))


class _HandThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, stand_in: StandIn) -> Tensor:
        assert stand_in.output is not None
        ctx.grad_input = stand_in.grad_input
        # An alias: autograd marks what is returned here as the result of this call.
        return stand_in.output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0] if ctx.grad_input is None else ctx.grad_input.detach()
        return grad, grad if ctx.needs_input_grad[1] else None, None


def _without(run: str, features: int, style: Style) -> dict[str, nn.Module]:
    """A stand-in for what one fused layer would be."""
    layers = torch_layers(run, features, style)
    return {"norm": StandIn(EagerChain(**layers))} if "norm" in layers else layers


# Name: whose layers, and in which mode compiled, if at all.
CONTENDERS: dict[str, tuple[LayerKit, str | None]] = {
    EAGER: (torch_layers, None),
    COMPILE: (torch_layers, "default"),
    MAX_AUTOTUNE: (torch_layers, "max-autotune"),
    FUSED: (fused_layers, None),
    FUSED_COMPILED: (fused_layers, "default"),
    WITHOUT: (_without, None),
}


def build_mlp(layers: LayerKit) -> nn.Sequential:
    """Study A's MLP: (N, 3072) to logits (N, 10)."""
    # Not `models.MLP`, whose first layer has no bias: steps stay comparable with records that were made before.
    features, hidden = MLP_SIZES
    style = dense_style(layers, drop_p=0.5)
    middle = style.layers("BRD", hidden).values()
    return nn.Sequential(nn.Linear(features, hidden), *middle, nn.Linear(hidden, CLASSES))


def build_cnn(layers: LayerKit) -> nn.Module:
    """Study A's CNN, smaller: (N, 3, 32, 32) to logits (N, 10)."""
    return CNN(channels=CNN_CHANNELS, layers=layers)


def build_cnn_3x3(layers: LayerKit) -> nn.Module:
    """The same with kernels of 3 pixels instead of 5 and 7: convolutions take less of its steps."""
    return CNN(channels=CNN_CHANNELS, kernels=3, layers=layers)


def build_resnet18(layers: LayerKit) -> nn.Module:
    """ResNet-18 for CIFAR: a stem of one 3x3 convolution, four stages of two blocks with 64 to 512 channels."""
    return res18(layers=layers)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


@dataclass(frozen=True)
class StepCase:
    """One model and how it is trained."""

    model: str
    build: Callable[[LayerKit], nn.Module]
    shape: tuple[int, ...]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        """Such as "cnn-channels_last"."""
        return f"{self.model}-{self.layout}" if len(self.shape) > 2 else self.model


def step_cases(quick: bool = False) -> list[StepCase]:
    """All; the MLP alone if `quick`."""
    mlp = StepCase("mlp", build_mlp, (100, MLP_SIZES[0]), _adam)
    if quick:
        return [mlp]
    images = (3, 32, 32)
    return [
        mlp,
        *(StepCase("cnn", build_cnn, (100, *images), _adam, layout) for layout in LAYOUTS),
        *(StepCase("cnn-3x3", build_cnn_3x3, (100, *images), _adam, layout) for layout in LAYOUTS),
        *(StepCase("resnet18", build_resnet18, (64, *images), _sgd, layout) for layout in LAYOUTS),
    ]


class Step:
    """A model in training on one batch of random images."""

    def __init__(self, case: StepCase, contender: str, device: torch.device) -> None:
        layers, mode = CONTENDERS[contender]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model, images = case.build(layers), torch.randn(case.shape)
        if len(case.shape) > 2:
            layout = LAYOUTS[case.layout]
            # No overload in the types takes a memory format alone.
            model = model.to(memory_format=layout)  # type: ignore[call-overload]
            images = images.contiguous(memory_format=layout)
        model, self._images = model.to(device), images.to(device)
        # In this pass stand-ins drop the layers for which they stand, before the optimizer takes these over.
        with torch.random.fork_rng(), torch.no_grad():
            model(self._images)
        self.model = model
        self._labels = torch.arange(case.shape[0], device=device) % CLASSES
        self._parameters = list(model.parameters())
        self._optimizer = case.optimizer(model)
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True, mode=mode) if mode else model

    def loss(self) -> Tensor:
        """The loss of the batch."""
        return F.cross_entropy(self._forward(self._images), self._labels)

    def run(self) -> None:
        """One step of the optimizer."""
        self._optimizer.zero_grad()
        self.loss().backward()
        self._optimizer.step()

    def forget_gradients(self) -> None:
        """Frees what a step leaves, so that the next one's memory is counted from nothing."""
        self._optimizer.zero_grad()

    def saved_bytes(self) -> int:
        """What a forward pass keeps for backward, besides the parameters."""
        return bytes_saved_by(self.loss, self._parameters)


def measure_step(case: StepCase, contenders: Sequence[str], rounds: int, device: torch.device) -> Row:
    """The row of one model, for `contenders`, names of CONTENDERS."""
    torch._dynamo.reset()
    steps = {name: Step(case, name, device) for name in contenders}
    # Not Run.reset: a training step frees its predecessor's gradients, and that is timed.
    samples = measure({name: Run(step.run) for name, step in steps.items()}, rounds, device)
    outcomes = {
        name: Outcome(samples[name], peak_bytes(Run(step.run, step.forget_gradients), device), step.saved_bytes())
        for name, step in steps.items()
    }
    return Row(case.name, {"model": case.model, "layout": case.layout, "batch": case.shape[0]}, STEP, outcomes)


@dataclass(frozen=True)
class Share:
    """Which part of torch's step the layers take, and which part of that a contender takes away."""

    share: Quantiles
    removed: Quantiles


def share_of(row: Row, contender: str = FUSED) -> Share | None:
    """Paired by round; None where torch's model, the one without the layers or `contender` was not measured."""
    if not {EAGER, WITHOUT, contender} <= row.outcomes.keys():
        return None
    times = [row.outcomes[name].samples for name in (EAGER, WITHOUT, contender)]
    rounds = list(zip(*times, strict=True))
    return Share(
        quantiles([1 - without / eager for eager, without, _ in rounds]),
        # Of the medians' difference, not of each round's, which may be near zero.
        _over([eager - its for eager, _, its in rounds], row),
    )


def _over(differences: Sequence[float], row: Row) -> Quantiles:
    layers = row.outcomes[EAGER].seconds.median - row.outcomes[WITHOUT].seconds.median
    return quantiles([difference / layers for difference in differences])
