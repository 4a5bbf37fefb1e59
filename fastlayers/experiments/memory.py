"""How much memory a model keeps for its backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def bytes_saved_for_backward(model: nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass of `model` keeps, besides the parameters.

    Memory that several tensors share counts once. Model and random state stay as they are.
    """
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        return bytes_saved_by(lambda: model(images), model.parameters())


def bytes_saved_by(forward: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a call of `forward`, besides `parameters`. Shared memory counts once."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        # Kept as autograd would keep it, so that its address is not given out again.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # Held until the count is done: the graph hangs on it, and with the graph all that was kept.
        output = forward()
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())
