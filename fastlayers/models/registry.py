"""Networks by name, as configs in files give them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from fastlayers.models.cnn import CNN, cnn_a7, cnn_b, cnn_b14
from fastlayers.models.lenet import LeNet
from fastlayers.models.mlp import MLP, mlp_a, mlp_e
from fastlayers.models.resnet import ResNet, res9, res18, simp_res9
from fastlayers.models.vgg import VGGA


@dataclass(frozen=True)
class Model:
    """One name's network.

    Attributes:
        make: makes it, with keyword arguments of `cls`.
        cls: what is made.
        required: the arguments that have no default.
    """

    make: Callable[..., nn.Module]
    cls: type[nn.Module]
    required: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of all arguments."""
        return tuple(inspect.signature(self.cls).parameters)


#: All networks by name. "cnn_a" is `CNN` with its defaults.
MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "mlp": Model(MLP, MLP, required=("in_features",)),
        "mlp_a": Model(mlp_a, MLP),
        "mlp_e": Model(mlp_e, MLP),
        "cnn_a": Model(CNN, CNN),
        "cnn_a7": Model(cnn_a7, CNN),
        "cnn_b": Model(cnn_b, CNN),
        "cnn_b14": Model(cnn_b14, CNN),
        "res18": Model(res18, ResNet),
        "res9": Model(res9, ResNet),
        "simp_res9": Model(simp_res9, ResNet),
        "vgg_a": Model(VGGA, VGGA),
        "lenet": Model(LeNet, LeNet),
    }
)


def build(name: str, **arguments: object) -> nn.Module:
    """The network called `name` in `MODELS`, with `arguments` of its class over its own.

    Raises:
        ValueError: an unknown name or argument, a missing argument, or a value that the network does not take.
    """
    if name not in MODELS:
        raise ValueError(f"name: unknown model {name!r}; allowed: {', '.join(MODELS)}")
    model = MODELS[name]
    unknown = sorted(set(arguments) - set(model.arguments))
    if unknown:
        raise ValueError(f"{name}: unknown arguments {unknown}; allowed: {', '.join(model.arguments)}")
    missing = sorted(set(model.required) - set(arguments))
    if missing:
        raise ValueError(f"{name}: needs {', '.join(missing)}, but got {sorted(arguments)}")
    return model.make(**arguments)
