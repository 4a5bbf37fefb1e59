"""The dropouts, as functions and as layers, beside torch's: same masks, same errors, same warnings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastlayers as fl
from tests.conftest import CAPABILITIES
from tests.fuzz import profiles, values
from tests.fuzz.problems import Spec, available, f32, f64, shapes, specs
from tests.fuzz.values import INF, NAN
from tests.oracle import kinds

_DTYPES = (f32, f32, f64, torch.bfloat16, torch.float16)
_OTHER_DTYPES = (torch.int64, torch.bool, torch.uint8, torch.complex64)


@dataclass(frozen=True)
class Call:
    """A call of a dropout. `wrong` ones have a p that is no probability, or a dtype that has no dropout."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    input: Spec
    grad_output: Spec
    p: float
    training: bool
    inplace: bool
    layer: bool
    wants_gradient: bool
    seed: int
    capability: str


@st.composite
def _calls(draw: st.DrawFn) -> Call:
    # No dimensions, or one, too: dropout takes all, the others some, and warn of more.
    shape = draw(shapes(ranks=(2, 6)) | st.lists(st.integers(0, 6), max_size=1).map(tuple))
    dtype = draw(st.sampled_from(_DTYPES) if draw(st.integers(0, 9)) else st.sampled_from(_OTHER_DTYPES))
    floats = dtype if dtype.is_floating_point else f32
    wrong = draw(st.integers(0, 19)) == 19
    return Call(
        kind=draw(st.sampled_from(("dropout", "dropout1d", "dropout2d", "dropout3d"))),
        shape=shape,
        dtype=dtype,
        input=draw(specs(shape, values.full_size(floats), negated=dtype.is_floating_point)),
        grad_output=draw(specs(shape, values.gradients(floats))),
        p=draw(
            st.sampled_from((-0.1, 1.1, NAN, INF)) if wrong else st.sampled_from((0.0, 0.1, 0.5, 0.9999, 1.0, 1, 0))
        ),
        training=draw(st.integers(0, 4)) > 0,
        inplace=draw(st.integers(0, 4)) == 4,
        layer=draw(st.booleans()),
        wants_gradient=draw(st.booleans()),
        seed=draw(st.integers(0, 5)),
        capability=draw(st.sampled_from([c for c in CAPABILITIES if available(c)])),
    )


def _run(call: Call, functions: Any, layers: Any, input: Tensor) -> tuple[Any, ...]:
    """Result and warnings, or the type and first line of the error; then where the generator is."""
    torch.manual_seed(call.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if call.layer:
                layer = getattr(layers, call.kind.replace("dropout", "Dropout"))(call.p, call.inplace)
                result = layer.train(call.training)(input)
            else:
                result = getattr(functions, call.kind)(input, call.p, call.training, call.inplace)
        except Exception as error:
            return type(error), str(error).splitlines()[0].partition(" (")[0].partition(", but got")[0]
    return result, [(w.category, str(w.message)) for w in caught], torch.random.get_rng_state()


def _scale(call: Call) -> float:
    return 0.0 if call.p == 1 else 1 / (1 - call.p)


def _is_ours(call: Call) -> bool:
    """Whether our kernels serve it. Numbers of dimensions that torch warns of are left to torch."""
    ranks = {"dropout": range(7), "dropout1d": (2, 3), "dropout2d": (4,), "dropout3d": (4, 5)}
    return len(call.shape) in ranks[call.kind]


def _assert_dropped(got: Tensor, given_: Tensor, theirs: Tensor, kept: Tensor, call: Call) -> None:
    """`got` is `given_` times the scale where kept, to the rounding of the dtype, and zero elsewhere."""
    assert got.dtype == given_.dtype
    assert not got[~kept].any() or not _is_ours(call)
    scale = _scale(call)
    exact = given_.double() * scale
    assert torch.equal(kinds(got[kept]), kinds(exact.to(got.dtype)[kept])) or torch.equal(
        kinds(got[kept]), kinds(theirs[kept])
    )
    info = torch.finfo(got.dtype)
    error, their_error = ((t.double() - exact).abs() for t in (got, theirs))
    allowed = 2 * their_error.nan_to_num(0, 0) + info.eps * exact.abs() + info.eps * info.smallest_normal
    finite = kept & exact.to(got.dtype).isfinite()
    assert (error[finite] <= allowed[finite]).all()


def _mask(call: Call, input: Tensor) -> Tensor:
    """What torch keeps of `input`."""
    torch.manual_seed(call.seed)
    dropped: Tensor = getattr(F, call.kind)(torch.ones_like(input.detach()), call.p, True)
    return dropped != 0


@profiles.examples(0.7)
@given(_calls())
def test_dropouts(call: Call) -> None:
    previous = fl.ops.cpu_capability()
    fl.ops.set_cpu_capability(call.capability)
    try:
        with warnings.catch_warnings():
            _check(call)
    finally:
        fl.ops.set_cpu_capability(previous)
    profiles.count("dropouts")


def _check(call: Call) -> None:
    ours = call.input.make(call.shape, call.dtype)
    theirs = call.input.make(call.shape, call.dtype)
    wants = call.wants_gradient and call.dtype.is_floating_point
    leaves = [m.tensor.detach().requires_grad_(wants) for m in (ours, theirs)]
    inputs = [leaf.view_as(leaf) if call.inplace and wants else leaf for leaf in leaves]
    got = _run(call, fl.functional, fl, inputs[0])
    expected = _run(call, F, nn, inputs[1])
    if len(expected) == 2:
        assert got[:2] == expected, (got, expected)
        return
    assert len(got) == 3, got
    assert got[1] == expected[1]
    assert torch.equal(got[2], expected[2]), "the generator is at another place"
    result, reference = got[0], expected[0]
    assert result.shape == reference.shape
    assert result.requires_grad == reference.requires_grad
    draws = call.training and call.p > 0 and result.numel() > 0
    if not call.inplace:
        assert ours.is_untouched()
        assert (result.data_ptr() == leaves[0].data_ptr()) == (reference.data_ptr() == leaves[1].data_ptr())
    if call.inplace or not draws or not call.dtype.is_floating_point:
        assert torch.equal(result.detach().nan_to_num(-7), reference.detach().nan_to_num(-7))
    if not draws or not call.dtype.is_floating_point or call.inplace:
        return
    warnings.simplefilter("ignore")
    kept = _mask(call, leaves[0])
    _assert_dropped(result.detach(), leaves[0].detach(), reference.detach(), kept, call)
    if wants:
        _check_gradients(call, leaves, result, reference, kept)


def _check_gradients(call: Call, leaves: list[Tensor], got: Tensor, reference: Tensor, kept: Tensor) -> None:
    """The gradient is the dropped gradient; and so is its own."""
    upstream = call.grad_output.make(call.shape, call.dtype)
    again = upstream.tensor.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(got, leaves[0], upstream.tensor, retain_graph=True)
    (theirs,) = torch.autograd.grad(reference, leaves[1], upstream.tensor)
    assert upstream.is_untouched()
    _assert_dropped(first, upstream.tensor, theirs, kept, call)
    (twice,) = torch.autograd.grad(got, leaves[0], again, create_graph=True)
    (second,) = torch.autograd.grad(twice, again, torch.ones_like(twice))
    _assert_dropped(second, torch.ones_like(second), kept * torch.tensor(_scale(call), dtype=second.dtype), kept, call)
