"""Dropout alone, and masks of elements: from seeds, and from bits that forward saved."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlayers.triton import dropout as dropping
from fastlayers.triton import launches
from fastlayers.triton.calls import sizes
from fastlayers.triton.calls.copies import copy_back, layout_as_written, plan_for, plan_of
from fastlayers.triton.calls.refusals import check_mask
from fastlayers.triton.calls.settings import Call, is_seed
from fastlayers.triton.plans import Frame


def dropout(input: Tensor, mask: Tensor, scale: float) -> Tensor:
    """See csrc/torch/schemas.h. A seed's elements are by the order of memory of a dense input."""
    check_mask(input, mask)
    output = torch.empty_like(input)
    if input.numel() == 0:
        return output
    if is_seed(mask):
        source = input if input.stride() == output.stride() else torch.empty_like(input).copy_(input)
        _drop_elements(source, output, mask, scale)
        return output
    plan = plan_for(output, x=input)
    target = plan.target(output)
    _drop(plan.frame, plan.source("x", input), target, mask.contiguous(), scale)
    copy_back([output], [target])
    return output


def element_mask(seed: Tensor, like: Tensor, drop_scale: float) -> Tensor:
    """See csrc/torch/schemas.h and fastlayers.reference."""
    mask = torch.empty_like(like, dtype=torch.bool)
    if like.numel():
        _drop_elements(None, mask.view(torch.uint8), seed, drop_scale)
    return mask


def _drop_elements(source: Tensor | None, target: Tensor, seed: Tensor, scale: float) -> None:
    # Shapes do not matter, only the order in memory: one long plane.
    count = target.numel()
    line = (count, count, 1)
    dtype = torch.float32 if source is None else source.dtype
    plan = plan_of((1, 1, count), dtype, line, (("x", None if source is None else line),))
    _drop(plan.frame, source, target, seed, scale)


def _drop(frame: Frame, source: Tensor | None, target: Tensor, mask: Tensor, scale: float) -> None:
    call = Call.of(mask, scale)
    with launches.on_device_of(target):
        launches.launch(
            dropping.drop, frame.passes, (source, target, mask), call.dropping, frame.pick(sizes.DROP),
            (*call.constants, *frame.passes.tile, *frame.constants),
        )  # fmt: skip


def unpack_mask(bits: Tensor, like: Tensor, flat: bool) -> Tensor:
    """See csrc/torch/schemas.h. For double backward only, hence in plain PyTorch.

    Raises:
        RuntimeError: `flat`, of which this set of operators has no masks.
    """
    if flat:
        raise RuntimeError("flat should be False: the Triton operators take seeds for masks without shape")
    mask = torch.empty_like(like, dtype=torch.bool)
    if not mask.numel():
        return mask
    layout = layout_as_written(mask)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    runs = (bits.view(-1, layout.bytes_inner, 1) >> places & 1).flatten(1)[:, : layout.n_inner]
    batch, channels, *spatial = like.shape
    if layout.rows:
        return mask.copy_(runs.reshape(batch, *spatial, channels).movedim(-1, 1))
    return mask.copy_(runs.reshape(like.shape))
