"""Drop-in BatchNorm1d, 2d and 3d."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlayers import backends, functional, unfused
from fastlayers.activations import IDENTITY, Activation
from fastlayers.modules.script import NotScriptable


class _FusedBatchNorm(NotScriptable, nn.modules.batchnorm._BatchNorm):
    """What `torch.nn.BatchNorm*` do, by the fused kernels.

    Keeps nothing between calls but torch's five state entries.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        # torch has the argument since 2.13 only.
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _fused(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        act: Activation = IDENTITY,
        drop_p: float = 0.0,
        drop_mode: str = "channel",
    ) -> Tensor:
        self._check_input_dim(input)
        training = self.training
        running_mean, running_var, weight, bias = _tensors_of(self)
        # As in torch: statistics of the batch also where there are no running ones, but then nothing is dropped in
        # evaluation mode.
        batch_statistics = training or (running_mean is None and running_var is None)
        num_batches_tracked = None
        if training:
            if self.track_running_stats:
                num_batches_tracked = self.num_batches_tracked
            else:
                running_mean = running_var = None
        momentum, eps = self.momentum, self.eps
        dropping = drop_p if training else 0.0
        if momentum is not None and act.random is None and backends.prefers_torch(input, dropping):
            output = unfused.tiny_batch_norm_act(
                input, running_mean, running_var, weight, bias, residual, num_batches_tracked,
                batch_statistics, momentum, eps, act, dropping, drop_mode,
            )  # fmt: skip
            if output is not None:
                return output
        return functional.batch_norm_act(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            batch_statistics,
            momentum,
            eps,
            residual=residual,
            act=act,
            drop_p=dropping,
            drop_mode=drop_mode,
            num_batches_tracked=num_batches_tracked,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `input`; updates the running statistics in training."""
        return self._fused(input)


def _tensors_of(layer: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor | None, ...]:
    """Running mean and variance, weight and bias. As attributes a module finds them slowly, which tiny inputs feel."""
    parameters, buffers = layer._parameters, layer._buffers
    try:
        return buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"]
    except KeyError:  # parametrised, or replaced by plain tensors
        return layer.running_mean, layer.running_var, layer.weight, layer.bias


class BatchNorm1d(_FusedBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with the same arguments, state and results, faster.

    Input and output: (N, C) or (N, C, L); float32, float64, bfloat16 or float16, with parameters of the same dtype, or
    float32 for the 16-bit ones.
    """


class BatchNorm2d(_FusedBatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the same arguments, state and results, faster.

    Input and output: (N, C, H, W), contiguous or channels_last; dtypes as for `BatchNorm1d`.
    """


class BatchNorm3d(_FusedBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with the same arguments, state and results, faster.

    Input and output: (N, C, D, H, W), contiguous or channels_last_3d; dtypes as for `BatchNorm1d`.
    """
