"""Small copies of known architectures, from torch's own layers, with the number of chains that fusion finds in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 4


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class ConvNormAct(nn.Sequential):
    """Convolution, BatchNorm and, if asked for, an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: Callable[[], nn.Module] | None = nn.ReLU,
    ) -> None:
        layers: list[nn.Module] = [conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs)]
        super().__init__(*layers, *([] if act is None else [act()]))


class Head(nn.Module):
    """Mean over the image, dropout and a linear layer."""

    def __init__(self, features: int, drop_p: float = 0.2) -> None:
        super().__init__()
        self.drop, self.fc = nn.Dropout(drop_p), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc(self.drop(x.mean((2, 3))))
        return output


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions, with one activation module for both chains."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = ConvNormAct(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        output: Tensor = self.relu(out)
        return output


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, with functions for what has no state."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, WIDTH, 1), nn.BatchNorm2d(WIDTH)
        self.conv2, self.bn2 = conv(WIDTH, WIDTH, 3, stride), nn.BatchNorm2d(WIDTH)
        self.conv3, self.bn3 = conv(WIDTH, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = ConvNormAct(inputs, outputs, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        return F.relu(self.shortcut(x) + self.bn3(self.conv3(out)), inplace=True)


def resnet(block: Callable[..., nn.Module]) -> nn.Module:
    stem = nn.Sequential(conv(3, WIDTH), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    blocks = nn.Sequential(block(WIDTH, WIDTH), block(WIDTH, 2 * WIDTH, 2))
    return nn.Sequential(stem, blocks, Head(2 * WIDTH))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (WIDTH, 2 * WIDTH, 2 * WIDTH):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(True), nn.MaxPool2d(2)]
        inputs = outputs
    classifier = [nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3)]
    return nn.Sequential(*layers, nn.Flatten(), *classifier)


class DenseLayer(nn.Module):
    """DenseNet's BN-ReLU-conv twice; takes a tensor or a list of them."""

    def __init__(self, inputs: int, growth: int, drop_p: float) -> None:
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, WIDTH, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True), conv(WIDTH, growth)
        self.drop_p = drop_p

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        out = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        output: Tensor = self.conv2(self.relu2(self.norm2(out)))
        if self.drop_p > 0:
            output = F.dropout(output, p=self.drop_p, training=self.training)
        return output


class DenseBlock(nn.ModuleDict):
    """Layers that each take all outputs before."""

    def __init__(self, layers: int, inputs: int, growth: int, drop_p: float) -> None:
        super().__init__()
        for i in range(layers):
            self[f"layer{i}"] = DenseLayer(inputs + i * growth, growth, drop_p)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet() -> nn.Module:
    transition = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4, 1), nn.AvgPool2d(2))
    stem = [conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    layers = [DenseBlock(2, 4, 2, 0.3), transition, DenseBlock(1, 4, 2, 0.0), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*stem, *layers, Head(6))


class SqueezeExcite(nn.Module):
    """Channel attention."""

    def __init__(self, channels: int, gate: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.act, self.gate = nn.ReLU(), gate()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.expand(self.act(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return scale * x


class StochasticDepth(nn.Module):
    """Drops whole rows of a batch in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.p).div_(1 - self.p)


class InvertedResidual(nn.Module):
    """The block of MobileNetV2, V3 and EfficientNet."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        act: Callable[[], nn.Module],
        gate: Callable[[], nn.Module] | None = None,
        depth_p: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 2 * inputs
        attention = [] if gate is None else [SqueezeExcite(hidden, gate)]
        self.block = nn.Sequential(
            ConvNormAct(inputs, hidden, 1, act=act),
            ConvNormAct(hidden, hidden, 3, stride, hidden, act=act),
            *attention,
            ConvNormAct(hidden, outputs, 1, act=None),
        )
        self.use_residual = stride == 1 and inputs == outputs
        self.depth = StochasticDepth(depth_p)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        return x + self.depth(result) if self.use_residual else result


def mobile(
    act: Callable[[], nn.Module], gate: Callable[[], nn.Module] | None = None, depth_p: float = 0.0
) -> nn.Module:
    blocks = [
        InvertedResidual(WIDTH, WIDTH, 1, act, gate, depth_p),
        InvertedResidual(WIDTH, 2 * WIDTH, 2, act, gate, depth_p),
    ]
    stem, last = ConvNormAct(3, WIDTH, act=act), ConvNormAct(2 * WIDTH, 2 * WIDTH, 1, act=act)
    return nn.Sequential(stem, *blocks, last, Head(2 * WIDTH))


class ConvNeXtBlock(nn.Module):
    """No BatchNorm: LayerNorm over channels, and a scale for each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.norm = conv(channels, channels, 7, groups=channels), nn.LayerNorm(channels)
        self.expand, self.reduce = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.reduce(F.gelu(self.expand(y)))
        return torch.add(x, y.permute(0, 3, 1, 2))


def convnext() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 2, 2), ConvNeXtBlock(8), Head(8))


class DoubleConv(nn.Sequential):
    """Twice convolution, BatchNorm, ReLU, and dropout of channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        first = ConvNormAct(inputs, outputs, act=lambda: nn.ReLU(inplace=True))
        super().__init__(first, conv(outputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Dropout2d(0.3))


class UNet(nn.Module):
    """One level down and up, joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = DoubleConv(3, WIDTH), DoubleConv(WIDTH, 2 * WIDTH)
        self.up = nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, 2)
        self.join, self.out = DoubleConv(2 * WIDTH, WIDTH), nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = self.up(self.bottom(F.max_pool2d(skip, 2)))
        if y.shape[-2:] != skip.shape[-2:]:  # which does not trace
            y = F.interpolate(y, skip.shape[-2:])
        output: Tensor = self.out(self.join(torch.cat([skip, y], 1)))
        return output


class BasicConv(nn.Module):
    """Inception's convolution, with the activation as a function."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches, joined by concatenation."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch1 = BasicConv(inputs, 2, 1)
        self.branch2 = nn.Sequential(BasicConv(inputs, 2, 1), BasicConv(2, 2, 3))
        self.branch3 = nn.Sequential(BasicConv(inputs, 2, 1), BasicConv(2, 2, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), BasicConv(inputs, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """Two such blocks behind a max-pool, with an auxiliary output in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = BasicConv(3, WIDTH, 3), Inception(WIDTH), Inception(8)
        self.auxiliary, self.head = nn.Sequential(BasicConv(8, 4, 1), Head(4)), Head(8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.first(F.max_pool2d(self.stem(x), 3, stride=2, ceil_mode=True))
        auxiliary = self.auxiliary(y) if self.training else None
        y = self.head(self.second(y))
        return y if auxiliary is None else (y, auxiliary)


@dataclass(frozen=True)
class Model:
    """An architecture.

    Attributes:
        build: makes it.
        fused: how many chains it has.
        not_fused: how many other BatchNorms.
    """

    build: Callable[[], nn.Module]
    fused: int
    not_fused: int = 0


MODELS = {
    "resnet_basic": Model(lambda: resnet(BasicBlock), 5, 1),
    "resnet_bottleneck": Model(lambda: resnet(Bottleneck), 7, 1),
    "vgg": Model(vgg, 4),
    "densenet": Model(densenet, 9),
    "mobilenet_v2": Model(lambda: mobile(nn.ReLU6), 6, 2),
    "mobilenet_v3": Model(lambda: mobile(nn.Hardswish, nn.Hardsigmoid), 6, 2),
    "efficientnet": Model(lambda: mobile(nn.SiLU, nn.Sigmoid, 0.3), 6, 2),
    "convnext": Model(convnext, 0),
    "unet": Model(UNet, 6),
    "googlenet": Model(GoogLeNet, 14),
}
