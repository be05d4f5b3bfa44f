"""The planner on real TorchRec collections: what it plans, its bytes worked out by hand, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec import optim
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import CacheAlgorithm, CacheParams, ShardingPlan

from tests.distributed.ranks import run_ranks
from tests.placement.planning import (
    GIB,
    SHARDERS,
    model_of,
    planner_of,
    profile_of,
    sequence_model,
    sharded_as,
    skewed,
    topology_of,
)
from torchrec_slipstream import ConfigError, PlanError, ProfileError, SlipstreamPlanner
from torchrec_slipstream.access import AccessProfile, TableAccess
from torchrec_slipstream.placement import Placement

BATCH = 256


def plan(planner: SlipstreamPlanner, model: torch.nn.Module) -> tuple[ShardingPlan, Placement]:
    made = planner.plan(model, SHARDERS)
    assert planner.placement is not None
    return made, planner.placement


# ------------------------------------------------------------------------------------------- bytes by hand


@pytest.mark.parametrize("backing", ["caching", "uvm"])
def test_one_gpu_takes_the_bytes_worked_out_by_hand(backing: str) -> None:
    # t0: 10 rows looked up 100 times each, the table fits. t1: 1000 rows, of which 20 are looked up 50 times.
    counts = [np.full(10, 100), np.repeat([50, 0], [20, 980])]
    dims = [16, 64]
    # A row of t0 has 16 weights and 1 value of state. A hot row of t1: in the cache 64 weights, a tag and a time; in
    # the overlay 64 weights and 1 value of state.
    whole, hot = 10 * (16 * 4 + 4), {"caching": 64 * 4 + 16, "uvm": 64 * 4 + 4}[backing]
    planner = planner_of(
        profile_of(counts, dims), topology_of(1), hbm_budget=whole + 20 * hot + hot - 1, batch_size=BATCH,
        backing=backing, constraints=sharded_as("table_wise", "table_wise"),
    )  # fmt: skip
    made, placement = plan(planner, model_of([10, 1000], dims))

    small, large = placement.tables["bags.t0"], placement.tables["bags.t1"]
    assert small.kernel == "fused"
    assert large.kernel == {"caching": "fused_uvm_caching", "uvm": "fused_uvm"}[backing]
    assert (small.hot_rows, large.hot_rows) == (10, 20)
    assert placement.hit_rate == 1.0
    # Every row: 5 bytes of the session. Rows of t1 besides: 4 of row-wise state, 4 of the cache's map or the slot word.
    assert small.hbm_bytes == whole + 10 * 5
    assert large.hbm_bytes == 20 * hot + 1000 * (4 + 4 + 5)
    assert (small.host_bytes, large.host_bytes) == (0, 1000 * 64 * 4)
    # Inputs are int64 ids, one a sample (t0 and t1 have one look-up in each of 1000 samples); outputs float32.
    io = BATCH * (8 + 16 * 4) + BATCH * (8 + 64 * 4)
    # FBGEMM rounds a cache up to sets of 32 slots.
    rounding = {"caching": 31 * hot, "uvm": 0}[backing]
    assert placement.hbm_bytes == (small.hbm_bytes + large.hbm_bytes + io + rounding,)
    assert placement.host_bytes == (large.host_bytes,)
    assert placement.placed_on(0) == whole + 20 * hot
    np.testing.assert_array_equal(placement.shards[1].hot_rows, np.arange(20))
    parameter = made.get_plan_for_module("bags")["t1"]
    if backing == "caching":
        assert parameter.cache_params.load_factor == pytest.approx(20 / 1000)


def test_eight_gpus_row_wise_take_the_bytes_worked_out_by_hand() -> None:
    # 800 rows, 100 a device; in device d's part, the first d rows are looked up 10 times.
    counts = np.zeros(800, dtype=np.int64)
    for device in range(8):
        counts[100 * device : 100 * device + device] = 10
    hot = 32 * 4 + 4
    planner = planner_of(
        profile_of([counts], [32]), topology_of(8), hbm_budget=5 * hot, batch_size=BATCH, backing="uvm",
        constraints=sharded_as("row_wise"),
    )  # fmt: skip
    _, placement = plan(planner, model_of([800], [32]))

    assert len(placement.shards) == 8
    for device, shard in enumerate(placement.shards):
        # The budget is each device's: 5 rows, also where fewer were looked up (the lowest of the others fill it).
        assert (shard.rank, shard.row_offset, shard.rows) == (device, 100 * device, 100)
        np.testing.assert_array_equal(shard.hot_rows, np.arange(5))
        assert shard.placed_bytes == 5 * hot
        assert shard.hbm_bytes == 5 * hot + 100 * (4 + 4 + 5)
        assert shard.host_bytes == 100 * 32 * 4
    total = sum(range(8))
    assert placement.hit_rate == pytest.approx(sum(min(device, 5) for device in range(8)) / total)


def test_128_gpus_in_16_hosts_take_the_bytes_worked_out_by_hand() -> None:
    rows, dims = [1280, 64, 640], [64, 32, 64]
    counts = [np.full(n, 3) for n in rows]
    planner = planner_of(
        profile_of(counts, dims), topology_of(128), hbm_budget="1MiB", batch_size=BATCH,
        constraints=sharded_as("row_wise", "table_wise", "table_row_wise"),
    )  # fmt: skip
    made, placement = plan(planner, model_of(rows, dims))

    # All fits whole: weights and row-wise state, and the session's 5 bytes a row.
    assert {table.kernel for table in placement.tables.values()} == {"fused"}
    by_table = {name: [s for s in placement.shards if s.table == f"bags.{name}"] for name in ("t0", "t1", "t2")}
    assert [len(shards) for shards in by_table.values()] == [128, 1, 8]
    assert {shard.rows for shard in by_table["t0"]} == {10}
    assert {shard.hbm_bytes for shard in by_table["t0"]} == {10 * (64 * 4 + 4 + 5)}
    assert by_table["t1"][0].hbm_bytes == 64 * (32 * 4 + 4 + 5)
    assert {shard.hbm_bytes for shard in by_table["t2"]} == {80 * (64 * 4 + 4 + 5)}
    assert len({shard.rank // 8 for shard in by_table["t2"]}) == 1, "table-row-wise stays in one host"
    assert sum(placement.host_bytes) == 0
    assert sum(shard.hbm_bytes for shard in placement.shards) == (
        1280 * (64 * 4 + 4) + 64 * (32 * 4 + 4) + 640 * (64 * 4 + 4) + (1280 + 64 + 640) * 5
    )
    assert made.get_plan_for_module("bags")["t0"].ranks == list(range(128))


def test_column_shards_pay_their_state_each_and_serve_every_look_up() -> None:
    counts = np.repeat([9, 1], [30, 70])
    hot = 32 * 4 + 4
    planner = planner_of(
        profile_of([counts], [64]), topology_of(2), hbm_budget=30 * hot, batch_size=BATCH, backing="uvm",
        constraints=sharded_as("column_wise"),
    )  # fmt: skip
    _, placement = plan(planner, model_of([100], [64]))
    assert [(s.columns, s.col_offset, len(s.hot_rows)) for s in placement.shards] == [(32, 0, 30), (32, 32, 30)]
    assert {s.hbm_bytes for s in placement.shards} == {30 * hot + 100 * (4 + 4 + 5)}
    assert placement.hit_rate == placement.tables["bags.t0"].hit_rate == pytest.approx(270 / 340)


@pytest.mark.parametrize(
    ("optimizer", "state", "rowwise"),
    [
        (torch.optim.SGD, 0, 0),
        (optim.RowWiseAdagrad, 4, 4),
        (optim.Adagrad, 64 * 4, 0),
        (optim.Adam, 2 * 64 * 4, 0),
        (optim.PartialRowWiseAdam, 64 * 4 + 4, 4),
    ],
)
def test_optimizer_state_is_counted_where_fbgemm_puts_it(optimizer: Any, state: int, rowwise: int) -> None:
    counts = [np.repeat([5, 0], [10, 90])]
    planner = planner_of(
        profile_of(counts, [64]), topology_of(1), hbm_budget=10 * (256 + state), batch_size=BATCH, backing="uvm",
        session=False,
    )  # fmt: skip
    _, placement = plan(planner, model_of([100], [64], optimizer=optimizer))
    table = placement.tables["bags.t0"]
    assert table.hot_rows == 10
    assert table.hbm_bytes == 10 * (256 + state) + 100 * (rowwise + 4)
    assert table.host_bytes == 100 * (256 + state - rowwise)


def test_an_optimizer_in_fused_params_is_counted() -> None:
    # TorchRec's own estimate knows only those of apply_optimizer_in_backward.
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    sharder = EmbeddingBagCollectionSharder(fused_params={"optimizer": EmbOptimType.ADAM})
    planner = planner_of(profile_of([np.full(10, 2)], [16]), topology_of(1), batch_size=BATCH, session=False)
    planner.plan(model_of([10], [16], optimizer=None), [sharder])
    assert planner.placement is not None
    assert planner.placement.tables["bags.t0"].hbm_bytes == 10 * (16 * 4 * 3)


# ------------------------------------------------------------------------------------------- what is planned


def test_budgets_of_nothing_and_of_everything() -> None:
    rows, dims = [500, 2000], [16, 64]
    counts = [skewed(n, 5000, seed=n) for n in rows]
    for budget in (0, "0B", 0.0):
        _, none = plan(planner_of(profile_of(counts, dims), topology_of(1), hbm_budget=budget), model_of(rows, dims))
        assert {table.kernel for table in none.tables.values()} == {"fused_uvm"}
        assert none.hit_rate == 0.0
        assert none.placed_on(0) == 0
    for budget in (None, 1.0, "1GiB", 10**15):
        _, all_of_it = plan(
            planner_of(profile_of(counts, dims), topology_of(1), hbm_budget=budget), model_of(rows, dims)
        )
        assert {table.kernel for table in all_of_it.tables.values()} == {"fused"}
        assert all_of_it.hit_rate == 1.0
        assert sum(all_of_it.host_bytes) == 0


def test_a_cpu_holds_nothing_hot_and_counts_the_optimizer() -> None:
    rows, dims = [500, 2000], [16, 64]
    counts = [skewed(n, 5000) for n in rows]
    planner = planner_of(profile_of(counts, dims), topology_of(1, device="cpu"), batch_size=BATCH, session=False)
    _, placement = plan(planner, model_of(rows, dims))
    assert {table.kernel for table in placement.tables.values()} == {"fused"}
    assert placement.hit_rate == 0.0
    assert all(len(shard.hot_rows) == 0 and not shard.whole for shard in placement.shards)
    tables = 500 * (16 * 4 + 4) + 2000 * (64 * 4 + 4)
    assert sum(table.host_bytes for table in placement.tables.values()) == tables
    # Inputs and outputs are in host memory too; skewed() has 5000 look-ups of each table in 5000 samples.
    assert placement.host_bytes == (tables + BATCH * (8 + 16 * 4) + BATCH * (8 + 64 * 4),)
    assert placement.hbm_bytes == (0,)


def test_sequence_collections_are_planned() -> None:
    counts = skewed(1000, 20_000)
    profile = AccessProfile([TableAccess("s", 1000, 32, counts)], samples=1000)
    _, placement = plan(planner_of(profile, topology_of(2), hbm_budget="20KB", batch_size=8), sequence_model(1000, 32))
    assert placement.tables["sequences.s"].kernel == "fused_uvm_caching"
    assert 0.5 < placement.hit_rate < 1.0


def test_constraints_are_obeyed() -> None:
    rows, dims = [100, 100, 100], [16, 16, 16]
    counts = [np.full(100, 1), np.full(100, 50), np.full(100, 50)]
    lfu = CacheParams(algorithm=CacheAlgorithm.LFU)
    constraints = {
        "t0": ParameterConstraints(compute_kernels=["fused"]),
        "t1": ParameterConstraints(compute_kernels=["fused_uvm"]),
        "t2": ParameterConstraints(compute_kernels=["fused_uvm_caching"], cache_params=lfu),
    }
    planner = planner_of(
        profile_of(counts, dims), topology_of(1), hbm_budget=100 * 68 + 10 * (64 + 8), constraints=constraints
    )
    made, placement = plan(planner, model_of(rows, dims))
    kernels = {name: table.kernel for name, table in placement.tables.items()}
    assert kernels == {"bags.t0": "fused", "bags.t1": "fused_uvm", "bags.t2": "fused_uvm_caching"}
    assert placement.tables["bags.t1"].hot_rows == 0
    assert placement.tables["bags.t2"].hot_rows == 10
    assert made.get_plan_for_module("bags")["t2"].cache_params.algorithm == CacheAlgorithm.LFU
    # LFU: 8 bytes a row of the table instead of 8 a slot.
    assert placement.tables["bags.t2"].hbm_bytes == 10 * (64 + 8) + 100 * (4 + 4 + 8 + 5)


def test_user_callbacks_see_the_settled_plan() -> None:
    seen = []

    def look(options: list[Any]) -> list[Any]:
        seen.extend((option.name, option.compute_kernel) for option in options)
        return options

    planner = planner_of(profile_of([skewed(1000, 9000)], [64]), topology_of(1), hbm_budget="50KB", callbacks=[look])
    plan(planner, model_of([1000], [64]))
    assert seen == [("t0", "fused_uvm_caching")]


def test_more_misses_cost_more_time() -> None:
    rows, dims = [20_000], [64]
    times = []
    for budget in ("100KB", "1MB", "10MB"):
        planner = planner_of(
            profile_of([skewed(20_000, 200_000)], dims), topology_of(1), hbm_budget=budget, batch_size=8192
        )
        times.append(plan(planner, model_of(rows, dims))[1].expected_ms)
    assert times[0] > times[1] > times[2] > 0


def test_misses_are_distinct_cold_rows_over_the_measured_bandwidth() -> None:
    # 4 hot rows of 1000 look-ups each, 100 cold ones of 10; one look-up a sample.
    counts = np.repeat([1000, 10], [4, 100])
    topology = topology_of(1)
    sizes: dict[str, Any] = {"batch_size": 500, "backing": "uvm"}
    profile, model = profile_of([counts], [64]), model_of([104], [64])
    _, placement = plan(planner_of(profile, topology, hbm_budget=4 * (64 * 4 + 4), **sizes), model)
    _, none = plan(planner_of(profile, topology, hbm_budget="1MB", **sizes), model)
    misses = 100 * (1 - (1 - 10 / 5000) ** 500)
    assert placement.shards[0].misses == pytest.approx(misses)
    # Read once and written once, 64 float32 a row.
    on_bus = 2 * misses * 64 * 4 / topology.hbm_to_ddr_mem_bw
    assert placement.expected_ms - none.expected_ms == pytest.approx(on_bus)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_device_is_planned_beyond_its_budget_or_memory(data: st.DataObject) -> None:
    tables = data.draw(st.integers(1, 4))
    rows = data.draw(st.lists(st.integers(8, 3000), min_size=tables, max_size=tables))
    dims = data.draw(st.lists(st.sampled_from([16, 64, 128]), min_size=tables, max_size=tables))
    devices = data.draw(st.sampled_from([1, 2, 4]))
    budget = data.draw(st.integers(0, 2_000_000))
    hbm = data.draw(st.integers(100_000, 3_000_000))
    backing = data.draw(st.sampled_from(["caching", "uvm"]))
    counts = [skewed(n, data.draw(st.integers(0, 5000)), seed=i) for i, n in enumerate(rows)]
    planner = planner_of(
        profile_of(counts, dims, samples=5000), topology_of(devices, hbm=hbm), hbm_budget=budget, batch_size=32,
        backing=backing,
    )  # fmt: skip
    try:
        _, placement = plan(planner, model_of(rows, dims))
    except PlanError:
        # Every row needs 9 bytes, and each device its inputs and outputs: only then may there be none.
        assert hbm * devices < sum(rows) * 9 + tables * devices * 32 * 130 * 8
        return
    for rank in range(devices):
        assert placement.placed_on(rank) <= min(budget, hbm)
        assert placement.hbm_bytes[rank] <= hbm
    for i, n in enumerate(rows):
        shards = [s for s in placement.shards if s.table == f"bags.t{i}"]
        assert sum(s.rows * s.columns for s in shards) == n * dims[i]
        for shard in shards:
            hot = counts[i][shard.row_offset : shard.row_offset + shard.rows][shard.hot_rows]
            cold = np.delete(counts[i][shard.row_offset : shard.row_offset + shard.rows], shard.hot_rows)
            assert hot.sum() == (shard.hot_lookups if not shard.whole else 0)
            if len(hot) and len(cold):
                assert hot.min() >= cold.max()


def test_the_plan_does_not_depend_on_the_order_of_tables() -> None:
    rows, dims = [700, 90, 2500], [16, 64, 32]
    counts = [skewed(n, 4000, seed=n) for n in rows]
    chosen = []
    for order in ([0, 1, 2], [2, 0, 1]):
        profile = AccessProfile([TableAccess(f"t{i}", rows[i], dims[i], counts[i]) for i in order], samples=4000)
        _, placement = plan(planner_of(profile, topology_of(1), hbm_budget="60KB"), model_of(rows, dims))
        chosen.append([(s.table, s.hot_rows.tolist()) for s in placement.shards])
    assert chosen[0] == chosen[1]


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"hbm_budget": 1.5}, r"hbm_budget=1.5: a float is a share"),
        ({"hbm_budget": -0.1}, r"hbm_budget=-0.1"),
        ({"hbm_budget": "lots"}, r"'lots' is not a size of memory"),
        ({"hbm_budget": -5}, r"-5 is not a size"),
        ({"batch_size": 0}, r"batch_size=0; give at least one sample"),
        ({"batch_size": -1}, r"batch_size=-1; give at least one sample"),
        ({"batch_size": float("nan")}, r"batch_size=nan; give at least one sample a device and step, a whole number"),
        ({"batch_size": 2.5}, r"batch_size=2.5; give"),
        ({"batch_size": "8"}, r"batch_size='8'; give"),
        ({"constraints": {"t0": 5}}, r"constraints: table 't0' has 5; give TorchRec's ParameterConstraints"),
        ({"constraints": ["t0"]}, r"constraints=\['t0'\]; give a mapping of table names"),
        ({"backing": "ssd"}, r"backing='ssd' must be one of 'caching', 'uvm'"),
    ],
)
def test_bad_arguments_are_named(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planner_of(profile_of([np.ones(10)], [16]), topology_of(1), **argument)


def test_a_profile_of_another_model_is_refused() -> None:
    profile = profile_of([np.ones(10), np.ones(20)], [16, 16])
    with pytest.raises(ProfileError, match=r"bags.t1 has 30 rows, but 20 in the access profile"):
        planner_of(profile, topology_of(1)).plan(model_of([10, 30], [16, 16]), SHARDERS)
    with pytest.raises(ProfileError, match=r"bags.t2 is not in the access profile"):
        planner_of(profile, topology_of(1)).plan(model_of([10, 20, 5], [16, 16, 16]), SHARDERS)


def test_constraints_of_no_table_are_refused() -> None:
    constraints = {name: ParameterConstraints() for name in ("t0", "nope", "bags.t1")}
    planner = planner_of(profile_of([np.ones(10), np.ones(20)], [16, 16]), topology_of(1), constraints=constraints)
    with pytest.raises(PlanError, match=r"constraints name 'nope', 'bags.t1', which .* does not have; .* are t0, t1:"):
        planner.plan(model_of([10, 20], [16, 16]), SHARDERS)
    assert planner.placement is None
    # A profile may know of more tables than the model has, a user of none.
    planner_of(planner.profile, topology_of(1)).plan(model_of([10], [16]), SHARDERS)


def _plans_for_one_device(rank: int) -> str:
    # What a planner for this machine knows before init_process_group.
    planner = planner_of(profile_of([np.ones(10)], [16]), topology_of(1))
    with pytest.raises(PlanError) as caught:
        planner.collective_plan(model_of([10], [16]), SHARDERS)
    assert planner.placement is None
    return str(caught.value)


def test_a_planner_for_other_devices_than_the_group_has_is_refused_on_all_ranks() -> None:
    first, second = run_ranks(2, _plans_for_one_device)
    assert first == second
    assert first.startswith("the planner's topology has 1 device(s), and the process group 2 rank(s)")
    assert "after torch.distributed.init_process_group()" in first
    assert "topology=Topology(world_size=2, ...)" in first


def test_too_little_hbm_is_explained() -> None:
    # 200,000 rows need 4 + 5 bytes of HBM each where nothing is hot, on a device with 1 MB.
    planner = planner_of(profile_of([np.ones(200_000)], [64]), topology_of(1, hbm=1_000_000), batch_size=BATCH)
    with pytest.raises(PlanError) as caught:
        planner.plan(model_of([200_000], [64]), SHARDERS)
    needed = 200_000 * 9 + BATCH * (8 + 256)
    message = str(caught.value)
    assert "1 tables do not fit 1 cuda device(s)" in message
    assert f"at least {needed / 2**20:.3g} MiB are needed" in message
    assert f"{(needed - 1_000_000) / 2**10:.3g} KiB too little" in message
    assert "3 such devices instead of 1" in message
    assert planner.placement is None


def test_what_the_message_says_would_fit_does_fit() -> None:
    model, profile = model_of([200_000], [64]), profile_of([np.ones(200_000)], [64])
    planner_of(profile, topology_of(3, hbm=1_000_000), batch_size=BATCH).plan(model, SHARDERS)
    planner_of(profile, topology_of(1, hbm=200_000 * 9 + BATCH * 264), batch_size=BATCH).plan(model, SHARDERS)


def test_too_little_host_memory_is_explained() -> None:
    counts = [skewed(10_000, 5000)]
    planner = planner_of(
        profile_of(counts, [64]), topology_of(4, ddr=1_000_000, hbm=10_000_000), hbm_budget="10KB",
        constraints=sharded_as("table_wise"),
    )  # fmt: skip
    with pytest.raises(PlanError, match=r"bags.t0: its largest shard needs 2.44 MiB of host memory .*table_wise"):
        planner.plan(model_of([10_000], [64]), SHARDERS)


def test_tables_that_must_be_whole_do_not_overrun_the_budget() -> None:
    constraints = {"t0": ParameterConstraints(compute_kernels=["fused"])}
    planner = planner_of(
        profile_of([np.ones(1000)], [64]), topology_of(1), hbm_budget="100KiB", constraints=constraints
    )
    with pytest.raises(PlanError, match=r"bags.t0: the constraints want them in HBM whole.* 254 KiB; .*154 KiB too"):
        planner.plan(model_of([1000], [64]), SHARDERS)


def test_the_default_reservation_is_torchrecs() -> None:
    model = model_of([1000], [64])
    planner = SlipstreamPlanner(profile=profile_of([np.ones(1000)], [64]), topology=topology_of(1, hbm=GIB))
    planner.plan(model, SHARDERS)
    assert planner.placement is not None
    assert 0.8 * GIB < planner.placement.hbm_capacity[0] < 0.85 * GIB
    reserved = planner_of(
        planner.profile, topology_of(1, hbm=GIB), storage_reservation=FixedPercentageStorageReservation(0.5)
    )
    reserved.plan(copy.deepcopy(model), SHARDERS)
    assert reserved.placement is not None
    assert reserved.placement.hbm_capacity == (GIB // 2,)


def test_rows_are_worth_what_such_rows_had_later() -> None:
    # Rows of t0 never come back, rows of t1 do; t0's have the higher counts.
    passing, steady = np.repeat([9, 0], [20, 80]), np.repeat([4, 0], [20, 80])
    windows = [profile_of([passing, steady], [16, 16], 500), profile_of([np.zeros(100), steady], [16, 16], 500)]
    hot = 16 * 4 + 4
    for profile, chosen in ((windows[0].merge(windows[1]), [20, 0]), (windows[0].followed_by(windows[1]), [0, 20])):
        _, placement = plan(
            planner_of(profile, topology_of(1), hbm_budget=20 * hot, backing="uvm"), model_of([100, 100], [16, 16])
        )
        assert [placement.tables[name].hot_rows for name in ("bags.t0", "bags.t1")] == chosen


def test_the_hit_rate_is_what_such_rows_will_have() -> None:
    # Rows enough that most are seen once or twice: those that were seen are hot, and past look-ups flatter them.
    generator = np.random.default_rng(0)
    windows = [np.bincount(generator.zipf(1.15, 40_000) % 30_000, minlength=30_000).astype(np.int32) for _ in range(3)]
    first, second, third = (profile_of([counts], [16], 40_000) for counts in windows)
    _, placement = plan(
        planner_of(first.followed_by(second), topology_of(1), hbm_budget=3_000 * 68, backing="uvm"),
        model_of([30_000], [16]),
    )
    (shard,) = placement.shards
    had = (windows[0] + windows[1])[shard.hot_rows].sum() / 80_000
    will_have = third.tables["t0"].counts[shard.hot_rows].sum() / 40_000
    assert had - will_have > 0.04
    assert placement.hit_rate == pytest.approx(will_have, abs=0.02)
