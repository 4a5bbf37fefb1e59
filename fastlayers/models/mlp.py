"""The MLP of the studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastlayers.activations import ActLayer
from fastlayers.models import arguments
from fastlayers.models.blocks import linear_blocks
from fastlayers.models.layers import NORMS, Layers, Norm, dense_style


class MLP(nn.Module):
    """Linear, BatchNorm, activation, Dropout for each hidden layer, then Linear to the logits.

    Input (N, ...) of `in_features` numbers each is flattened; the output is (N, num_classes). The defaults are those of
    studies A and B.

    Args:
        in_features: numbers per example, such as 3 * 32 * 32.
        hidden: the sizes of the hidden layers, or of the one.
        num_classes: how many logits.
        norm: "batch", or "none" for no BatchNorm. A linear layer has a bias only where no BatchNorm follows.
        act: the activation: a name of `fastlayers.activations.NAMES`, an ``nn`` class or a module.
        drop_p: the probability of dropping single elements, in [0, 1].
        layers: "fastlayers", or "torch" for the plain twin. Or a function, see `fastlayers.models.layers.LayerKit`.

    Raises:
        ValueError: a wrong argument, or an input of another size in the call. For `act`, also as
            `fastlayers.activations.resolve`.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int | Sequence[int] = (1024,),
        num_classes: int = 10,
        *,
        norm: Norm = "batch",
        act: ActLayer = "relu",
        drop_p: float = 0.5,
        layers: Layers = "fastlayers",
    ) -> None:
        super().__init__()
        sizes = (arguments.whole("in_features", in_features), *arguments.wholes("hidden", hidden))
        arguments.whole("num_classes", num_classes)
        arguments.one_of("norm", norm, NORMS)
        self.in_features = in_features
        letters = "BRD" if norm == "batch" else "RD"
        self.hidden = nn.Sequential(*linear_blocks(sizes, letters, dense_style(layers, act, drop_p)))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, input: Tensor) -> Tensor:
        """(N, ...) to logits (N, num_classes)."""
        logits: Tensor = self.head(self.hidden(arguments.input_shape(input.flatten(1), (self.in_features,))))
        return logits


def mlp_a(**options: Any) -> MLP:
    """The MLP of studies A and B: 3072-1024-10 with BatchNorm, ReLU and Dropout(0.5). `options`: of `MLP`."""
    return MLP(**arguments.with_defaults(options, in_features=3 * 32 * 32))


def mlp_e(**options: Any) -> MLP:
    """The MLP of study E: 784-784-10, neither BatchNorm nor dropout. `options`: of `MLP`.

    E2 and E4 have ``hidden=(784, 784)``, E11 ``drop_p=0.2``: the report's 0.8 is what is kept.
    """
    settings = arguments.with_defaults(options, in_features=784, hidden=(784,), norm="none", drop_p=0.0)
    return MLP(**settings)
