"""Drop-in BatchNorm1d, 2d and 3d."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlayers import backends, functional, unfused
from fastlayers.activations import IDENTITY, Activation
from fastlayers.modules import guards
from fastlayers.modules.script import NotScriptable
from fastlayers.pooling import Pool


def batch_norm_of(
    layer: nn.modules.batchnorm._BatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    act: Activation = IDENTITY,
    drop_p: float = 0.0,
    drop_mode: str = "channel",
    drops: bool | None = None,
    pool: Pool | None = None,
) -> Tensor:
    """`fused_batch_norm` with the statistics of this process, for any layer."""
    layer._check_input_dim(input)
    stochastic = layer.training if drops is None else drops
    training = layer.training and not getattr(layer, "frozen", False)
    running_mean, running_var, weight, bias = _tensors_of(layer)
    # As in torch: statistics of the batch also where there are no running ones.
    batch_statistics = training or (running_mean is None and running_var is None)
    num_batches_tracked = None
    if training:
        if layer.track_running_stats:
            num_batches_tracked = layer.num_batches_tracked
        else:
            running_mean = running_var = None
    momentum, eps = layer.momentum, eps_of(layer)
    dropping = drop_p if stochastic else 0.0
    if momentum is not None and act.random is None and backends.prefers_torch(input, dropping):
        output = unfused.tiny_batch_norm_act(
            input, running_mean, running_var, weight, bias, residual, num_batches_tracked,
            batch_statistics, momentum, eps, act, dropping, drop_mode, pool,
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
        drop_p=drop_p,
        drop_mode=drop_mode,
        num_batches_tracked=num_batches_tracked,
        stochastic=stochastic,
        pool=pool,
    )


def _tensors_of(layer: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor | None, ...]:
    """Running mean and variance, weight and bias. As attributes a module finds them slowly, which tiny inputs feel."""
    parameters, buffers = layer._parameters, layer._buffers
    try:
        return buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"]
    except KeyError:  # parametrised, or replaced by plain tensors
        return layer.running_mean, layer.running_var, layer.weight, layer.bias


class _FusedBatchNorm(NotScriptable, nn.modules.batchnorm._BatchNorm):
    """What `torch.nn.BatchNorm*` do, by the fused kernels.

    Keeps nothing between calls but torch's five state entries.

    Attributes:
        frozen: see `fastlayers.freeze_batch_norm`, which sets it.
    """

    frozen: bool = False
    # Of "weight" and "bias" those whose gradients freezing has switched off.
    _frozen_parameters: tuple[str, ...] = ()
    _eps: float

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

    @property
    def eps(self) -> float:
        """What is added to the variance.

        Everything that rebuilds a BatchNorm as another layer, or folds it into one, reads this; some do it by the class
        and would leave out what this layer does besides. They get an error (`guards`). `forward` asks `eps_of`.
        """
        if not torch.compiler.is_compiling():
            guards.raise_if_reader_would_lose(self._fused_with(), self.frozen, self)
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        # Twice: torch.compile of torch 2.11 takes __dict__["eps"] for a call of the property, and extra_repr reads it.
        self.__dict__["eps"] = self._eps = value

    def _fused_with(self) -> tuple[str, ...]:
        """What this layer does besides normalising, in words."""
        return ()

    def reset_running_stats(self) -> None:
        """As in torch; frozen statistics stay as they are."""
        # torch.optim.swa_utils.update_bn resets those of every BatchNorm, and here no forward would fill them again.
        if not self.frozen:
            super().reset_running_stats()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    # A method, which a layer with other statistics overrides.
    _fused = batch_norm_of

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `input`; updates the running statistics in training."""
        return self._fused(input)


def eps_of(layer: nn.Module) -> float:
    """What `layer`, torch's or ours, adds to the variance, for code that knows what else it does."""
    value = layer._eps if isinstance(layer, _FusedBatchNorm) else layer.eps
    assert isinstance(value, float | int)
    return value


def fused_batch_norm(
    layer: nn.modules.batchnorm._BatchNorm,
    input: Tensor,
    residual: Tensor | None = None,
    act: Activation = IDENTITY,
    drop_p: float = 0.0,
    drop_mode: str = "channel",
    drops: bool | None = None,
    pool: Pool | None = None,
) -> Tensor:
    """``pool(dropout(act(layer(input) + residual)))`` with the state and mode of `layer`, torch's or ours, in one pass.

    Args:
        layer: read at the call: parameters, statistics, `momentum`, `eps`, `training`.
        input, residual: of one shape (N, C, ...) and one dtype; `residual` may be None.
        act: the activation.
        drop_p, drop_mode: as in `functional.batch_norm_act`.
        drops: whether to drop, and to draw random slopes; None is as `layer` trains.
        pool: max-pooling of the result, for as many dimensions as `input` has; or None.
    """
    run = type(layer)._fused if isinstance(layer, _FusedBatchNorm) else batch_norm_of
    return run(layer, input, residual, act, drop_p, drop_mode, drops, pool)


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
