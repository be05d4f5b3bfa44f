"""Two real gloo ranks: one plan and one placement for both, which trains under stock DistributedModelParallel."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import Topology

from tests.distributed.ranks import run_ranks
from tests.placement.planning import SHARDERS, model_of, profile_of, skewed
from torchrec_slipstream import PlanError, ProfileError, SlipstreamPlanner

pytestmark = pytest.mark.slow  # starts processes

ROWS, DIMS = [300, 4000], [16, 32]


def _planner(rank: int, **more: Any) -> SlipstreamPlanner:
    # Each rank has measured something else: the plan must be rank 0's.
    counts = [skewed(n, 20_000, seed=10 * rank + i) for i, n in enumerate(ROWS)]
    topology = Topology(world_size=2, local_world_size=2, compute_device="cuda", hbm_cap=10**7, ddr_cap=10**9)
    return SlipstreamPlanner(profile=profile_of(counts, DIMS), topology=topology, hbm_budget="40KB", **more)


def _agree(rank: int) -> tuple[str, str, float, str]:
    planner = _planner(rank)
    plan = planner.collective_plan(model_of(ROWS, DIMS), SHARDERS)
    placement = planner.placement
    assert placement is not None
    rows = hashlib.sha256(b"".join(shard.hot_rows.tobytes() for shard in placement.shards)).hexdigest()
    return str(plan), rows, placement.hit_rate, str(placement)


def _refuse(rank: int, wrong: str) -> str:
    planner = _planner(rank)
    model = model_of(ROWS, DIMS) if wrong == "memory" else model_of([300, 4001], DIMS)
    if wrong == "memory":
        planner = SlipstreamPlanner(
            profile=planner.profile,
            topology=Topology(world_size=2, local_world_size=2, compute_device="cuda", hbm_cap=500_000, ddr_cap=1000),
        )
    with pytest.raises((PlanError, ProfileError)) as caught:
        planner.collective_plan(model, SHARDERS)
    assert planner.placement is None
    return f"{type(caught.value).__name__}: {caught.value}"


def _train(rank: int) -> list[float]:
    """Stock DMP on the CPUs that there are, with the plan of a planner for CPUs; no session."""
    torch.manual_seed(0)
    counts = [skewed(n, 20_000, seed=i) for i, n in enumerate(ROWS)]
    planner = SlipstreamPlanner(profile=profile_of(counts, DIMS), hbm_budget="40KB", batch_size=8)
    model = nn.Sequential(model_of(ROWS, DIMS).bags)
    plan = planner.collective_plan(model, SHARDERS)
    assert planner.topology.world_size == 2
    assert planner.placement is not None
    assert planner.placement.hit_rate == 0.0
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=SHARDERS)
    for module in sharded.module.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.constant_(parameter, 0.5)
    generator = np.random.default_rng(rank)
    losses = []
    batch = KeyedJaggedTensor(
        keys=["f0", "f1"],
        values=torch.from_numpy(np.concatenate([generator.integers(0, n, 8) for n in ROWS])),
        lengths=torch.ones(16, dtype=torch.int64),
    )
    for _ in range(5):
        output = sharded(batch).values()
        loss = (output**2).mean()
        loss.backward()
        losses.append(float(loss))
    return losses


def test_ranks_agree_on_rank_0s_plan() -> None:
    first, second = run_ranks(2, _agree)
    assert first == second
    assert 0.0 < first[2] < 1.0
    assert _planner(0).profile != _planner(1).profile


@pytest.mark.parametrize("wrong", ["memory", "profile"])
def test_every_rank_hears_why_there_is_no_plan(wrong: str) -> None:
    first, second = run_ranks(2, _refuse, wrong)
    assert first == second
    assert ("too little" if wrong == "memory" else "4001 rows") in first


def test_the_plan_trains_under_stock_torchrec() -> None:
    for losses in run_ranks(2, _train):
        assert all(later < earlier for earlier, later in pairwise(losses))
