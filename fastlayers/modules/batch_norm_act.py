"""BatchNorm with residual add, activation and dropout, as one layer that runs one kernel each way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlayers import activations, checks, pooling
from fastlayers.activations import ActLayer
from fastlayers.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, _FusedBatchNorm
from fastlayers.modules.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from fastlayers.pooling import Numbers, Pool, PoolLayer

DropLayer = type[nn.Module] | nn.Module | None

# The defaults of the keyword arguments for a pool.
_NO_POOL = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}

_DROP_MODES: dict[type[nn.Module], str] = {
    nn.Dropout: "element",
    Dropout: "element",
    nn.Dropout1d: "channel",
    Dropout1d: "channel",
    nn.Dropout2d: "channel",
    Dropout2d: "channel",
    nn.Dropout3d: "channel",
    Dropout3d: "channel",
}


class _BatchNormAct(_FusedBatchNorm):
    """``pool(dropout(act(batch_norm(input) + residual)))``. Constructor names are timm's, then this library's own.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in `torch.nn.BatchNorm2d`.
        apply_act: False leaves the activation out.
        act_layer: the activation: a name of `fastlayers.activations.NAMES`, an ``nn`` class or a module; None is
            identity.
        act_kwargs: its parameters, for a name or a class.
        inplace: accepted because timm has it; the fused kernel keeps no intermediate that it could overwrite, so there
            is nothing to do in place.
        drop_layer: one of torch's or this library's dropouts, as a class (p = 0.5) or a module, read for its p and kind
            and fused.
        drop_p: the probability of dropping in training, in [0, 1].
        drop_mode: "channel" (`nn.Dropout2d`) or "element" (`nn.Dropout`).
        pool: max-pooling behind all else: `nn.MaxPool1d`, 2d or 3d, read for its parameters, or what else
            `fastlayers.pooling.resolve` takes.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode: the same as torch's arguments.
        bias: False leaves the bias out, as in torch 2.13.
        device, dtype: of the parameters and statistics.

    The order is normalise, add, activate, drop. timm drops before the activation, which for ReLU and leaky ReLU is the
    same. In evaluation mode nothing is dropped. RReLU is fused in evaluation mode only. Max-pool comes last; whole
    channels dropped behind it are the same as those dropped before. It is fused in one and two dimensions, for windows
    of up to 256 elements, without a residual, and where no single elements are dropped and no slopes are drawn; else it
    is a pass of its own, by torch.

    Shapes: `input`, `residual` and the result are of one shape, (N, C, ...), and one dtype; with a pool, the result has
    the sizes that it leaves.

    Attributes:
        pool: a `fastlayers.pooling.Pool`, or None.

    Raises:
        ValueError: an unknown activation or parameter of one, p outside [0, 1], an unknown `drop_mode`, `drop_layer`
            together with `drop_p` or `drop_mode`, a `drop_layer` that is no dropout of torch's or this library's, a
            pool that torch does not take or of other dimensions, `pool` together with ``pool_kernel_size`` or others.
        TypeError: a `pool` that is no max-pooling of torch's.
    """

    # Of the class, for what was pickled without it.
    pool: Pool | None = None
    # How many spatial dimensions a pool has; None if any number.
    _spatial_dims: int | None = None

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
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, bias=bias
        )
        activation = activations.resolve(act_layer, act_kwargs)
        self.act = activation if apply_act else activations.IDENTITY
        self.drop_p, self.drop_mode = _dropout_of(drop_layer, drop_p, drop_mode)
        numbers = (pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode)
        self.pool = _pool_of(pool, numbers, self._spatial_dims)

    def _fused_with(self) -> tuple[str, ...]:
        act = f"the activation {self.act.name}" if self.act.code != activations.IDENTITY.code else ""
        drop = f"dropout of p = {self.drop_p}" if self.drop_p else ""
        return tuple(filter(None, (act, drop, "" if self.pool is None else str(self.pool))))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``pool(dropout(act(batch_norm(input) + residual)))``; `residual` has the shape and dtype of `input`."""
        # Not left to functional: without running statistics it is told `training` in evaluation mode too.
        act = self.act if self.training else self.act.in_evaluation()
        return self._fused(input, residual, act, self.drop_p, self.drop_mode, pool=self.pool)

    def extra_repr(self) -> str:
        """The description that torch gives of a BatchNorm, and what is fused with it."""
        pool = "" if self.pool is None else f", pool={self.pool}"
        return f"{super().extra_repr()}, act={self.act.name}, drop_p={self.drop_p}, drop_mode={self.drop_mode!r}{pool}"


def _dropout_of(layer: DropLayer, p: float | None, mode: str | None) -> tuple[float, str]:
    """The probability and mode that the three arguments for dropout mean together."""
    if layer is None:
        probability = 0.0 if p is None else p
        checks.dropout_probability(probability, "drop_p")
        checks.drop_mode("channel" if mode is None else mode)
        return probability, mode or "channel"
    if p is not None or mode is not None:
        raise ValueError(
            f"drop_layer: {layer!r} given together with drop_p={p}, drop_mode={mode!r}; give one or the other"
        )
    # Subclasses are not taken: their forward may be another function.
    kind = _DROP_MODES.get(layer if isinstance(layer, type) else type(layer))
    if kind is None:
        allowed = ", ".join(sorted({f"nn.{t.__name__}" for t in _DROP_MODES}))
        raise ValueError(f"drop_layer: cannot fuse {layer!r}; allowed: {allowed} and fastlayers' own, or drop_p")
    module = layer() if isinstance(layer, type) else layer
    layer_p: Any = module.p
    checks.dropout_probability(layer_p, "drop_layer.p")
    return layer_p, kind


def _pool_of(pool: PoolLayer, numbers: tuple[Any, ...], dims: int | None) -> Pool | None:
    """The max-pooling that the arguments for it mean together; `numbers` in the order of torch's."""
    given = {name: value for name, value in zip(pooling.KEYWORDS, numbers, strict=True) if value != _NO_POOL[name]}
    if pool is not None and given:
        described = ", ".join(f"pool_{name}={value!r}" for name, value in given.items())
        raise ValueError(f"pool: {pool} given together with {described}; give one or the other")
    if pool is None and not given:
        return None
    if pool is None and "kernel_size" not in given:
        raise ValueError(f"pool_kernel_size: should be given together with pool_{min(given)}")
    layer = given if pool is None else pool
    return pooling.resolve(layer, pooling.dims_of(layer) if dims is None else dims)


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    """BatchNorm1d, residual add, activation, dropout and max-pool in one kernel each way.

    For (N, C) or (N, C, L), with max-pool (N, C, L). Arguments: see `_BatchNormAct`, its base.
    """

    _spatial_dims = 1


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    """BatchNorm2d, residual add, activation, dropout and max-pool in one kernel each way.

    For (N, C, H, W), contiguous or channels_last. Arguments: see `_BatchNormAct`, its base.
    """

    _spatial_dims = 2


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    """BatchNorm3d, residual add, activation and dropout in one kernel each way, max-pool behind them by torch.

    For (N, C, D, H, W), contiguous or channels_last_3d. Arguments: see `_BatchNormAct`, its base.
    """

    _spatial_dims = 3
