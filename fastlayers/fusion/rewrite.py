"""`fuse` and `unfuse`: the model in, the model out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastlayers.fusion import install
from fastlayers.fusion.plan import plan

# How far outputs of a fused model may be from the original's, relative to their largest element: many layers amplify
# the rounding of one.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def fuse(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Has the chains BatchNorm → (add) → activation → (dropout) → (max-pool) of `model` run as one call each, in place.

    All modules stay where they are, with their parameters, buffers, hooks and modes: ``state_dict()``,
    ``parameters()`` and optimisers know no difference. Only what runs is another: modules whose forward contains a
    chain get a subclass of their class, of the same name, whose forward calls the fused kernel with the state that
    BatchNorm, activation, dropout and max-pool have at that moment. Where a call would not be the same fused (a
    residual that broadcasts, a hook that was added later), members run one by one, a `FusionWarning` says so once, and
    `fusion_report` tells why. A max-pool that is not fused, as one with a residual before it, stays behind its chain;
    the report tells that too. What was fused before is looked at anew. Other threads may fuse, run and train other
    models meanwhile.

    Args:
        model: of any class, in training or evaluation mode.
        example_inputs: a tuple of arguments, or one argument, for ``model(*example_inputs)``. With them, copies of the
            original and of the fused model are run and compared, in the mode that the model is in, and chains whose
            inputs the kernel does not take are in the report from the start. State and generators stay as they are.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no `nn.Module`.
        RuntimeError: with `example_inputs`, if the fused model's output is not the original's. The model is then left
            unfused.
    """
    _check(model, "fuse")
    unfuse(model)
    original = None if example_inputs is None else copy.deepcopy(model)
    for module, fusion in plan(model):
        install.install(module, fusion)
    if original is not None:
        try:
            _compare(original, model, example_inputs)
        except BaseException:
            unfuse(model)
            raise
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives back the original of a fused `model`, in place: every module has its class and its forward again.

    Returns:
        `model`. One that was not fused stays as it is.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    _check(model, "unfuse")
    for module in model.modules():
        if install.fusion_of(module) is not None:
            install.remove(module)
    return model


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model should be an nn.Module, but got {model!r} of type {type(model).__name__}")


def _compare(original: nn.Module, fused: nn.Module, example_inputs: Any) -> None:
    trial = copy.deepcopy(fused)
    expected, found = (_outputs(model, example_inputs) for model in (original, trial))
    # What the trial had to run unfused is known from now on.
    for module, tried in zip(fused.modules(), trial.modules(), strict=True):
        ours, theirs = install.fusion_of(module), install.fusion_of(tried)
        if ours is not None and theirs is not None:
            ours.take_fallbacks(theirs)
    if len(expected) != len(found):
        raise RuntimeError(f"fuse: the fused model returns {len(found)} tensors, the original {len(expected)}")
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        difference = _difference(a, b)
        if difference is not None:
            raise RuntimeError(
                f"fuse: with example_inputs, output {index} of the fused model is not the original's: {difference}; "
                "the model is left unfused"
            )


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    arguments = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    devices = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(0)
        output = model(*copy.deepcopy(tuple(arguments)))
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(expected: Tensor, found: Tensor) -> str | None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    tolerance = _TOLERANCES.get(expected.dtype)
    if tolerance is None or expected.numel() == 0:
        return None if torch.equal(expected, found) else "other values"
    largest = expected.double().abs().nan_to_num(0.0, 0.0).max().item()
    if torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance * largest, equal_nan=True):
        return None
    error = (found.double() - expected.double()).abs().max().item()
    return f"they differ by {error:.3g}, where the largest element is {largest:.3g}"
