"""What the fused operator is tested on: cases, the tensors of a case, and how few cases cover every pair of choices."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastlayers as fl
from fastlayers import activations, backends, masks
from tests.layouts import in_layout

#: As torch's modules, so that nothing here depends on the library's own table.
ACTIVATIONS: dict[str, nn.Module] = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "leaky_relu(-0.5)": nn.LeakyReLU(-0.5),
    "elu": nn.ELU(),
    "elu(0.5)": nn.ELU(0.5),
    "selu": nn.SELU(),
    "celu(2)": nn.CELU(2.0),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "gelu": nn.GELU(),
    "gelu(tanh)": nn.GELU("tanh"),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "softplus": nn.Softplus(),
    "softplus(2, 10)": nn.Softplus(2.0, 10.0),
}
# Where the derivative of some activation jumps.
_KINKS = (-3.0, 0.0, 3.0, 5.0, 6.0)

#: As arguments of `nn.MaxPool1d`, 2d and 3d; of several numbers 1d takes the last, 3d the first for depth too.
POOLS: dict[str, dict[str, Any]] = {
    "2/2": {"kernel_size": 2},
    "5/3/2": {"kernel_size": 5, "stride": 3, "padding": 2},
    "3/1/1": {"kernel_size": 3, "stride": 1, "padding": 1},
    "3/2 ceil": {"kernel_size": 3, "stride": 2, "ceil_mode": True},
    "2/3 with gaps": {"kernel_size": 2, "stride": 3},
    "1/1": {"kernel_size": 1},
    "3/2/1 dilated ceil": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "ceil_mode": True},
    "2/1/1 dilated": {"kernel_size": 2, "stride": 1, "padding": 1, "dilation": 4},
    "oblong": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 3)},
    "16/16": {"kernel_size": 16},  # as many positions as fit in a byte
    "all": {"kernel_size": (9, 7)},
}

SEED = 1234


def pool_layer(name: str, dims: int) -> Any:
    """One of `POOLS` as torch's module for `dims` spatial dimensions."""

    def numbers(value: Any) -> Any:
        return ((value[0],) * (dims - 2) + value)[-dims:] if isinstance(value, tuple) else value

    module = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims]
    return module(**{key: numbers(value) for key, value in POOLS[name].items()})


@dataclass(frozen=True)
class Case:
    """One call of ``batch_norm_act``, without its tensors.

    Attributes:
        residual: its layout; None for no residual.
        pool: a name of `POOLS`; None for no pool.
        affine: "both", "none", "no bias", or "frozen weight" (which has no gradient).
        track: whether there are running statistics.
        mean, std: of the values of `input`, in each channel.
    """

    shape: tuple[int, ...] = (4, 5, 6, 7)
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    residual: str | None = None
    act: str = "identity"
    affine: str = "both"
    training: bool = True
    track: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    drop_p: float = 0.0
    drop_mode: str = "channel"
    pool: str | None = None
    mean: float = 1.0
    std: float = 2.0

    @property
    def pool_layer(self) -> Any:
        """Torch's module for `pool`, or None."""
        return None if self.pool is None else pool_layer(self.pool, len(self.shape) - 2)

    def __str__(self) -> str:
        """The attributes that are not the default."""
        default = Case()
        texts = [
            _text(f.name, getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name == "shape" or getattr(self, f.name) != getattr(default, f.name)
        ]
        return " ".join(texts)


#: Names of choices that set several attributes of a case at once.
TOGETHER = {
    "dtypes": ("dtype", "param_dtype"),
    "mode": ("training", "track", "momentum"),
    "dropout": ("drop_p", "drop_mode"),
}


def case_of(choices: Mapping[str, Any]) -> Case:
    """The case of these attributes; those of TOGETHER have a tuple for each choice."""
    attributes = dict(choices)
    for name, parts in TOGETHER.items():
        if name in attributes:
            attributes |= zip(parts, attributes.pop(name), strict=True)
    return Case(**attributes)


def _text(name: str, value: object) -> str:
    if name == "shape" and isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{name}={str(value).removeprefix('torch.')}"


@dataclass(frozen=True)
class Sample:
    """The tensors of a case.

    Attributes:
        mask: what the operator draws after ``torch.manual_seed(SEED)``.
        taken: of each window of the pool, the index of the element that is taken; exactly, and by torch's rule.
    """

    case: Case
    input: Tensor
    grad_output: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    mask: Tensor | None
    taken: Tensor | None = None

    def fresh(self, dtype: torch.dtype | None = None) -> Sample:
        """Leaves with the same values for one run, full-size and per-channel ones in `dtype` if it is given."""

        def leaf(t: Tensor, requires_grad: bool = True) -> Tensor:
            return t.detach().to(dtype or t.dtype).requires_grad_(requires_grad)

        def optional_leaf(t: Tensor | None, requires_grad: bool = True) -> Tensor | None:
            return None if t is None else leaf(t, requires_grad)

        def state(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            return t.clone() if dtype is None or not t.is_floating_point() else t.to(dtype, copy=True)

        return dataclasses.replace(
            self,
            input=leaf(self.input),
            grad_output=leaf(self.grad_output, requires_grad=False),
            residual=optional_leaf(self.residual),
            weight=optional_leaf(self.weight, self.case.affine != "frozen weight"),
            bias=optional_leaf(self.bias),
            running_mean=state(self.running_mean),
            running_var=state(self.running_var),
            num_batches_tracked=state(self.num_batches_tracked),
        )


def make_sample(case: Case, device: torch.device) -> Sample:
    """Random tensors for `case`; always the same ones for the same case."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def full_size(values: Tensor, layout: str) -> Tensor:
        return in_layout(values.to(device, case.dtype), layout)

    def per_channel(values: Tensor) -> Tensor:
        return values.to(device, case.param_dtype)

    channels = case.shape[1]
    input = full_size(normal(*case.shape) * case.std + case.mean, case.layout)
    residual = None if case.residual is None else full_size(normal(*case.shape), case.residual)
    weight, bias = per_channel(1 + 0.3 * normal(channels)), per_channel(normal(channels))
    running_mean = per_channel(case.mean + case.std * normal(channels))
    running_var = per_channel((case.std * normal(channels)).square() + case.std**2 / 2)
    torch.manual_seed(SEED)
    sample = Sample(
        case=case,
        input=input,
        grad_output=input,  # until it is known where it may not be other than 0
        residual=residual,
        weight=None if case.affine == "none" else weight,
        bias=None if case.affine in ("none", "no bias") else bias,
        running_mean=running_mean if case.track else None,
        running_var=running_var if case.track else None,
        num_batches_tracked=torch.tensor(3, device=device) if case.track else None,
        mask=_drawn_mask(input, case),
    )
    unclear, taken = _unclear(sample)
    grad_output = normal(*unclear.shape).masked_fill(unclear.cpu(), 0)
    return dataclasses.replace(sample, grad_output=full_size(grad_output, case.grad_layout), taken=taken)


def _drawn_mask(input: Tensor, case: Case) -> Tensor | None:
    """What the backend that serves `input` draws, as bool."""
    if backends.serving(input) in ("cpp", "reference"):
        return masks.draw(input, case.drop_p, case.drop_mode, case.training)
    mask = masks.draw_for_gpu_kernels(input, case.drop_p, case.drop_mode, case.training)
    if mask is None or case.drop_mode == "channel":
        return None if mask is None else mask != 0
    return fl.reference.element_mask(mask, input, masks.scale(case.drop_p))


def _unclear(sample: Sample) -> tuple[Tensor, Tensor | None]:
    """Where in the output rounding decides on which side of a kink an element falls; and `Sample.taken`.

    There a gradient is off by a whole step, here or there, whoever computes it. What happens exactly at a kink is for
    test_activations.py. Of elements on a plateau pools may take the first or that with the largest input: what either
    gives counts here.
    """
    pool = sample.case.pool_layer
    bare = dataclasses.replace(sample.fresh(torch.float64), mask=None, case=dataclasses.replace(sample.case, pool=None))
    z = reference_of(bare, activations.IDENTITY).detach()
    at_kinks = torch.stack([(z - kink).abs() < 0.02 for kink in _KINKS]).any(0)
    if pool is None:
        return at_kinks, None
    pool.return_indices = True
    taken, largest = pool(ACTIVATIONS[sample.case.act](z))[1], pool(z)[1]
    return take(at_kinks, taken) | take(at_kinks, largest), taken


def take(values: Tensor, indices: Tensor) -> Tensor:
    """The elements of `values` (N, C, ...) at `indices`, as torch's pools return them."""
    return values.flatten(2).gather(2, indices.flatten(2)).view_as(indices)


def reference_of(sample: Sample, activation: activations.Activation) -> Tensor:
    """The output by fl.reference, with the mask of `sample`."""
    case = sample.case
    return fl.reference.batch_norm_act_masked(
        sample.input,
        sample.weight,
        sample.bias,
        sample.residual,
        sample.mask,
        sample.running_mean,
        sample.running_var,
        sample.num_batches_tracked,
        training=case.training,
        momentum=case.momentum,
        eps=case.eps,
        activation=activation,
        drop_p=case.drop_p,
        pool=fl.pooling.resolve(case.pool_layer, sample.input.dim() - 2),
    )


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Choices of one value per factor, such that any two values of any two factors meet in at least one of them.

    Greedy, as in Cohen et al. 1997, "The AETG System"; always the same list for the same factors.
    """
    names = list(factors)
    missing = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    order = random.Random(SEED)
    rows = []
    while missing:
        row = dict(min(missing, key=sorted))
        for name in order.sample(names, len(names)):
            if name not in row:
                row[name] = max(
                    range(len(factors[name])),
                    key=lambda i: (
                        sum(frozenset(((name, i), other)) in missing for other in row.items()),
                        order.random(),
                    ),
                )
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: factors[name][row[name]] for name in names})
    return rows
