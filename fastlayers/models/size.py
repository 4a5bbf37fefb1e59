"""How large a model is."""

from __future__ import annotations

from torch import Tensor, nn


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns. Shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def state_mib(model: nn.Module) -> float:
    """The size of what `state_dict` holds, parameters and buffers, in MiB (2**20 bytes)."""
    tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20
