"""How much memory a model keeps for its backward pass."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def bytes_saved_for_backward(model: nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass of `model` keeps, besides the parameters.

    Memory that several tensors share counts once. Model and random state stay as they are.
    """
    model = copy.deepcopy(model)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        # Kept as autograd would keep it, so that its address is not given out again.
        return tensor.detach()

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with torch.random.fork_rng(devices=[]), hooks:
        model(images)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())
