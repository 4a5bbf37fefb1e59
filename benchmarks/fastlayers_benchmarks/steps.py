"""Measures whole training steps, and which share of a step the fused layers take and take away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlayers as fl
from fastlayers.experiments.memory import bytes_saved_by
from fastlayers.experiments.models import Block, CnnPlan, LayerFactory, build_cnn, fused_layers, torch_layers
from fastlayers_benchmarks.cases import LAYOUTS, SEED
from fastlayers_benchmarks.contenders import COMPILE, EAGER, FUSED_COMPILED, EagerChain
from fastlayers_benchmarks.memory import peak_bytes
from fastlayers_benchmarks.record import STEP, Outcome, Row
from fastlayers_benchmarks.timing import Quantiles, Run, measure, quantiles

FUSED = "fastlayers"
# torch's model with the layers left out that this library fuses. What it saves is their share of the step.
WITHOUT = "without"

CLASSES = 10

# Study A's CNN with 64 and 128 channels.
CNN_PLAN = CnnPlan(
    (
        Block(3, 64, kernel=5, pool=5, pool_padding=2, stride=3),
        Block(64, 128, kernel=7, pool=5, pool_padding=2, stride=3),
    ),
    features=128 * 4 * 4,
)
MLP_SIZES = (3 * 32 * 32, 1024)

# From a number of channels, and whether an activation follows, to a layer of (input, residual).
ResidualLayer = Callable[[int, bool], nn.Module]


@dataclass(frozen=True)
class Kind:
    """Whose layers a model is made of: for the MLP, the CNN and the ResNet."""

    mlp: LayerFactory
    cnn: LayerFactory
    resnet: ResidualLayer


class StandIn(nn.Module):
    """Costs nothing, but gives what follows the data that it would have had.

    Records the output of `chain` in its first call, then drops it, gives that output from then on, and hands gradients
    through. An identity would not do: max-pooling on CPU takes up to twice as long where there are no zeros and no
    equal neighbours, and convolutions would see exploding values.
    """

    def __init__(self, chain: nn.Module) -> None:
        super().__init__()
        self.chain: nn.Module | None = chain
        self.output: Tensor | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.chain is not None:
            with torch.no_grad():
                self.output = self.chain(input, residual)
            self.chain = None
        result: Tensor = _HandThrough.apply(input, residual, self)
        return result


class _HandThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor | None, stand_in: StandIn) -> Tensor:
        assert stand_in.output is not None
        # An alias: autograd marks what is returned here as the result of this call.
        return stand_in.output.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        return grad, grad if ctx.needs_input_grad[1] else None, None


def _torch_mlp_layers(features: int, drop_p: float) -> dict[str, nn.Module]:
    return {"norm": nn.BatchNorm1d(features), "act": nn.ReLU(), "drop": nn.Dropout(drop_p)}


def _stand_in(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {"stand_in": StandIn(EagerChain(**layers))}


def _fused_mlp_layers(features: int, drop_p: float) -> dict[str, nn.Module]:
    return {"norm": fl.BatchNormAct1d(features, act_layer="relu", drop_p=drop_p, drop_mode="element")}


def _torch_resnet_layer(channels: int, act: bool) -> nn.Module:
    return EagerChain(nn.BatchNorm2d(channels), nn.ReLU() if act else None)


def _fused_resnet_layer(channels: int, act: bool) -> nn.Module:
    return fl.BatchNormAct2d(channels, act_layer="relu", apply_act=act)


_TORCH = Kind(_torch_mlp_layers, torch_layers, _torch_resnet_layer)
_FUSED = Kind(_fused_mlp_layers, fused_layers, _fused_resnet_layer)
_WITHOUT = Kind(
    lambda features, p: _stand_in(_torch_mlp_layers(features, p)),
    lambda channels, p: _stand_in(torch_layers(channels, p)),
    lambda channels, act: StandIn(_torch_resnet_layer(channels, act)),
)

# Name: whose layers, and whether compiled.
CONTENDERS = {
    EAGER: (_TORCH, False),
    COMPILE: (_TORCH, True),
    FUSED: (_FUSED, False),
    FUSED_COMPILED: (_FUSED, True),
    WITHOUT: (_WITHOUT, False),
}


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, layer: ResidualLayer) -> None:
        super().__init__()
        self.conv1 = _conv(channels_in, channels, 3, stride)
        self.norm1 = layer(channels, True)
        self.conv2 = _conv(channels, channels, 3, 1)
        self.norm2 = layer(channels, True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(_conv(channels_in, channels, 1, stride), layer(channels, False))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(input))
        output: Tensor = self.norm2(self.conv2(hidden), self.shortcut(input))
        return output


def _conv(channels_in: int, channels: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)


def build_resnet18(layer: ResidualLayer) -> nn.Sequential:
    """ResNet-18 for CIFAR: a stem of one 3x3 convolution, four stages of two blocks with 64 to 512 channels."""
    blocks = [
        _BasicBlock(channels_in, channels, stride, layer)
        for before, channels in ((64, 64), (64, 128), (128, 256), (256, 512))
        for channels_in, stride in ((before, 1 if before == channels else 2), (channels, 1))
    ]
    stem = (_conv(3, 64, 3, 1), layer(64, True))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def build_mlp(layers: LayerFactory) -> nn.Sequential:
    """Study A's MLP: (N, 3072) to logits (N, 10)."""
    features, hidden = MLP_SIZES
    return nn.Sequential(nn.Linear(features, hidden), *layers(hidden, 0.5).values(), nn.Linear(hidden, CLASSES))


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


@dataclass(frozen=True)
class StepCase:
    """One model and how it is trained."""

    model: str
    build: Callable[[Kind], nn.Module]
    shape: tuple[int, ...]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    layout: str = "contiguous"

    @property
    def name(self) -> str:
        """Such as "cnn-channels_last"."""
        return f"{self.model}-{self.layout}" if len(self.shape) > 2 else self.model


def step_cases(quick: bool = False) -> list[StepCase]:
    """All; the MLP alone if `quick`."""
    mlp = StepCase("mlp", lambda kind: build_mlp(kind.mlp), (100, MLP_SIZES[0]), _adam)
    if quick:
        return [mlp]
    images = (3, 32, 32)
    return [
        mlp,
        *(
            StepCase("cnn", lambda kind: build_cnn(CNN_PLAN, kind.cnn), (100, *images), _adam, layout)
            for layout in LAYOUTS
        ),
        *(
            StepCase("resnet18", lambda kind: build_resnet18(kind.resnet), (64, *images), _sgd, layout)
            for layout in LAYOUTS
        ),
    ]


class Step:
    """A model in training on one batch of random images."""

    def __init__(self, case: StepCase, contender: str, device: torch.device) -> None:
        kind, compiled = CONTENDERS[contender]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model, images = case.build(kind), torch.randn(case.shape)
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
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True) if compiled else model

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
