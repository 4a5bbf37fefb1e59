"""The emulator under which CUDA kernels are tested: it does what CUDA does, and reports what CUDA leaves open."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ORDERS = ("up", "down", "random")


@pytest.fixture
def emulated(cuda_emulated: ModuleType) -> Iterator[ModuleType]:
    yield cuda_emulated
    cuda_emulated.set_order(cuda_emulated.Order.up)


@pytest.fixture(params=ORDERS)
def in_any_order(request: pytest.FixtureRequest, emulated: ModuleType) -> ModuleType:
    """Whoever goes first, a correct kernel does the same."""
    emulated.set_order(getattr(emulated.Order, request.param), seed=1)
    return emulated


def run(emulated: ModuleType, name: str, size: int | NDArray[np.int32], **launch: Any) -> NDArray[np.int32]:
    """The array that the probe left, having been given 0, 1, 2 and so on."""
    data = np.arange(size, dtype=np.int32) if isinstance(size, int) else size
    emulated.run_probe(name, data, **launch)
    return data


class TestThreads:
    def test_have_their_indices(self, in_any_order: ModuleType) -> None:
        data = np.full(5 * 3 * 2 * 4 * 3 * 2, -1, np.int32)
        run(in_any_order, "indices_of_threads", data, grid=[5, 3, 2], block=[4, 3, 2])
        assert data.tolist() == list(range(data.size))

    @pytest.mark.parametrize("threads", [32, 64, 1024])
    def test_of_a_warp_add_up(self, in_any_order: ModuleType, threads: int) -> None:
        got = run(in_any_order, "sums_of_warps", 3 * threads, grid=[3], block=[threads])
        expected = np.arange(3 * threads).reshape(-1, 32).sum(1).repeat(32)
        assert (got == expected).all()

    def test_of_a_warp_shuffle_and_vote(self, in_any_order: ModuleType) -> None:
        got = run(in_any_order, "shuffles", 4 * 32).reshape(32, 4)
        lanes = np.arange(32)
        assert (got[:, 0] == lanes // 8 * 8 + 5 + 300).all()
        assert (got[:, 1] == np.where(lanes % 16 + 3 < 16, lanes + 3, lanes)).all()
        assert (got[:, 2] == sum(1 << lane for lane in range(0, 30, 3)) + (1 << 30)).all()
        assert (got[:, 3] == 1).all()

    def test_of_half_a_warp_meet_apart(self, in_any_order: ModuleType) -> None:
        got = run(in_any_order, "halves_of_warps", 64, block=[64])
        # An odd number of exchanges with the neighbour on either side, then with the other half.
        assert (got == np.arange(64) ^ 1 ^ 16).all()

    @pytest.mark.parametrize("threads", [1, 31, 96, 1024])
    def test_of_a_block_exchange_through_shared_memory(self, in_any_order: ModuleType, threads: int) -> None:
        got = run(in_any_order, "reverse_block", 2 * threads, grid=[2], block=[threads], shared_bytes=4 * threads)
        assert (got == np.arange(2 * threads).reshape(2, threads)[:, ::-1].ravel()).all()

    @pytest.mark.sanitizers_see_it
    def test_take_turns_in_the_order_that_was_set(self, emulated: ModuleType) -> None:
        def last(name: str, order: str, **launch: Any) -> int:
            emulated.set_order(getattr(emulated.Order, order), seed=3)
            return int(run(emulated, name, 1, **launch)[0])

        for name, launch in (("last_thread", {"block": [50]}), ("last_block", {"grid": [50]})):
            assert last(name, "up", **launch) == 49
            assert last(name, "down", **launch) == 0
            assert last(name, "random", **launch) == last(name, "random", **launch) not in (0, 49)

    @pytest.mark.sanitizers_see_it
    def test_take_other_turns_with_another_seed(self, emulated: ModuleType) -> None:
        seen = set()
        for seed in range(10):
            emulated.set_order(emulated.Order.random, seed)
            seen.add(int(run(emulated, "last_thread", 1, block=[50])[0]))
        assert len(seen) > 3


class TestSharedMemory:
    def test_is_nan_at_the_start_of_each_block(self, emulated: ModuleType) -> None:
        got = run(emulated, "shared_at_start", 64, grid=[2], block=[32], shared_bytes=128)
        assert np.isnan(got.view(np.float32)).all()
        assert np.isnan(got.view(np.float64)).all()

    @pytest.mark.sanitizers_see_it
    def test_shows_a_missing_barrier(self, emulated: ModuleType) -> None:
        got = run(emulated, "reverse_block_without_barrier", 32, shared_bytes=128)
        assert not (got == np.arange(32)[::-1]).all()

    @pytest.mark.sanitizers_see_it
    def test_has_an_end(self, emulated: ModuleType) -> None:
        with pytest.raises(RuntimeError, match=r"block \(0, 0, 0\): wrote beyond its shared memory"):
            run(emulated, "beyond_shared_memory", 32, shared_bytes=128)


class TestBlocksTogether:
    @pytest.mark.parametrize("cluster", [1, 2, 8])
    def test_of_a_cluster_see_each_other(self, in_any_order: ModuleType, cluster: int) -> None:
        launch: dict[str, Any] = {"grid": [16], "block": [40], "shared_bytes": 160, "cluster": cluster}
        got = run(in_any_order, "rotate_cluster", 16 * 40, **launch)
        blocks = np.arange(16 * 40).reshape(16 // cluster, cluster, 40)
        assert (got == np.roll(blocks, -1, axis=1).ravel()).all()

    def test_of_a_cluster_have_to_start_before_they_are_read(self, emulated: ModuleType) -> None:
        with pytest.raises(RuntimeError, match="cluster_peer before any cluster_sync"):
            run(emulated, "rotate_cluster_at_once", 64, grid=[2], shared_bytes=128, cluster=2)

    def test_of_a_cluster_must_not_end_before_they_are_read(self, emulated: ModuleType) -> None:
        with pytest.raises(RuntimeError, match=r"the block of rank [01] is ending, and its shared memory with it"):
            run(emulated, "rotate_cluster_and_leave", 64, grid=[2], shared_bytes=128, cluster=2)

    def test_of_a_cluster_must_not_end_before_the_barrier(self, emulated: ModuleType) -> None:
        with pytest.raises(RuntimeError, match=r"deadlock: in block \(0, 0, 0\), 32 threads at cluster_sync"):
            run(emulated, "cluster_of_which_one_leaves", 1, grid=[2], cluster=2)

    @pytest.mark.parametrize("cluster", [1, 4])
    def test_of_a_cooperative_grid_meet(self, in_any_order: ModuleType, cluster: int) -> None:
        got = run(in_any_order, "sum_over_grid", 12, grid=[12], block=[33], cluster=cluster, cooperative=True)
        assert (got == 78).all()

    def test_of_another_grid_do_not(self, emulated: ModuleType) -> None:
        with pytest.raises(RuntimeError, match="grid_sync in a launch that is not cooperative"):
            run(emulated, "sum_over_grid", 12, grid=[12])


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "barrier_for_some",
                r"deadlock: in block .*, 63 threads at __syncthreads \(probes.cpp:\d+\); 1 thread ended",
            ),
            ("two_barriers", r"divergent barrier: __syncthreads at probes.cpp:\d+, while other threads wait at"),
            ("lane_that_leaves", r"deadlock: .*; 31 threads in __syncwarp \(.*\) that lacks the lanes 0x00000008"),
            ("lane_at_a_barrier", r"deadlock: .* at __syncthreads \(.*in __syncwarp .* lacks the lanes 0x00000008"),
            (
                "different_masks",
                r"deadlock: .*, 32 threads ended; 32 threads in __syncwarp .* lacks the lanes 0xffff0000",
            ),
            ("lane_outside_its_mask", r"__syncwarp at .*: this lane is not in the mask 0x00000001"),
            ("source_outside_its_mask", r"a shuffle at .*: reads lane 20, which is not in the mask 0x0000ffff"),
            ("vote_and_shuffle", r"divergent warp: a shuffle at .*, while other lanes are in a vote at"),
        ],
    )
    def test_say_who_went_another_way(self, emulated: ModuleType, name: str, message: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            run(emulated, name, 1, block=[64])

    def test_of_a_kernel_reach_the_caller(self, in_any_order: ModuleType) -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match=r"^thrown by thread 5$"):
                run(in_any_order, "throws", 1, grid=[2], block=[64])
        assert run(in_any_order, "reverse_block", 2, block=[2], shared_bytes=8).tolist() == [1, 0]

    @pytest.mark.parametrize(
        "launch",
        [
            {"block": [1025]},
            {"block": [0]},
            {"block": [1, 1, 65]},
            {"block": [32, 33]},
            {"grid": [0]},
            {"grid": [1, 65536]},
            {"grid": [1, 1, 65536]},
            {"shared_bytes": 227 * 1024 + 1},
            {"cluster": 0},
            {"grid": [16], "cluster": 16},
            {"grid": [3], "cluster": 2},
            {"grid": [65], "cooperative": True},
        ],
        ids=str,
    )
    def test_of_launches_that_no_gpu_takes(self, emulated: ModuleType, launch: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^launch: "):
            run(emulated, "last_thread", 1, **launch)

    def test_of_no_launch_that_a_gpu_takes(self, emulated: ModuleType) -> None:
        assert run(emulated, "last_thread", 1, block=[1024], shared_bytes=227 * 1024)[0] == 1023
        assert run(emulated, "last_block", 1, grid=[1, 65535], block=[1])[0] == 0
