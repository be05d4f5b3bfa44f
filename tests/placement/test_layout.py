"""How rows are laid on devices: uneven shards, tables too large for one device, caches of one load factor."""

from __future__ import annotations

import numpy as np
import pytest
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import CustomTopologyData

from tests.placement.planning import SHARDERS, model_of, planner_of, profile_of, sharded_as, skewed, topology_of
from torchrec_slipstream import PlanError

HOT = 64 * 4 + 16  # a slot of FBGEMM's cache


def test_a_table_larger_than_its_device_still_fills_it() -> None:
    # The hot rows that 4 devices' memory has room for do not fit the one that the table is on.
    rows, hbm = 20_000, 1_000_000
    planner = planner_of(
        profile_of([np.arange(rows)[::-1] + 1], [64]), topology_of(4, hbm=hbm), batch_size=16, backing="uvm",
        constraints=sharded_as("table_wise"),
    )  # fmt: skip
    planner.plan(model_of([rows], [64]), SHARDERS)
    placement = planner.placement
    assert placement is not None
    (shard,) = placement.shards
    assert hbm - 260 < placement.hbm_bytes[shard.rank] <= hbm
    np.testing.assert_array_equal(shard.hot_rows, np.arange(len(shard.hot_rows)))


def test_a_cache_has_one_load_factor_and_takes_no_more_on_any_device() -> None:
    # All look-ups of t0 are in the first device's half; t1 lives on one device and takes the rest of its budget.
    counts = [np.repeat([50, 0], [100, 900]), np.full(400, 20)]
    budget = 120 * HOT
    constraints = sharded_as("row_wise", "table_wise")
    constraints["t1"].compute_kernels = ["fused_uvm_caching"]
    planner = planner_of(
        profile_of(counts, [64, 64]), topology_of(2), hbm_budget=budget, batch_size=16, constraints=constraints
    )
    plan = planner.plan(model_of([1000, 400], [64, 64]), SHARDERS)
    placement = planner.placement
    assert placement is not None
    split = [shard for shard in placement.shards if shard.table == "bags.t0"]
    assert len(split) == 2
    assert len(split[0].hot_rows) == len(split[1].hot_rows) > 0
    load_factor = plan.get_plan_for_module("bags")["t0"].cache_params.load_factor
    assert load_factor * 500 == pytest.approx(len(split[0].hot_rows), abs=1)
    assert all(placement.placed_on(rank) <= budget for rank in range(2))


def test_an_overlay_is_filled_for_each_device() -> None:
    counts = [np.repeat([50, 0], [100, 900])]
    planner = planner_of(
        profile_of(counts, [64]), topology_of(2), hbm_budget=60 * 260, batch_size=16, backing="uvm",
        constraints=sharded_as("row_wise"),
    )  # fmt: skip
    planner.plan(model_of([1000], [64]), SHARDERS)
    assert planner.placement is not None
    assert [len(shard.hot_rows) for shard in planner.placement.shards] == [60, 60]
    assert [shard.hot_lookups for shard in planner.placement.shards] == [3000, 0]
    assert planner.placement.hit_rate == pytest.approx(0.6)


def test_a_table_is_whole_on_all_devices_or_on_none() -> None:
    # Half of t0 would fit its device whole; the other half, beside the denser t1, does not.
    planner = planner_of(
        profile_of([np.full(200, 10), np.full(60, 90)], [64, 64]), topology_of(2), hbm_budget=130 * 260,
        batch_size=16, backing="uvm", constraints=sharded_as("row_wise", "table_wise"),
    )  # fmt: skip
    plan = planner.plan(model_of([200, 60], [64, 64]), SHARDERS)
    placement = planner.placement
    assert placement is not None
    halves = [shard for shard in placement.shards if shard.table == "bags.t0"]
    assert not any(half.whole for half in halves)
    assert sorted(len(half.hot_rows) for half in halves) == [70, 100]
    assert plan.get_plan_for_module("bags")["t0"].compute_kernel == "fused_uvm"
    assert plan.get_plan_for_module("bags")["t1"].compute_kernel == "fused"


def test_unequal_devices_are_filled_each_to_its_own() -> None:
    def topology(*hbm: int) -> Topology:
        data = CustomTopologyData({"hbm_cap": list(hbm)}, world_size=2)
        return Topology(2, "cuda", ddr_cap=2**34, custom_topology_data=data)

    profile, model = profile_of([np.full(2000, 5)], [64]), model_of([2000], [64])
    planner = planner_of(profile, topology(150_000, 250_000), batch_size=16, constraints=sharded_as("row_wise"))
    planner.plan(model, SHARDERS)
    assert planner.placement is not None
    small, large = planner.placement.hbm_bytes
    assert 100_000 < small <= 150_000 < large <= 250_000
    with pytest.raises(PlanError, match=r"with 0.977 KiB to 1.95 KiB of HBM") as caught:
        planner_of(profile, topology(1000, 2000), batch_size=16).plan(model, SHARDERS)
    assert "such devices" not in str(caught.value)


def test_data_parallel_tables_are_left_to_torchrec() -> None:
    constraints = sharded_as("data_parallel")
    planner = planner_of(
        profile_of([np.full(50, 3), skewed(900, 4000)], [16, 64], samples=4000), topology_of(2), hbm_budget="20KB",
        constraints=constraints, batch_size=16,
    )  # fmt: skip
    plan = planner.plan(model_of([50, 900], [16, 64]), SHARDERS)
    assert planner.placement is not None
    assert list(planner.placement.tables) == ["bags.t1"]
    assert plan.get_plan_for_module("bags")["t0"].sharding_type == "data_parallel"
    # Its copies are in every device's memory all the same.
    assert all(bytes_ > 50 * 16 * 4 for bytes_ in planner.placement.hbm_bytes)
