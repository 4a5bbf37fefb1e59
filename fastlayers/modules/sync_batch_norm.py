"""BatchNorm whose statistics are of the batches of all processes, plain and with activation, residual and dropout."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlayers import checks, collectives, functional
from fastlayers.activations import IDENTITY, Activation, ActLayer
from fastlayers.modules.batch_norm import _FusedBatchNorm
from fastlayers.modules.batch_norm_act import DropLayer, _BatchNormAct
from fastlayers.pooling import Numbers, Pool, PoolLayer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SyncBatchNorm(_FusedBatchNorm):
    """`torch.nn.SyncBatchNorm` with the same arguments and state, on any device and backend of `torch.distributed`.

    In training with several processes, each forward gathers the moments of all ranks once and each backward sums over
    the ranks once. Without a process group, with one process, in evaluation mode and when frozen it is `BatchNorm2d`,
    for any number of dimensions. Ranks may have batches of different sizes, also empty ones. Where the layer raises an
    error on one rank, it raises on all.

    Input and output: (N, C) or (N, C, ...); dtypes as for `BatchNorm1d`. With several processes it cannot be
    differentiated twice.

    Args:
        process_group: whose statistics are taken together; None is all processes.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        checks.sync_batch_norm_shape(input)

    def _fused(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        act: Activation = IDENTITY,
        drop_p: float = 0.0,
        drop_mode: str = "channel",
        drops: bool | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        synchronises = self.training and not self.frozen
        group = collectives.group_to_synchronise(self.process_group) if synchronises else None
        if group is None:
            return super()._fused(input, residual, act, drop_p, drop_mode, drops, pool)
        tracks = self.track_running_stats
        return functional.sync_batch_norm_act(
            input,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.weight,
            self.bias,
            self.momentum,
            self._eps,
            process_group=group,
            num_features=self.num_features,
            residual=residual,
            act=act,
            drop_p=0.0 if drops is False else drop_p,
            drop_mode=drop_mode,
            num_batches_tracked=self.num_batches_tracked if tracks else None,
            pool=pool,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy in the same process group, which cannot be copied."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new


class SyncBatchNormAct(_BatchNormAct, SyncBatchNorm):
    """`SyncBatchNorm`, residual add, activation, dropout and max-pool.

    Arguments: those of `BatchNormAct2d`, and `process_group`. Each rank draws masks of dropout of its own. With several
    processes, max-pool is a pass of its own, by torch. It has as many dimensions as the layer given as `pool`, or
    numbers in the tuple given as `pool_kernel_size`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: ActLayer = "relu",
        act_kwargs: Mapping[str, object] | None = None,
        inplace: bool = True,
        drop_layer: DropLayer = None,
        *,
        drop_p: float | None = None,
        drop_mode: str | None = None,
        pool: PoolLayer = None,
        pool_kernel_size: Numbers | None = None,
        pool_stride: Numbers | None = None,
        pool_padding: Numbers = 0,
        pool_dilation: Numbers = 1,
        pool_ceil_mode: bool = False,
        process_group: ProcessGroup | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, apply_act, act_layer, act_kwargs, inplace,
            drop_layer, drop_p=drop_p, drop_mode=drop_mode, pool=pool, pool_kernel_size=pool_kernel_size,
            pool_stride=pool_stride, pool_padding=pool_padding, pool_dilation=pool_dilation,
            pool_ceil_mode=pool_ceil_mode, bias=bias, device=device, dtype=dtype,
        )  # fmt: skip
        self.process_group = process_group
