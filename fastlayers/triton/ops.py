"""The operators of `torch.ops.fastlayers_triton`: those of `calls`, with the schemas of the compiled ones.

The functions here go straight to `calls` where nobody looks on, and through torch's dispatcher for torch.compile and
other tracers. None has autograd: `fastlayers.autograd` wraps them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastlayers import fakes, masks
from fastlayers.triton import calls

NAMESPACE = "fastlayers_triton"

_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_KEYS = ["CUDA", "XPU"] + ["CPU"] * calls.INTERPRETED


def _operator(call: Callable[..., Any]) -> Callable[..., Any]:
    """Defines the operator and returns a function that runs it."""
    name = call.__name__
    schema = str(getattr(torch.ops.fastlayers, name).default._schema).removeprefix("fastlayers::")
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in _KEYS:
        _LIBRARY.impl(name, call, key)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default

    @functools.wraps(call)
    def run(*args: Any) -> Any:
        return call(*args) if masks.runs_eagerly(args[0]) else operator(*args)

    return run


batch_norm_act_fwd = _operator(calls.batch_norm_act_fwd)
batch_norm_act_bwd = _operator(calls.batch_norm_act_bwd)
batch_norm_act_pool_fwd = _operator(calls.batch_norm_act_pool_fwd)
batch_norm_act_pool_bwd = _operator(calls.batch_norm_act_pool_bwd)
dropout = _operator(calls.dropout)
unpack_mask = _operator(calls.unpack_mask)
element_mask = _operator(calls.element_mask)
fakes.register(NAMESPACE, calls.bytes_of_bits)
