"""What the layers say to torch.jit.script."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


class NotScriptable(nn.Module):
    """A layer that is traced or exported, not compiled from its source."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script` on every module that it meets. Raises NotImplementedError."""
        raise NotImplementedError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose kernels TorchScript does not know; "
            "torch.jit.trace, torch.export and torch.compile can take it"
        )
