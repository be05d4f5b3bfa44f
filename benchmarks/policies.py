"""Ways to choose which rows are hot from an access profile: ours, and those it is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.types import CacheParams, ShardingType

from benchmarks.traces import Trace
from torchrec_slipstream.access import AccessProfile, CountHistogram, TableAccess
from torchrec_slipstream.placement.allocation import TableDemand, allocate, hot_rows_of

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Where TorchRec's proposer starts from: next to nothing, so that it deals out the whole budget.
_START = 1e-6


def profile_of(trace: Trace, begin: int, end: int) -> AccessProfile:
    """The access profile of the batches begin .. end-1."""
    counts = trace.split(trace.count_lookups(begin, end))
    tables = [
        TableAccess(one.name, one.rows, one.dim, counts[one.name], optimizer_bytes=one.optimizer_bytes)
        for one in trace.tables
    ]
    return AccessProfile(tables, samples=(end - begin) * trace.batch_size)


def densest(trace: Trace, counts: Ints, budget: int, values: Mapping[str, Floats] | None = None) -> Bools:
    """The allocation of this package on these counts, int64 ``[total_rows]``; bool ``[total_rows]``: which are hot."""
    split = trace.split(counts)
    shares = allocate(
        [
            TableDemand(
                one.name, CountHistogram.of(split[one.name]), one.row_bytes, values[one.name] if values else None
            )
            for one in trace.tables
        ],
        budget,
    )
    hot = np.zeros(trace.total_rows, dtype=bool)
    for name, mask in trace.split(hot).items():
        mask[hot_rows_of(split[name], shares[name])] = True
    return hot


def held_out(trace: Trace, end: int) -> dict[str, Floats]:
    """The worth of each count class of the batches 0 .. end-1, learnt from their first and second half."""
    profile = profile_of(trace, 0, end // 2).followed_by(profile_of(trace, end // 2, end))
    worth = {name: table.worth(table.histogram) for name, table in profile.tables.items()}
    return {name: values for name, values in worth.items() if values is not None}


def uniform(trace: Trace, profile: AccessProfile, budget: int) -> Bools:
    """One load factor for all tables, each with its most looked-up rows."""
    factor = budget / trace.total_bytes
    return _fill(trace, profile, {table.name: factor * table.rows for table in trace.tables}, budget)


class TorchRecScaleup:
    """TorchRec's ``EmbeddingOffloadScaleupProposer`` on one CUDA device, with this profile as its cache statistics.

    Its starting proposal is loaded from a real enumeration; its storage model and its dealing out of a budget
    (``build_affine_storage_model``, ``allocate_budget``: what its ``next_plan`` consists of) are called directly, with
    whatever budget makes its caches take exactly the budget given here: what TorchRec books besides (inputs, outputs,
    optimizer state) costs it nothing. The planner's search over smaller budgets is left out, as a smaller cache would
    only hit less. Each table's cache is then filled with its most looked-up rows, the best that could be in it.
    """

    def __init__(self, trace: Trace, profile: AccessProfile) -> None:
        self.trace, self.profile = trace, profile
        statistics = profile.statistics(trace.batch_size)
        constraints = {
            table.name: ParameterConstraints(
                sharding_types=[ShardingType.TABLE_WISE.value],
                compute_kernels=[EmbeddingComputeKernel.FUSED_UVM_CACHING.value],
                pooling_factors=[profile[table.name].lookups / profile.samples],
                cache_params=CacheParams(load_factor=_START, stats=statistics[table.name]),
            )
            for table in trace.tables
        }
        configs = [
            EmbeddingBagConfig(name=one.name, num_embeddings=one.rows, embedding_dim=one.dim, feature_names=[one.name])
            for one in trace.tables
        ]
        # As much memory as it likes: the budget is what it is asked for.
        topology = Topology(world_size=1, compute_device="cuda", hbm_cap=1 << 50, ddr_cap=1 << 50)
        self.enumerator = EmbeddingEnumerator(topology, batch_size=trace.batch_size, constraints=constraints)
        module = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        options = self.enumerator.enumerate(module, [EmbeddingBagCollectionSharder()])
        proposer = EmbeddingOffloadScaleupProposer()
        proposer.load(options, self.enumerator)
        options = proposer.starting_proposal
        scalable = EmbeddingOffloadScaleupProposer.get_scalable_sharding_options(options)
        # The others were not looked up, or were promoted to HBM, because their cache would take more than they do.
        self.fixed = {option.name: 0.0 if option.cache_load_factor is not None else 1.0 for option in options}
        self.names = [option.name for option in scalable]
        self.start = torch.tensor([option.cache_load_factor for option in scalable])
        self.priority = torch.tensor(
            [
                float(EmbeddingOffloadScaleupProposer.get_cacheability(option) or 0.0)
                * float(EmbeddingOffloadScaleupProposer.get_expected_lookups(option) or 0.0)
                for option in scalable
            ]
        )
        if scalable:
            self.model = EmbeddingOffloadScaleupProposer.build_affine_storage_model(scalable, self.enumerator)

    def load_factors(self, budget: int) -> dict[str, float]:
        """Its load factor for each table, 1 where it promotes the table to HBM, with the budget used up."""
        low, high = 0, 4 * self.trace.total_bytes + 4 * budget
        best = self._load_factors(low)
        while high - low > max(64, budget // 100_000):
            middle = (low + high) // 2
            found = self._load_factors(middle)
            if self._bytes(found) <= budget:
                low, best = middle, found
            else:
                high = middle
        return best

    def hot_rows(self, budget: int) -> Bools:
        factors = self.load_factors(budget)
        wanted = {table.name: factors[table.name] * table.rows for table in self.trace.tables}
        return _fill(self.trace, self.profile, wanted, budget)

    def _bytes(self, factors: Mapping[str, float]) -> float:
        return sum(factors[table.name] * table.rows * table.row_bytes for table in self.trace.tables)

    def _load_factors(self, budget: int) -> dict[str, float]:
        if not self.names:
            return self.fixed
        size_model, ceiling = self.model
        found = EmbeddingOffloadScaleupProposer.allocate_budget(
            model=size_model,
            fused_hbm_ceiling=ceiling,
            clfs=self.start,
            budget=budget,
            allocation_priority=self.priority,
        )
        # As next_plan does: what is all but whole goes to HBM.
        factors = [1.0 if factor > 0.9999 else float(factor) for factor in found.tolist()]
        return self.fixed | dict(zip(self.names, factors, strict=True))


def _fill(trace: Trace, profile: AccessProfile, wanted: Mapping[str, float], budget: int) -> Bools:
    """So many of each table's most looked-up rows; the parts of rows that are left over make whole ones, the most
    looked-up first of those that were cut."""
    rows = {table.name: min(table.rows, int(wanted[table.name])) for table in trace.tables}
    left = budget - sum(rows[table.name] * table.row_bytes for table in trace.tables)

    def next_count(name: str) -> float:
        table: TableAccess = profile[name]
        place = int(np.searchsorted(np.cumsum(table.histogram.rows), rows[name], side="right"))
        return float(table.histogram.counts[place]) / table.row_bytes if place < len(table.histogram.counts) else -1.0

    for table in sorted(trace.tables, key=lambda table: -next_count(table.name)):
        if rows[table.name] < table.rows and table.row_bytes <= left:
            rows[table.name] += 1
            left -= table.row_bytes
    hot = np.zeros(trace.total_rows, dtype=bool)
    for name, mask in trace.split(hot).items():
        mask[profile[name].top_rows(rows[name])] = True
    return hot
