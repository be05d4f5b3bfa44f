"""What the planner finds among many tables and devices, and how long that takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, optim
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import ModuleSharder

from tests.placement.planning import GIB, SHARDERS, model_of, planner_of, profile_of, skewed, topology_of
from torchrec_slipstream import PlanError
from torchrec_slipstream.access import AccessProfile, TableAccess

BATCH = 256


def test_a_plan_that_takes_many_moves_is_found() -> None:
    # Row-wise all of them need more than the devices have (every shard has its inputs and outputs); table-wise they
    # fit. One table is row-wise only, so that no uniform plan has all.
    tables = 80
    types = [["table_wise", "row_wise"]] * tables + [["row_wise"]]
    constraints = {f"t{i}": ParameterConstraints(sharding_types=one) for i, one in enumerate(types)}
    counts = [np.full(2000, 3)] * len(types)
    planner = planner_of(
        profile_of(counts, [64] * len(types)), topology_of(8, hbm=26_500_000, ddr=GIB), batch_size=1024,
        constraints=constraints,
    )  # fmt: skip
    planner.plan(model_of([2000] * len(types), [64] * len(types)), SHARDERS)
    assert planner.placement is not None
    assert max(planner.placement.hbm_bytes) <= 26_500_000


@pytest.mark.parametrize("optimizer", [optim.RowWiseAdagrad, optim.Adam])
def test_hundreds_of_tables_take_seconds(optimizer: Any) -> None:
    tables = 200
    counts = [skewed(500, 2000, seed=i) for i in range(tables)]
    planner = planner_of(profile_of(counts, [64] * tables), topology_of(8), batch_size=BATCH)
    model = model_of([500] * tables, [64] * tables, optimizer=optimizer)
    began = time.perf_counter()
    planner.plan(model, SHARDERS)
    assert time.perf_counter() - began < 40, "5 to 10 on an idle machine"
    assert planner.placement is not None
    assert {table.kernel for table in planner.placement.tables.values()} == {"fused"}


def test_what_more_devices_would_do_is_said_only_where_it_is_so() -> None:
    # Row-wise, inputs and outputs grow with the devices: no number of them would do.
    constraints = {f"t{i}": ParameterConstraints(sharding_types=["row_wise"]) for i in range(20)}
    planner = planner_of(
        profile_of([np.ones(4000)] * 20, [64] * 20), topology_of(16, hbm=2_000_000), batch_size=2048,
        constraints=constraints,
    )  # fmt: skip
    with pytest.raises(PlanError) as caught:
        planner.plan(model_of([4000] * 20, [64] * 20), SHARDERS)
    assert "too little" in str(caught.value)
    assert "such devices" not in str(caught.value)


# ------------------------------------------------------------------------------------------- inputs and outputs


def io_of(planner: Any) -> int:
    placement = planner.placement
    return int(placement.hbm_bytes[0] - sum(shard.hbm_bytes for shard in placement.shards))


def test_an_output_has_a_row_a_sample_however_rarely_the_table_is_looked_up() -> None:
    planner = planner_of(
        profile_of([np.repeat([1, 0], [10, 90])], [64], samples=1000), topology_of(1), batch_size=BATCH
    )
    planner.plan(model_of([100], [64]), SHARDERS)
    assert io_of(planner) == BATCH * (8 + 64 * 4)


def test_every_feature_of_a_table_has_its_inputs_and_outputs() -> None:
    model = nn.Module()
    model.bags = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name="t0", num_embeddings=100, embedding_dim=64, feature_names=[f"f{i}" for i in range(4)]
            )
        ],
    )
    # 12 look-ups a sample, 3 a feature.
    planner = planner_of(profile_of([np.full(100, 120)], [64], samples=1000), topology_of(1), batch_size=BATCH)
    planner.plan(model, SHARDERS)
    assert io_of(planner) == BATCH * 4 * (3 * 8 + 64 * 4)


def test_tables_of_one_name_have_each_their_own_traffic() -> None:
    model = nn.Module()
    for name in ("a", "b"):
        config = EmbeddingBagConfig(name="t", num_embeddings=100, embedding_dim=64, feature_names=[f"f{name}"])
        setattr(model, name, EmbeddingBagCollection(device=torch.device("meta"), tables=[config]))
    counts = {"a.t": np.full(100, 10, dtype=np.int32), "b.t": np.full(100, 80, dtype=np.int32)}
    profile = AccessProfile([TableAccess(name, 100, 64, one) for name, one in counts.items()], 1000)
    planner = planner_of(profile, topology_of(1), batch_size=BATCH)
    planner.plan(model, SHARDERS)
    assert io_of(planner) == BATCH * ((1 * 8 + 64 * 4) + (8 * 8 + 64 * 4))


def test_pooling_factors_of_the_constraints_are_obeyed() -> None:
    constraints = {"t0": ParameterConstraints(pooling_factors=[5.0])}
    planner = planner_of(
        profile_of([np.full(100, 10)], [64]), topology_of(1), batch_size=BATCH, constraints=constraints
    )
    planner.plan(model_of([100], [64]), SHARDERS)
    assert io_of(planner) == BATCH * (5 * 8 + 64 * 4)


# ------------------------------------------------------------------------------------------- what is not attributed


def test_look_ups_that_a_sketch_could_not_attribute_are_misses() -> None:
    ids = np.arange(100, dtype=np.int64)
    sketch = TableAccess("t0", 1000, 64, np.full(100, 40, dtype=np.int32), ids, lookups=10_000)
    profile = AccessProfile([sketch], samples=10_000)
    for kind, devices in (("table_wise", 1), ("row_wise", 2)):
        planner = planner_of(
            profile, topology_of(devices), hbm_budget=100 * 260 // devices, backing="uvm", batch_size=512 // devices,
            constraints={"t0": ParameterConstraints(sharding_types=[kind])},
        )  # fmt: skip
        planner.plan(model_of([1000], [64]), SHARDERS)
        assert planner.placement is not None
        hot = planner.placement.tables["bags.t0"].hot_rows
        listed = hot if devices == 1 else hot // 2  # the second device's rows have no counts
        assert planner.placement.hit_rate == pytest.approx(profile["t0"].hit_rate(listed), abs=1e-3)
        expected = profile.expected_distinct("t0", 512) - listed * (1 - (1 - 0.004) ** 512)
        unlisted_hot = (hot - listed) * (1 - (1 - 0.6 / 900) ** 512)
        assert sum(shard.misses for shard in planner.placement.shards) == pytest.approx(
            expected - unlisted_hot, rel=0.01
        )


def test_a_sharder_of_other_modules_is_no_obstacle() -> None:
    class Other(ModuleSharder[nn.Linear]):
        """As a user writes one: without fused parameters."""

        def shard(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def shardable_parameters(self, module: nn.Linear) -> dict[str, nn.Parameter]:
            return {}

        @property
        def module_type(self) -> type[nn.Linear]:
            return nn.Linear

    planner = planner_of(profile_of([np.ones(100)], [64]), topology_of(1))
    planner.plan(model_of([100], [64]), [*SHARDERS, Other()])
    assert planner.placement is not None
