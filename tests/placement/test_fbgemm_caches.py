"""The bytes of a caching plan against what TorchRec's grouping of tables and FBGEMM's cache make of it.

Neither can be run without a GPU, but both are arithmetic in Python: TorchRec's ``group_tables`` is called as it is, and
FBGEMM's sizes are those of its ``_apply_cache_state``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec.distributed.embedding_sharding import group_tables
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardedEmbeddingTable
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheAlgorithm, CacheParams, MultiPassPrefetchConfig, ShardingPlan
from torchrec.distributed.utils import add_params_from_parameter_sharding
from torchrec.modules.embedding_configs import PoolingType
from torchrec.types import DataType

from tests.placement.planning import SHARDERS, model_of, planner_of, profile_of, sharded_as, skewed, topology_of
from torchrec_slipstream import Placement, PlanError


def allocated(
    plan: ShardingPlan, placement: Placement, rank: int, fused_params: Mapping[str, Any] | None = None
) -> tuple[int, int]:
    """HBM bytes of a device's caches with all that belongs to them, and how many caches that is.

    Row-wise Adagrad's state of tables in host memory is counted as well.
    """
    tables: dict[str, list[ShardedEmbeddingTable]] = {}
    for shard in placement.on(rank):
        name = shard.table.split(".")[-1]
        parameter = plan.get_plan_for_module("bags")[name]
        table = ShardedEmbeddingTable(
            num_embeddings=placement.tables[shard.table].rows,
            embedding_dim=placement.tables[shard.table].dim,
            name=name,
            embedding_names=[name],
            feature_names=[f"f_{name}"],
            local_rows=shard.rows,
            local_cols=shard.columns,
            compute_kernel=EmbeddingComputeKernel(parameter.compute_kernel),
            data_type=DataType.FP32,
            pooling=PoolingType.SUM,
            is_weighted=False,
            has_feature_processor=False,
            fused_params=add_params_from_parameter_sharding(dict(fused_params or {}), parameter),
        )
        tables.setdefault(parameter.sharding_type, []).append(table)
    total = caches = 0
    for of_one_type in tables.values():
        for group in group_tables([of_one_type])[0]:
            cached = [t for t in group.embedding_tables if t.compute_kernel.value == "fused_uvm_caching"]
            managed = [t for t in group.embedding_tables if t.compute_kernel.value != "fused"]
            total += sum(4 * t.local_rows for t in managed)
            if not cached:
                continue
            caches += 1
            params = group.fused_params or {}
            rows = sum(t.local_rows for t in cached)
            slots = max(1, (int(rows * params["cache_load_factor"]) + 31) // 32) * 32
            lfu = params.get("cache_algorithm") == CacheAlgorithm.LFU
            total += slots * max(t.local_cols for t in cached) * 4 + slots * 8 + rows * 4
            total += (rows + 1) * 8 if lfu else slots * 8
            total += slots * 4 if params.get("prefetch_pipeline") else 0
    return total, caches


def booked(placement: Placement, rank: int) -> int:
    return sum(shard.hbm_bytes for shard in placement.on(rank) if not shard.whole)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_caches_take_no_more_than_is_booked_for_them(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 5))
    rows = data.draw(st.lists(st.integers(40, 4000), min_size=number, max_size=number))
    dims = data.draw(st.lists(st.sampled_from([16, 32, 128]), min_size=number, max_size=number))
    types = data.draw(st.lists(st.sampled_from(["table_wise", "row_wise"]), min_size=number, max_size=number))
    devices = data.draw(st.sampled_from([1, 2]))
    constraints = sharded_as(*types)
    if data.draw(st.booleans()):
        constraints["t0"].cache_params = CacheParams(algorithm=CacheAlgorithm.LFU)
    counts = [skewed(n, 4000, seed=i) for i, n in enumerate(rows)]
    planner = planner_of(
        profile_of(counts, dims, samples=4000), topology_of(devices), constraints=constraints, session=False,
        hbm_budget=data.draw(st.integers(0, 400_000)), batch_size=16,
    )  # fmt: skip
    plan = planner.plan(model_of(rows, dims), SHARDERS)
    placement = planner.placement
    assert placement is not None
    for rank in range(devices):
        takes, caches = allocated(plan, placement, rank)
        # What each cache is rounded up by is part of the device's bytes; so are inputs and outputs, and whole shards.
        whole = sum(shard.hbm_bytes for shard in placement.on(rank) if shard.whole)
        least = booked(placement, rank) * 0.999 - caches * 31 * (128 * 4 + 16)
        assert least <= takes <= placement.hbm_bytes[rank] - whole + 8 * caches
        assert takes <= booked(placement, rank) + caches * (31 * (128 * 4 + 16) + 8)


def test_a_wide_table_does_not_widen_the_slots_of_narrow_ones() -> None:
    # TorchRec puts both into one TBE otherwise, whose every slot is 256 wide: 16 times the bytes.
    counts = [np.repeat([50, 0], [50_000, 950_000]), np.repeat([900, 0], [64, 9_936])]
    planner = planner_of(
        profile_of(counts, [16, 256]), topology_of(1), hbm_budget=50_000 * 80 + 64 * (256 * 4 + 16), session=False,
        batch_size=16, constraints=sharded_as("table_wise", "table_wise"),
    )  # fmt: skip
    plan = planner.plan(model_of([1_000_000, 10_000], [16, 256]), SHARDERS)
    assert planner.placement is not None
    assert [table.hot_rows for table in planner.placement.tables.values()] == [50_000, 64]
    takes, caches = allocated(plan, planner.placement, 0)
    assert caches == 2
    assert takes == pytest.approx(booked(planner.placement, 0), rel=1e-3)


@pytest.mark.parametrize(
    "fused_params",
    [
        {"cache_algorithm": CacheAlgorithm.LFU},
        {"prefetch_pipeline": True},
        {"cache_algorithm": CacheAlgorithm.LFU, "prefetch_pipeline": True},
    ],
)
def test_what_the_sharder_asks_of_caches_is_counted(fused_params: dict[str, Any]) -> None:
    sharder = EmbeddingBagCollectionSharder(fused_params=dict(fused_params))
    planner = planner_of(profile_of([skewed(5000, 20_000)], [64]), topology_of(1), hbm_budget="100KB", session=False)
    plan = planner.plan(model_of([5000], [64]), [sharder])
    assert planner.placement is not None
    takes, _ = allocated(plan, planner.placement, 0, fused_params)
    assert takes == pytest.approx(booked(planner.placement, 0), abs=32 * (64 * 4 + 16))


def test_other_cache_parameters_of_the_constraints_are_kept() -> None:
    asked = CacheParams(prefetch_pipeline=True, multipass_prefetch_config=MultiPassPrefetchConfig(num_passes=4))
    planner = planner_of(
        profile_of([skewed(5000, 20_000)], [64]), topology_of(1), hbm_budget="100KB",
        constraints={"t0": ParameterConstraints(cache_params=asked)},
    )  # fmt: skip
    plan = planner.plan(model_of([5000], [64]), SHARDERS)
    made = plan.get_plan_for_module("bags")["t0"].cache_params
    assert (made.prefetch_pipeline, made.multipass_prefetch_config) == (True, asked.multipass_prefetch_config)


def test_enforce_hbm_is_refused() -> None:
    constraints = {"t0": ParameterConstraints(enforce_hbm=True)}
    planner = planner_of(profile_of([np.ones(100)], [64]), topology_of(1), constraints=constraints)
    with pytest.raises(PlanError, match=r"table bags.t0: enforce_hbm=True would put all its rows in HBM"):
        planner.plan(model_of([100], [64]), SHARDERS)
    remedy = {"t0": ParameterConstraints(enforce_hbm=True, compute_kernels=["fused"])}
    planner_of(planner.profile, topology_of(1), constraints=remedy).plan(model_of([100], [64]), SHARDERS)


def test_memory_that_a_user_keeps_free_stays_free() -> None:
    sharder = EmbeddingBagCollectionSharder(fused_params={"cache_reserved_memory": 2e9})
    planner = planner_of(profile_of([skewed(5000, 20_000)], [64]), topology_of(1), hbm_budget="100KB")
    plan = planner.plan(model_of([5000], [64]), [sharder])
    parameter = plan.get_plan_for_module("bags")["t0"]
    made = add_params_from_parameter_sharding({"cache_reserved_memory": 2e9}, parameter)
    assert made["cache_reserved_memory"] == 2e9 + 64


@pytest.mark.parametrize("backing", ["caching", "uvm"])
def test_bytes_are_those_of_the_kernel_that_a_table_gets(backing: str) -> None:
    def hbm(kernels: list[str], budget: int) -> tuple[str, int, int]:
        planner = planner_of(
            profile_of([np.repeat([9, 0], [10, 990])], [64]), topology_of(1), hbm_budget=budget, session=False,
            constraints={"t0": ParameterConstraints(compute_kernels=kernels)}, backing=backing,
        )  # fmt: skip
        planner.plan(model_of([1000], [64]), SHARDERS)
        assert planner.placement is not None
        table = planner.placement.tables["bags.t0"]
        return table.kernel, table.hot_rows, table.hbm_bytes

    # Nothing hot: only the row-wise state. A cache: its map, and slots with a tag and a time.
    assert hbm(["fused_uvm", "fused_uvm_caching"], 0) == ("fused_uvm", 0, 4 * 1000)
    assert hbm(["fused_uvm_caching"], 10 * 272) == ("fused_uvm_caching", 10, 10 * 272 + 8 * 1000)
    only_uvm = hbm(["fused_uvm"], 10 * 272)
    overlay = ("fused_uvm", 10, 10 * 260 + 8 * 1000)
    assert only_uvm == (("fused_uvm", 0, 4 * 1000) if backing == "caching" else overlay)
