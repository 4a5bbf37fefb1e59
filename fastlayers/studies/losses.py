"""The losses of the reports, by torch and kornia: logits (N, C) and labels (N,) to the mean over the batch."""

from __future__ import annotations

from collections.abc import Callable

from kornia.losses import FocalLoss
from torch import Tensor, nn
from torch.nn import functional as F

from fastlayers.studies.config import Loss


class _OneHot(nn.Module):
    """A loss between the outputs and one-hot targets."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype))
        return loss


class _SummedOverClasses(nn.Module):
    """A loss that averages over images and classes, times the number of classes."""

    def __init__(self, averaged: nn.Module) -> None:
        super().__init__()
        self.averaged = averaged

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = logits.shape[1] * self.averaged(logits, labels)
        return loss


_LOSSES: dict[str, Callable[[Loss], nn.Module]] = {
    "cross_entropy": lambda loss: nn.CrossEntropyLoss(),
    "smooth_l1": lambda loss: _OneHot(nn.SmoothL1Loss()),
    "bce_with_logits": lambda loss: _OneHot(nn.BCEWithLogitsLoss()),
    "mse": lambda loss: _SummedOverClasses(_OneHot(nn.MSELoss())),
    # The sum over the wrong classes j of max(0, margin - x_label + x_j): Weston and Watkins 1999, "Support Vector
    # Machines for Multi-Class Pattern Recognition", section 3.
    "hinge": lambda loss: _SummedOverClasses(nn.MultiMarginLoss(margin=loss.margin)),
    # Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 4. kornia averages over the classes, too, of
    # which all but the label's are zero.
    "focal": lambda loss: _SummedOverClasses(FocalLoss(alpha=None, gamma=loss.gamma, reduction="mean")),
}


def build(loss: Loss) -> nn.Module:
    """The module for `loss`."""
    return _LOSSES[loss.name](loss)
