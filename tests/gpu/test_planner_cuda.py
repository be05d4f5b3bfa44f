"""A plan on a real GPU: it trains under stock DistributedModelParallel, and takes the bytes that it says."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

from tests.placement.planning import SHARDERS, model_of, profile_of, skewed
from torchrec_slipstream import SlipstreamPlanner

pytestmark = pytest.mark.gpu

ROWS, DIMS, BATCH = [100_000, 200_000, 500], [64, 64, 64], 256


@pytest.fixture
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("backing", ["caching", "uvm"])
def test_the_plan_trains_and_takes_the_bytes_it_says(backing: str) -> None:
    counts = [skewed(n, 300_000, seed=n) for n in ROWS]
    planner = SlipstreamPlanner(
        profile=profile_of(counts, DIMS),
        hbm_budget="10MiB",
        batch_size=BATCH,
        backing=backing,
        session=False,
        storage_reservation=FixedPercentageStorageReservation(0.1),
    )
    assert planner.topology.compute_device == "cuda"
    model = nn.Sequential(model_of(ROWS, DIMS).bags)
    plan = planner.collective_plan(model, SHARDERS)
    placement = planner.placement
    assert placement is not None
    kernels = {table.kernel for table in placement.tables.values()}
    assert kernels == {"fused", {"caching": "fused_uvm_caching", "uvm": "fused_uvm"}[backing]}

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sharded = DistributedModelParallel(model, device=torch.device("cuda", 0), plan=plan, sharders=SHARDERS)
    allocated = torch.cuda.memory_allocated() - before
    booked = sum(shard.hbm_bytes for shard in placement.shards)
    if backing == "uvm":  # the overlay and its slot words are not built by stock TorchRec
        hot = sum(shard.placed_bytes for shard in placement.shards if not shard.whole)
        words = sum(4 * shard.rows for shard in placement.shards if not shard.whole)
        booked -= hot + words
    # Beside what grows with rows: sets are rounded up to 32 slots, allocations to 512 bytes, and a few small buffers.
    assert booked * 0.98 - 2**16 <= allocated <= booked * 1.02 + 2**20

    generator = np.random.default_rng(0)
    losses = []
    for _ in range(10):
        ids = [(n * generator.random(BATCH) ** 4).astype(np.int64) for n in ROWS]
        batch = KeyedJaggedTensor(
            keys=[f"f{i}" for i in range(len(ROWS))],
            values=torch.from_numpy(np.concatenate(ids)).cuda(),
            lengths=torch.ones(BATCH * len(ROWS), dtype=torch.int64).cuda(),
        )
        loss = ((sharded(batch).values() - 1.0) ** 2).mean()
        loss.backward()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
