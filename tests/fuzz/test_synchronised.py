"""`functional.sync_batch_norm_act` in a process group of one rank, where it is `batch_norm_act` in training.

Statistics are found, gathered, merged and used as with several ranks, which sync_worker.py has, on few shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastlayers as fl
from tests.fuzz import calls, profiles
from tests.fuzz.problems import Problem, Tensors, problems


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _is_synchronised(p: Problem) -> bool:
    """Whether the function has it: it trains and drops, and empty batches have no statistics on any rank."""
    return p.training and p.drops and math.prod(p.shape) > 0


def _synchronised(t: Tensors) -> Tensor:
    p = t.problem
    assert dist.group.WORLD is not None
    torch.manual_seed(p.seed)
    return fl.functional.sync_batch_norm_act(
        t.input, t.running_mean, t.running_var, t.weight, t.bias, p.momentum, p.eps,
        process_group=dist.group.WORLD, num_features=p.shape[1], residual=t.residual, act=p.act.module(),
        drop_p=p.drop_p, drop_mode=p.drop_mode, num_batches_tracked=t.num_batches_tracked,
        pool=None if p.pool is None else p.pool.module(),
    )  # fmt: skip


@profiles.examples(0.2)
@given(
    (problems(most=1500) | problems(most=800, pooled=True)).filter(_is_synchronised),
    st.sampled_from(("auto", "cpp")),
)
def test_sync_batch_norm_act(problem: Problem, backend: str) -> None:
    with fl.use_backend(backend):
        calls.check(problem, _synchronised, kernels=backend == "cpp", in_steps=True)
    profiles.count("sync_batch_norm_act")
