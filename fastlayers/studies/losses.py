"""The losses of the reports, by torch and kornia: logits (N, C) and labels (N,) to the mean over the batch."""

from __future__ import annotations

from collections.abc import Callable

from kornia.losses import FocalLoss
from torch import Tensor, nn
from torch.nn import functional as F

from fastlayers.studies.config import Loss


class _OneHot(nn.Module):
    """A loss between outputs and one-hot targets: summed or averaged over the classes, averaged over the batch."""

    def __init__(self, elementwise: nn.Module, *, sum_over_classes: bool = False) -> None:
        super().__init__()
        self.elementwise = elementwise
        self.sum_over_classes = sum_over_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        each = self.elementwise(logits, targets)
        mean: Tensor = each.sum(1).mean() if self.sum_over_classes else each.mean()
        return mean


class _Hinge(nn.MultiMarginLoss):
    """Sum over the wrong classes j of max(0, margin - x_label + x_j), of which torch's loss is the C-th part.

    Weston and Watkins 1999, "Support Vector Machines for Multi-Class Pattern Recognition", section 3.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return input.shape[1] * super().forward(input, target)


_LOSSES: dict[str, Callable[[Loss], nn.Module]] = {
    "cross_entropy": lambda loss: nn.CrossEntropyLoss(),
    "smooth_l1": lambda loss: _OneHot(nn.SmoothL1Loss(reduction="none")),
    "bce_with_logits": lambda loss: _OneHot(nn.BCEWithLogitsLoss(reduction="none")),
    "mse": lambda loss: _OneHot(nn.MSELoss(reduction="none"), sum_over_classes=True),
    "hinge": lambda loss: _Hinge(margin=loss.margin),
    # Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 4; no weights of classes.
    "focal": lambda loss: FocalLoss(alpha=None, gamma=loss.gamma, reduction="mean"),
}


def build(loss: Loss) -> nn.Module:
    """The module for `loss`."""
    return _LOSSES[loss.name](loss)
