"""Memory layouts: each puts the values of a tensor (N, C, ...) of any rank into other places of memory."""

from collections.abc import Callable

import torch
from torch import Tensor


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _channels_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _reversed(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _every_second(x: Tensor) -> Tensor:
    return torch.stack((x, x), -1)[..., 0]


def _some_channels(x: Tensor) -> Tensor:
    return torch.cat((x, x), 1)[:, : x.shape[1]]


def _some_channels_last(x: Tensor) -> Tensor:
    return _channels_last(torch.cat((x, x), 1))[:, : x.shape[1]]


def _offset(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": _channels_last,
    "channels_first": _channels_first,
    "reversed": _reversed,
    "every_second": _every_second,
    "some_channels": _some_channels,
    "some_channels_last": _some_channels_last,
    "offset": _offset,
    # The only one that changes values: all channels become the first.
    "expanded": _expanded,
}


def in_layout(x: Tensor, name: str) -> Tensor:
    """`x` in the layout `name`, detached."""
    return LAYOUTS[name](x.detach())
