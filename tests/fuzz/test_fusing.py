"""`fuse` and `unfuse` on random models: what was computed before is computed after."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastlayers as fl
from tests.fuzz import profiles
from tests.fuzz.activations import Act, acts
from tests.oracle import kinds

#: By the number of spatial dimensions.
_NORMS = {d: (getattr(nn, f"BatchNorm{d}d"), getattr(fl, f"BatchNorm{d}d")) for d in (1, 2, 3)}


@dataclass(frozen=True)
class Block:
    """BatchNorm, perhaps an addition, an activation and a dropout, in one of the ways in which people write it.

    Attributes:
        norm: 0 for torch's, 1 for ours.
        add: "" for none, else how what comes in is added.
        style: of the activation: a "module", one "in place", or "Sequential" with the norm.
        drop: the dropout's class, or "".
        identity: whether an `nn.Identity` lies between norm and activation.
    """

    norm: int
    affine: bool
    track: bool
    momentum: float | None
    add: str
    act: Act
    style: str
    drop: str
    p: float
    identity: bool
    frozen: bool


@dataclass(frozen=True)
class Model:
    """A chain of blocks on (N, C, ...)."""

    dims: int
    channels: int
    batch: int
    size: int
    blocks: tuple[Block, ...]
    train: bool
    dtype: torch.dtype
    channels_last: bool
    seed: int


_blocks = st.builds(
    Block,
    norm=st.integers(0, 1),
    affine=st.booleans(),
    track=st.sampled_from((True, True, False)),
    momentum=st.sampled_from((0.1, None)),
    add=st.sampled_from(("", "", "+", "reversed", "+=", "torch.add", "add_", "broadcast")),
    act=acts.filter(lambda act: act.name != "CELU" or act.arguments != (-1.0,)),
    style=st.sampled_from(("module", "in place", "Sequential")),
    drop=st.sampled_from(("", "", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d")),
    p=st.sampled_from((0.0, 0.3, 0.5, 1.0)),
    identity=st.booleans(),
    frozen=st.sampled_from((False, False, False, True)),
)
_models = st.builds(
    Model,
    dims=st.integers(1, 3),
    channels=st.integers(1, 5),
    batch=st.integers(2, 4),
    size=st.integers(2, 4),
    blocks=st.lists(_blocks, min_size=1, max_size=3).map(tuple),
    train=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16)),
    channels_last=st.booleans(),
    seed=st.integers(0, 5),
)


def _may_fall(act: Act) -> bool:
    return act.name in ("RReLU", "LeakyReLU") or any(isinstance(a, float) and a < 0 for a in act.arguments)


class _Built(nn.Module):
    def __init__(self, block: Block, dims: int, channels: int) -> None:
        super().__init__()
        self.add = block.add
        norm = _NORMS[dims][block.norm](
            channels, momentum=block.momentum, affine=block.affine, track_running_stats=block.track
        )
        act: Any = block.act.module()
        if block.style == "in place" and hasattr(act, "inplace") and not _may_fall(block.act):
            act.inplace = True  # torch cannot differentiate those with a negative slope
        takes = block.drop and not (block.drop == "Dropout1d" and dims > 1)
        drop = getattr(nn, block.drop)(block.p) if takes else nn.Identity()
        between = nn.Identity() if block.identity else None
        self.in_sequence = block.style == "Sequential" and not block.add
        if self.in_sequence:
            parts = [norm, between, act, drop]
            self.body = nn.Sequential(*[part for part in parts if part is not None])
        else:
            self.norm, self.between, self.act, self.drop = norm, between, act, drop

    def forward(self, x: Tensor) -> Tensor:
        if self.in_sequence:
            result: Tensor = self.body(x)
            return result
        y = self.norm(x)
        if self.between is not None:
            y = self.between(y)
        if self.add == "+":
            y = y + x
        elif self.add == "reversed":
            y = x + y
        elif self.add == "+=":
            y += x
        elif self.add == "torch.add":
            y = torch.add(y, x)
        elif self.add == "add_":
            y.add_(x)
        elif self.add == "broadcast":
            y = y + x[:, :1]
        output: Tensor = self.drop(self.act(y))
        return output


def _build(model: Model) -> nn.Module:
    torch.manual_seed(model.seed)
    net = nn.Sequential(*[_Built(block, model.dims, model.channels) for block in model.blocks])
    for parameter in net.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    net.to(model.dtype).train(model.train)
    for block, built in zip(model.blocks, net, strict=True):
        if block.frozen and block.track:
            fl.freeze_batch_norm(built)
    # RReLU was made in evaluation mode, where it is deterministic; `train` above has changed that.
    return net


def _run(net: nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    output = net(leaf)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad((output * weights).sum(), [leaf, *parameters.values()], allow_unused=True)
    results = {"output": output.detach(), "gradient": grads[0]}
    results |= {f"gradient of {n}": g for n, g in zip(parameters, grads[1:], strict=True) if g is not None}
    return results | {name: t.clone() for name, t in net.state_dict().items()} | {"generator": torch.rand(3)}


@profiles.examples(0.15)
@given(_models)
def test_fuse(model: Model) -> None:
    original = _build(model)
    x = _input(model)
    with fl.use_backend("cpp"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fused chains that fall back, and of dropouts for other dimensions
        exact, eager = _run(copy.deepcopy(original).double(), x.double(), 1), _run(copy.deepcopy(original), x, 1)
        fused = fl.fuse(copy.deepcopy(original))
        report = fl.fusion_report(fused)
        told = sorted([*(chain.norm for chain in report.fused), *(norm.norm for norm in report.not_fused)])
        assert told == sorted(n for n, m in fused.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        got = _run(fused, x, 1)
        back = fl.unfuse(fused)
        assert [type(m) for m in back.modules()] == [type(m) for m in original.modules()]
    assert got.keys() == eager.keys() == exact.keys()
    for name, value in got.items():
        _compare(name, value, exact[name], eager[name])
    profiles.count("fused models")


def _input(model: Model) -> Tensor:
    shape = (model.batch, model.channels, *(model.size,) * model.dims)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(model.seed)).to(model.dtype)
    # Of those torch's BatchNorm1d makes contiguous ones, ours keeps the layout: elements are drawn in another order.
    reorders = model.dims == 1 and any(b.drop == "Dropout" or b.act.name == "RReLU" for b in model.blocks)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if model.channels_last and not reorders else x


def _compare(name: str, got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Errors of layers in a row add up, and double: no more than 4 times torch's own, plus rounding."""
    assert got.dtype == eager.dtype, name
    assert got.shape == eager.shape, name
    if not got.is_floating_point() or name == "generator":
        assert torch.equal(got, eager), name
        return
    if not torch.equal(kinds(exact), kinds(eager)) or got.numel() == 0:
        return
    assert torch.equal(kinds(got), kinds(eager)), name
    finite = exact.isfinite()
    if not finite.any():
        return
    error, their_error = ((t.double() - exact)[finite].abs().max().item() for t in (got, eager))
    scale = max(exact[finite].abs().max().item(), 1.0)
    allowed = 4 * their_error + 64 * torch.finfo(got.dtype).eps * scale
    assert error <= allowed, f"{name}: error {error:.3g} where {allowed:.3g} is allowed"
