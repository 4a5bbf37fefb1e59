"""What stands between two layers with weights: BatchNorm, activation, dropout and max-pool, by torch or fused.

The one place that knows how the two kinds of layers differ. Letters say what is meant, in order: B BatchNorm,
R activation (ReLU, as a rule), D dropout, M max-pool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fastlayers import activations, checks
from fastlayers.activations import Activation, ActLayer
from fastlayers.models import arguments
from fastlayers.modules import BatchNorm1d, BatchNorm2d, BatchNormAct1d, BatchNormAct2d, Dropout, Dropout2d

#: Under which name, and so with which keys of the state, a network has what a letter stands for.
NAMES = {"C": "conv", "B": "norm", "R": "act", "D": "drop", "M": "pool"}

NORMS = ("batch", "none")
Norm = Literal["batch", "none"]
DropMode = Literal["channel", "element"]


@dataclass(frozen=True)
class SquarePool:
    """Sizes of a max-pool, in pixels, each for height and width."""

    kernel: int
    stride: int
    padding: int = 0

    def layer(self) -> nn.MaxPool2d:
        """Torch's layer."""
        return nn.MaxPool2d(self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class Style:
    """What B, R, D and M mean in one network, and whose layers it is made of.

    Attributes:
        kit: makes the layers.
        act: what R is.
        drop_p: the probability of D. For 0 there is no layer.
        drop_mode: whether D drops channels or elements.
        images: whether the layers get (N, C, H, W), or (N, C).
        pool: what M is, where there is one.
    """

    kit: LayerKit
    act: Activation
    drop_p: float
    drop_mode: str
    images: bool
    pool: SquarePool | None = None

    @property
    def by_channel(self) -> bool:
        """Whether D drops channels."""
        return self.images and self.drop_mode == "channel"

    def layers(self, letters: str, features: int) -> dict[str, nn.Module]:
        """The layers that `letters`, of B, R, D and M, stand for, by name in order, for `features` channels."""
        return {name: layer for run in self.runs(letters) for name, layer in self.kit(run, features, self).items()}

    def runs(self, letters: str) -> Iterator[str]:
        """`letters` as runs, each of which can be one layer; without the dropout that would drop nothing."""
        pattern = "|".join((*self._fused_runs(), *NAMES))
        yield from re.findall(pattern, letters if self.drop_p else letters.replace("D", ""))

    def _fused_runs(self) -> Iterator[str]:
        """What one fused layer can be, as regular expressions, of which the first that fits counts."""
        # Max-pool commutes with activations that nowhere fall, and with dropout of channels. A random activation draws
        # other numbers behind it.
        if self.act.monotone and self.act.random is None:
            yield "BMRD?" if self.by_channel else "BMR"
        yield from ("BR?MD", "BR?D?M?") if self.by_channel else ("BR?D", "BR?M?")


#: From a run of the letters B, R, D and M, the number of features and the style to layers by their names in `NAMES`.
#: One layer alone for a whole run from B on, such as "BR", is called with the residual too, where there is one.
LayerKit = Callable[[str, int, Style], dict[str, nn.Module]]

LayersName = Literal["fastlayers", "torch"]
#: The argument `layers` of every network.
Layers = LayersName | LayerKit


def torch_layers(run: str, features: int, style: Style) -> dict[str, nn.Module]:
    """Torch's own layers, one for each letter."""
    return {NAMES[letter]: _torch_layer(letter, features, style) for letter in run}


def fused_layers(run: str, features: int, style: Style) -> dict[str, nn.Module]:
    """One layer for the whole run. It keeps the name, and thus the state, of the BatchNorm."""
    if run in ("R", "M"):  # alone they are torch's: there is nothing to fuse them with
        return torch_layers(run, features, style)
    if run == "D":
        return {"drop": (Dropout2d if style.by_channel else Dropout)(style.drop_p)}
    if run == "B":
        return {"norm": (BatchNorm2d if style.images else BatchNorm1d)(features)}
    layer = BatchNormAct2d if style.images else BatchNormAct1d
    drop_p = style.drop_p if "D" in run else 0.0
    act = style.act if "R" in run else None
    pool = _max_pool(style) if "M" in run else None
    return {"norm": layer(features, act_layer=act, drop_p=drop_p, drop_mode=style.drop_mode, pool=pool)}


KITS: dict[str, LayerKit] = {"fastlayers": fused_layers, "torch": torch_layers}


def style(
    layers: Layers, act: ActLayer = "relu", drop_p: float = 0.0, drop_mode: str = "channel", images: bool = True
) -> Style:
    """The `Style` that a network's arguments mean; ValueError or TypeError, naming the argument, for a wrong one."""
    if not callable(layers):
        arguments.one_of("layers", layers, KITS)
    arguments.probability("drop_p", drop_p)
    checks.drop_mode(drop_mode)
    kit = layers if callable(layers) else KITS[layers]
    return Style(kit, activations.resolve(act), drop_p, drop_mode, images)


def dense_style(layers: Layers, act: ActLayer = "relu", drop_p: float = 0.0) -> Style:
    """The style of what follows a linear layer: (N, C), where `Dropout1d` would drop whole rows; so, elements."""
    return style(layers, act, drop_p, "element", images=False)


def _torch_layer(letter: str, features: int, style: Style) -> nn.Module:
    match letter:
        case "B":
            return nn.BatchNorm2d(features) if style.images else nn.BatchNorm1d(features)
        case "R":
            return activations.as_module(style.act)
        case "M":
            return _max_pool(style)
        case _:
            return nn.Dropout2d(style.drop_p) if style.by_channel else nn.Dropout(style.drop_p)


def _max_pool(style: Style) -> nn.MaxPool2d:
    assert style.pool is not None, "M needs the style's `pool`"
    return style.pool.layer()
