"""Forecasts of distinct rows and of misses: against SCARS's figures, simulated caches, and TorchRec's own planner."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, CacheStatistics, ShardingType

from tests.access.profiles import any_tables, zipf_counts
from torchrec_slipstream.access import AccessProfile, AccessStatistics, TableAccess
from torchrec_slipstream.access.statistics import expected_distinct
from torchrec_slipstream.errors import ProfileError


def zipf_chances(rows: int, exponent: float) -> np.ndarray:
    chances = 1 / np.arange(1, rows + 1) ** exponent
    return chances / chances.sum()


def statistics_of(chances: np.ndarray, lookups: float, policy: str = "lru") -> AccessStatistics:
    return AccessStatistics(chances, np.ones(len(chances), np.int64), lookups, policy)


# --- SCARS's figures (PAPERS.md) --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exponent", "batch", "distinct", "missed"),
    [(1.05, 1024, 624, None), (1.2, 1024, 387, 93), (1.2, 16384, 3545, 1473)],
)
def test_published_figures(exponent: float, batch: int, distinct: int, missed: int | None) -> None:
    """1M rows; what is missed with the top 1% cached; and both against a Monte Carlo run of our own."""
    chances = zipf_chances(1_000_000, exponent)
    forecast = statistics_of(chances, batch, "static")
    assert round(forecast.expected_lookups) == distinct
    random = np.random.default_rng(0)
    cumulated = np.cumsum(chances)
    drawn = [np.unique(np.searchsorted(cumulated, random.random(batch))) for _ in range(30)]
    assert np.mean([len(rows) for rows in drawn]) == pytest.approx(distinct, rel=0.02)
    if missed is not None:
        assert forecast.expected_miss_rate(0.01) * forecast.expected_lookups == pytest.approx(missed, abs=0.5)
        assert np.mean([(rows >= 10_000).sum() for rows in drawn]) == pytest.approx(missed, rel=0.05)


def test_chances_too_small_for_naive_arithmetic() -> None:
    """A row of chance 1e-18: 1 - (1 - p)^n would be 0."""
    distinct = expected_distinct(np.array([1e-18]), np.array([10**9]), 1e6)
    assert distinct == pytest.approx(1e9 * 1e-12, rel=1e-9)


# --- caches, simulated ------------------------------------------------------------------------------------------------


def simulate(chances: np.ndarray, batch: int, held: int, policy: str, batches: int) -> float:
    """Misses over distinct rows of all batches but the first third, in which the cache fills."""
    random = np.random.default_rng(1)
    cumulated = np.cumsum(chances)
    lru: OrderedDict[int, None] = OrderedDict()
    pinned = set(range(held))
    missed = distinct = 0
    for step in range(batches):
        drawn = np.searchsorted(cumulated, random.random(batch) * cumulated[-1])
        rows = list(OrderedDict.fromkeys(drawn.tolist()))
        if step >= batches // 3:
            distinct += len(rows)
            missed += sum(row not in (lru if policy == "lru" else pinned) for row in rows)
        # Within the batch the last look-up of a row is what counts.
        for row in drawn.tolist():
            lru[row] = None
            lru.move_to_end(row)
        while len(lru) > held:
            lru.popitem(last=False)
    return missed / distinct


@pytest.mark.parametrize("policy", ["lru", "static"])
@pytest.mark.parametrize("exponent", [0.0, 0.9, 1.2])
@pytest.mark.parametrize("clf", [0.05, 0.2, 0.6])
def test_miss_rate_of_a_simulated_cache(policy: str, exponent: float, clf: float) -> None:
    rows, batch = 5000, 100
    chances = zipf_chances(rows, exponent)
    forecast = statistics_of(chances, batch, policy).expected_miss_rate(clf)
    batches = 300 if exponent < 1 else 2000  # a steep table fills a large cache slowly
    assert forecast == pytest.approx(simulate(chances, batch, int(clf * rows), policy, batches), rel=0.04, abs=0.004)


@given(one=any_tables(), batch=st.integers(1, 5000), policy=st.sampled_from(["lru", "static"]), data=st.data())
def test_miss_rate_falls_from_one_to_zero(one: TableAccess, batch: int, policy: str, data: st.DataObject) -> None:
    forecast = AccessStatistics(*one.probabilities, batch, policy)
    clfs = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=10)))
    rates = [forecast.expected_miss_rate(clf) for clf in [0.0, *clfs, 1.0]]
    assert rates[0] == 1.0
    assert rates[-1] == 0.0
    # To within the precision to which the LRU's window is found.
    assert all(low >= high - 1e-9 for low, high in pairwise(rates))
    assert all(0 <= rate <= 1 for rate in rates)
    assert 0 <= forecast.cacheability <= 1
    assert forecast.expected_lookups == pytest.approx(one.expected_distinct(batch), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("policy", ["lru", "static"])
@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.05, 1.5])
@pytest.mark.parametrize("batch", [10, 5000])
def test_cacheability_is_the_area_of_the_miss_rate(policy: str, exponent: float, batch: int) -> None:
    forecast = statistics_of(zipf_chances(2000, exponent), batch, policy)
    clfs = np.concatenate([np.linspace(0, 0.02, 401), np.linspace(0.02, 1, 2000)[1:]])
    area = float(np.trapezoid([forecast.expected_miss_rate(float(clf)) for clf in clfs], clfs))
    assert forecast.cacheability == pytest.approx(area, abs=1e-3)


def test_pinning_beats_lru() -> None:
    """With independent look-ups no cache beats the rows of most look-ups."""
    chances = zipf_chances(5000, 1.05)
    for clf in (0.01, 0.1, 0.5):
        lru, static = (statistics_of(chances, 512, policy).expected_miss_rate(clf) for policy in ("lru", "static"))
        assert static < lru


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lru", "static"])
def test_tables_of_nothing_and_of_one_row(policy: str) -> None:
    empty = TableAccess("empty", 100, 4, np.zeros(100, np.int32))
    single = TableAccess("single", 100, 4, np.array([7] + [0] * 99))
    found = AccessProfile([empty, single], 7).statistics(10, policy)
    for name, lookups in (("empty", 0.0), ("single", 1.0)):
        assert found[name].expected_lookups == pytest.approx(lookups)
        assert found[name].expected_miss_rate(0.0) == 1.0
        assert found[name].expected_miss_rate(0.01) == 0.0
        assert found[name].expected_miss_rate(1.0) == 0.0
        assert found[name].cacheability == pytest.approx(0.0, abs=0.011)
    assert 0 <= found["single"].expected_miss_rate(0.005) <= 1
    assert found["empty"].cacheability == 0.0


def test_small_and_copied_as_planners_do() -> None:
    counts = zipf_counts(300_000, 1.1, 1_000_000)
    profile = AccessProfile([TableAccess("t", len(counts), 64, counts)], 100_000)
    found = profile.statistics(4096)["t"]
    assert isinstance(found, CacheStatistics)
    assert found.lookups == pytest.approx(40_960)
    packed = pickle.dumps(found)
    assert len(packed) < 200_000
    for other in (pickle.loads(packed), copy.deepcopy(found)):
        assert other.expected_miss_rate(0.1) == found.expected_miss_rate(0.1)
        assert other.cacheability == found.cacheability


def test_bad_values() -> None:
    with pytest.raises(ProfileError, match="policy='lfu' is not known; give one of lru, static"):
        statistics_of(np.array([1.0]), 1, "lfu")
    with pytest.raises(ProfileError, match="lookups=-1 of a batch; give a number of at least 0"):
        statistics_of(np.array([1.0]), -1)


# --- TorchRec's proposer ----------------------------------------------------------------------------------------------


def test_torchrec_scales_up_the_caches_that_need_it() -> None:
    """Its offload proposer, fed with ours, gives the table that is harder to cache the larger load factor."""
    rows = 2_000_000
    skewed = TableAccess("skewed", rows, 64, zipf_counts(rows, 1.6, 4_000_000))
    flat = TableAccess("flat", rows, 64, zipf_counts(rows, 0.3, 4_000_000))
    unused = TableAccess("unused", rows, 64, np.zeros(rows, np.int32))
    profile = AccessProfile([skewed, flat, unused], 1_000_000)
    found = profile.statistics(batch_size=8192)
    assert found["skewed"].cacheability < 0.1 < found["flat"].cacheability
    model = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=name, embedding_dim=64, num_embeddings=rows, feature_names=[name]) for name in found
        ],
        device=torch.device("meta"),
    )
    constraints = {
        name: ParameterConstraints(
            sharding_types=[ShardingType.TABLE_WISE.value],
            compute_kernels=[EmbeddingComputeKernel.FUSED_UVM_CACHING.value],
            cache_params=CacheParams(load_factor=0.05, stats=one),
            pooling_factors=[profile.pooling_factor(name)],
        )
        for name, one in found.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(1, "cuda", hbm_cap=700 * 2**20, ddr_cap=16 * 2**30),
        batch_size=8192,
        proposer=EmbeddingOffloadScaleupProposer(),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints=constraints,
    )
    plan = planner.plan(model, [EmbeddingBagCollectionSharder()]).plan[""]
    factors = {}
    for name in found:
        params = plan[name].cache_params
        factors[name] = 1.0 if plan[name].compute_kernel == "fused" else params.load_factor
    assert factors["unused"] == 0.05  # nothing to gain
    assert factors["flat"] > factors["skewed"] > 0.05
