"""What the operators with batch normalisation do with tensors of one number per channel: statistics and gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastlayers.triton import backward, forward, launches
from fastlayers.triton.calls import sizes
from fastlayers.triton.calls.copies import contiguous, copy_back
from fastlayers.triton.calls.settings import Call
from fastlayers.triton.plans import Frame


class ForwardChannels(NamedTuple):
    """Those of forward, in the order in which kernels take them; running ones are copies if they are not contiguous."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    batches: Tensor | None

    @classmethod
    def of(
        cls,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
    ) -> ForwardChannels:
        """From an operator's arguments. Batches are counted for running statistics in training only."""
        mean = input.new_empty(input.shape[1], dtype=torch.float64)
        return cls(
            contiguous(weight), contiguous(bias), mean, torch.empty_like(mean), contiguous(running_mean),
            contiguous(running_var), num_batches_tracked if training and running_mean is not None else None,
        )  # fmt: skip

    def of_nothing(self) -> None:
        """As torch: statistics of nothing are 0 and leave the running ones as they are, and the batch counts."""
        self.mean.zero_()
        self.invstd.zero_()
        if self.batches is not None:
            self.batches.add_(1)

    def start(self, call: Call) -> None:
        """To be called before kernels are."""
        # A cumulative average divides by the new count, which no program may then be writing.
        if self.batches is not None and call.cumulative:
            self.batches.add_(1)

    def finish(self, running_mean: Tensor | None, running_var: Tensor | None) -> None:
        """To be called with an operator's own running statistics when kernels have updated these."""
        copy_back((running_mean, running_var), (self.running_mean, self.running_var))

    def updating(self, call: Call) -> tuple[bool, bool]:
        """COUNT_BATCHES, CUMULATIVE. Without running statistics kernels do neither."""
        return self.batches is not None and not call.cumulative, self.batches is not None and call.cumulative

    def without_running(self) -> ForwardChannels:
        """For kernels that find mean and invstd filled."""
        return self._replace(running_mean=None, running_var=None)

    def fill(self, frame: Frame, x: Tensor, call: Call) -> None:
        """Launches what computes mean and invstd of the batch, updates the running ones and counts."""
        grid, updating, statistics = frame.passes, self.updating(call), self[2:]
        partials = self.mean.new_empty(3, grid.parts, frame.layout.channels) if grid.parts > 1 else None
        launches.launch(
            forward.batch_statistics, grid, (x, partials, *statistics), (call.eps, call.momentum),
            frame.pick(sizes.STATISTICS),
            (*updating, *grid.tile, *frame.constants),
        )  # fmt: skip
        if partials is not None:
            launches.launch(
                forward.merge_statistics, frame.merge, (partials, *statistics), (call.eps, call.momentum),
                frame.pick(sizes.MERGE_STATISTICS), (*updating, *frame.merge.tile),
            )  # fmt: skip


class ParameterGradients(NamedTuple):
    """Those of weight and bias; empty for those that are not wanted."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, mean: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: bool) -> ParameterGradients:
        """To be written."""
        return cls(
            *(mean.new_empty(0) if p is None or not wanted else p.new_empty(p.shape) for p in (weight, bias)),
        )

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """As kernels take them."""
        return tuple(t if t.numel() else None for t in self)

    @property
    def wanted(self) -> bool:
        """Whether there is one."""
        return any(t.numel() for t in self)

    def of_nothing(self) -> None:
        """Gradients by a batch without elements."""
        for t in self:
            t.zero_()


class BackwardTensors(NamedTuple):
    """The tensors of backward, in the order in which kernels take them."""

    grad_output: Tensor
    x: Tensor
    residual: Tensor | None
    bits: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    invstd: Tensor
    grad_input: Tensor | None
    grad_residual: Tensor | None


def gradient_sums(
    frame: Frame, tensors: BackwardTensors, parameters: ParameterGradients, wanted: bool, call: Call
) -> Tensor | None:
    """Sums of g and g x^ per channel, (2, C); and what gradients of full size `tensors` asks for, as in evaluation.

    So this is all of backward in evaluation.
    """
    grid, channels = frame.passes, frame.layout.channels
    sums = tensors.mean.new_empty(2, channels) if wanted else None
    partials = tensors.mean.new_empty(2, grid.parts, channels) if wanted and grid.parts > 1 else None
    launches.launch(
        backward.gradient_sums, grid, (*tensors, partials, sums, *parameters.pointers), call.dropping,
        frame.pick(sizes.SUMS), (*call.constants, *grid.tile, *frame.constants),
    )  # fmt: skip
    if partials is not None:
        launches.launch(
            backward.merge_sums, frame.merge, (partials, sums, *parameters.pointers), (), frame.pick(sizes.MERGE_SUMS),
            frame.merge.tile,
        )  # fmt: skip
    return sums
