"""The transforms of torch.func and forward-mode differentiation: what torch's layers give, or a word on why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

import fastlayers as fl
from tests.cases import SEED


@pytest.fixture(autouse=True)
def _on_the_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the operators that serve transforms are torch's on any device")


def _ours(drop_p: float = 0.3) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), fl.BatchNormAct1d(6, act_layer="gelu", drop_p=drop_p), fl.Dropout(drop_p), fl.BatchNorm1d(6)
    )


def _theirs(drop_p: float = 0.3) -> nn.Module:
    act = nn.Sequential(nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(drop_p))
    return nn.Sequential(nn.Linear(4, 6), act, nn.Dropout(drop_p), nn.BatchNorm1d(6))


def _ours_pooled(drop_p: float = 0.3) -> nn.Module:
    act = fl.BatchNormAct1d(2, act_layer="gelu", drop_p=drop_p, pool=nn.MaxPool1d(3, 2, 1))
    return nn.Sequential(nn.Linear(4, 12), nn.Unflatten(-1, (2, 6)), act, nn.Flatten(-2), fl.BatchNorm1d(6))


def _theirs_pooled(drop_p: float = 0.3) -> nn.Module:
    act = nn.Sequential(nn.BatchNorm1d(2), nn.GELU(), nn.Dropout1d(drop_p), nn.MaxPool1d(3, 2, 1))
    return nn.Sequential(nn.Linear(4, 12), nn.Unflatten(-1, (2, 6)), act, nn.Flatten(-2), nn.BatchNorm1d(6))


Maker = Callable[..., nn.Module]
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(SEED))


def _made(make: Maker, training: bool = False, drop_p: float = 0.3) -> nn.Module:
    """With the same parameters and statistics for both makers."""
    module = make(drop_p)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return module.train(training)


def _loss(module: nn.Module) -> Callable[..., Tensor]:
    buffers = dict(module.named_buffers())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(module, (parameters, buffers), (x,)).pow(2).sum()
        return output

    return loss


def _with_parameters(transform: Callable[..., Any]) -> Callable[[nn.Module], list[Tensor]]:
    """The transform of the loss as a function of the parameters, with one gradient per parameter as the result."""
    return lambda module: list(transform(_loss(module))(_parameters(module), X).values())


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


def _per_batch(module: nn.Module) -> list[Tensor]:
    """Gradients of the parameters for several batches at once."""
    found = vmap(grad(_loss(module)), (None, 0))(_parameters(module), X[:4].view(2, 2, 4))
    return list(found.values())


def _forward_mode(module: nn.Module) -> list[Tensor]:
    with forward_ad.dual_level():
        output = forward_ad.unpack_dual(module(forward_ad.make_dual(X, X.sin())))
        return [output.primal, output.tangent]


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": _with_parameters(grad),
    "grad of each batch": _per_batch,
    "hessian": lambda module: hessian(lambda x: module(x).pow(2).sum())(X),
    "jacfwd": lambda module: jacfwd(module)(X),
    "jacrev": lambda module: jacrev(module)(X),
    "jvp": lambda module: jvp(module, (X,), (X.sin(),)),
    "linearize": lambda module: linearize(module, X)[1](X.sin()),
    "vjp": lambda module: vjp(module, X)[1](torch.ones(5, 6)),
    "vmap": lambda module: vmap(module)(X.expand(3, 5, 4)),
    "functionalize": lambda module: functionalize(module)(X),
    "forward-mode differentiation": _forward_mode,
    "torch.autograd.functional": lambda module: torch.autograd.functional.jacobian(module, X, vectorize=True),
}


MAKERS = {"": (_ours, _theirs), "pooled": (_ours_pooled, _theirs_pooled)}


@pytest.mark.parametrize("pooled", MAKERS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_evaluation(name: str, pooled: str) -> None:
    ours, theirs = (TRANSFORMS[name](_made(make)) for make in MAKERS[pooled])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _raised_or_found(call: Callable[[nn.Module], Any], module: nn.Module) -> Any:
    torch.manual_seed(SEED)
    try:
        return call(module)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize("pooled", MAKERS)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("drop_p", [0.0, 0.3])
def test_training(name: str, drop_p: float, pooled: str) -> None:
    """With the same masks and statistics, or torch's own words: on statistics, and randomness under vmap."""
    modules = [_made(make, True, drop_p) for make in MAKERS[pooled]]
    ours, theirs = (_raised_or_found(TRANSFORMS[name], module) for module in modules)
    if isinstance(theirs, str):
        # Ours may go on.
        assert isinstance(ours, str)
        assert ours.startswith(theirs.splitlines()[0])
        return
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for mine, other in zip(modules[0].state_dict().values(), modules[1].state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("training", [False, True])
def test_ensemble(training: bool) -> None:
    """Several models at once, each with statistics of its own: the numbers of each by itself."""
    models = [copy.deepcopy(_made(_ours, training, drop_p=0.0)) for _ in range(3)]
    for scale, model in enumerate(models):
        with torch.no_grad():
            next(model.parameters()).mul_(scale + 1)
    parameters, buffers = stack_module_state(models)
    # Copies: an ensemble writes to the statistics that it is given.
    state = {name: value.clone() for name, value in buffers.items()}
    skeleton = models[0]
    got = vmap(lambda p, b: functional_call(skeleton, (p, b), (X,)))(parameters, state)
    for i, model in enumerate(models):
        torch.testing.assert_close(got[i], model(X), rtol=1e-4, atol=1e-5)
        for name, value in model.named_buffers():
            torch.testing.assert_close(state[name][i], value, rtol=1e-4, atol=1e-5)


def test_randomness_of_vmap() -> None:
    """As torch's dropout: the same mask for all, or one for each."""
    for layer in (fl.Dropout(0.5), fl.BatchNormAct1d(64, track_running_stats=False, drop_p=0.5, act_layer="sigmoid")):
        x = torch.randn(8, 64).expand(2, 8, 64)
        same = vmap(layer, randomness="same")(x)
        assert torch.equal(same[0] == 0, same[1] == 0)
        different = vmap(layer, randomness="different")(x)
        assert not torch.equal(different[0] == 0, different[1] == 0)
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(layer)(x)


@pytest.mark.parametrize("layer", [fl.BatchNormAct1d(4).eval(), fl.Dropout(0.5)])
def test_a_backend_that_was_set_says_no(layer: nn.Module) -> None:
    """Kernels are asked for, and no transform can look into one: nothing else is put in their place."""
    with fl.use_backend("cpp"):
        with pytest.raises(RuntimeError, match=r"'cpp' does not serve the transforms of torch.func.*auto"):
            vmap(layer, randomness="same")(X.expand(3, 5, 4))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="does not serve forward-mode"):
            layer(forward_ad.make_dual(X, X))
        layer(X)
    with fl.use_backend("reference"):
        assert vmap(layer, randomness="same")(X.expand(3, 5, 4)).shape == (3, 5, 4)


def test_functional_call_alone_runs_the_kernels() -> None:
    """It is no transform."""
    layer = fl.BatchNormAct1d(4)
    with fl.use_backend("cpp"):
        weight = torch.full((4,), 2.0, requires_grad=True)
        output = functional_call(layer, {"weight": weight}, (X,))
    assert "_BatchNormAct" in output.grad_fn.name()
    torch.testing.assert_close(output, 2 * layer(X), rtol=1e-4, atol=1e-5)
