"""Drop-in Dropout, Dropout1d, 2d and 3d."""

from __future__ import annotations

from torch import Tensor, nn

from fastlayers import functional
from fastlayers.modules.script import NotScriptable


class Dropout(NotScriptable, nn.Dropout):
    """`torch.nn.Dropout`: the same mask for the same seed; backward keeps one bit per element.

    Input and output: any shape; float32, float64, bfloat16 or float16. ``inplace=True`` runs torch's own kernel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drops in training; gives back `input` in evaluation mode."""
        return functional.dropout(input, self.p, self.training, self.inplace)


class Dropout1d(NotScriptable, nn.Dropout1d):
    """`torch.nn.Dropout1d`: drops channels of (N, C, L), or of (C, L). The same mask for the same seed."""

    def forward(self, input: Tensor) -> Tensor:
        """Drops in training; gives back `input` in evaluation mode."""
        return functional.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(NotScriptable, nn.Dropout2d):
    """`torch.nn.Dropout2d`: drops channels of (N, C, H, W). The same mask for the same seed."""

    def forward(self, input: Tensor) -> Tensor:
        """Drops in training; gives back `input` in evaluation mode."""
        return functional.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(NotScriptable, nn.Dropout3d):
    """`torch.nn.Dropout3d`: drops channels of (N, C, D, H, W), or of (C, D, H, W). The same mask for the same seed."""

    def forward(self, input: Tensor) -> Tensor:
        """Drops in training; gives back `input` in evaluation mode."""
        return functional.dropout3d(input, self.p, self.training, self.inplace)
