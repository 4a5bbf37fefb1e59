"""What the ranks of a process group tell each other in synchronised batch normalisation: one gather, one sum.

By the functional collectives that `torch.compile` knows, on any backend of `torch.distributed`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Status(IntEnum):
    """What a rank says of itself beside its statistics."""

    FAILED = -1  # it raises an error, and so should all others
    NO_GRAPH = 0  # no backward will come
    GRAPH = 1  # a backward will come, that does not need the gradient of the input
    INPUT_GRADIENT = 2  # a backward will come that does


class Gathered(NamedTuple):
    """The moments of all ranks, (ranks, C) and (ranks, 1), in float64."""

    mean: Tensor
    squares: Tensor  # of deviations from the rank's own mean, summed
    values: Tensor  # per channel, how many


class Others(NamedTuple):
    """What all ranks together do in backward.

    Attributes:
        sums: whether some rank needs the gradient of its input, so that all sum over the ranks.
        absent: the global ranks that record no graph and so cannot take part in that.
    """

    sums: bool
    absent: tuple[int, ...]


def group_to_synchronise(process_group: ProcessGroup | None) -> ProcessGroup | None:
    """`process_group`, or the default one; None where there are no other ranks.

    Raises:
        ValueError: this process is no member of `process_group`.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = distributed.group.WORLD if process_group is None else process_group
    ranks = distributed.get_world_size(group)
    if ranks < 1:
        raise ValueError("process_group: this process is not a member of it; allowed: None, or a group that it is in")
    return group if ranks > 1 else None


def gather(moments: Tensor, count: int, status: Status, group: ProcessGroup) -> tuple[Gathered, Others]:
    """Gathers every rank's moments, with how it fares, in one collective.

    Args:
        moments: (2C,) in float64: means, then sums of squared deviations from them.
        count: how many values per channel they are of; may be 0.
        status: of this rank.
        group: every rank of it calls this, or `tell_failure`.

    Raises:
        RuntimeError: a rank failed.
        ValueError: there are fewer than two values per channel on all ranks together.
    """
    everything = _all_gather(torch.cat((moments, moments.new_tensor([count, status]))), group)
    channels = moments.shape[0] // 2
    gathered = Gathered(everything[:, :channels], everything[:, channels:-2], everything[:, -2:-1])
    if torch.compiler.is_compiling() or (moments.is_cuda and torch.cuda.is_current_stream_capturing()):
        # Python cannot look at values here; all ranks run the same graph, so they have the same status.
        return gathered, Others(status == Status.INPUT_GRADIENT, ())
    counts, states = everything[:, -2:].t().tolist()
    _raise_if_failed(states, group)
    if sum(counts) < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {int(sum(counts))} on all "
            f"{len(counts)} ranks together (input: N * spatial size, summed over the ranks; allowed: 2 and more)"
        )
    return gathered, Others(Status.INPUT_GRADIENT in states, _ranks_with(Status.NO_GRAPH, states, group))


def tell_failure(num_features: int, device: torch.device, group: ProcessGroup) -> None:
    """Takes part in the others' `gather`, so that they raise instead of waiting for this rank."""
    status = [0.0] * (2 * num_features + 1) + [float(Status.FAILED)]
    _all_gather(torch.tensor(status, dtype=torch.float64, device=device), group)


def total(sums: Tensor, group_name: str) -> Tensor:
    """The sum of `sums` over the ranks of a group."""
    ops = torch.ops._c10d_functional
    result: Tensor = ops.wait_tensor(ops.all_reduce(sums, "sum", group_name))
    return result


def _all_gather(row: Tensor, group: ProcessGroup) -> Tensor:
    ops, ranks = torch.ops._c10d_functional, group.size()
    rows: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(row, ranks, group.group_name))
    return rows.view(ranks, -1)


def _raise_if_failed(states: list[float], group: ProcessGroup) -> None:
    failed = _ranks_with(Status.FAILED, states, group)
    if failed:
        raise RuntimeError(
            f"SyncBatchNorm: rank {', '.join(map(str, failed))} failed in this layer, so no rank has the statistics of "
            "the whole batch; the error that was raised there says why"
        )


def _ranks_with(status: Status, states: list[float], group: ProcessGroup) -> tuple[int, ...]:
    if status not in states:
        return ()
    ranks = torch.distributed.get_process_group_ranks(group)
    return tuple(rank for rank, state in zip(ranks, states, strict=True) if state == status)
