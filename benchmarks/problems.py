"""Models to plan, with their access profiles and devices, and the planners that plan them: of equal inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.proposers import EmbeddingOffloadScaleupProposer
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingPlan
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_slipstream import AccessProfile, SlipstreamPlanner, TableAccess
from torchrec_slipstream.tbe.memory import optimizer_state

SHARDERS: list[ModuleSharder[nn.Module]] = [EmbeddingBagCollectionSharder()]
# Where TorchRec's proposer starts from: next to nothing, so that it deals out all HBM.
_START = 1e-6


@dataclass(frozen=True)
class Shape:
    """One table: its size, its look-ups a sample, and how they are spread: by (rank + flat)^-exponent."""

    rows: int
    dim: int
    exponent: float = 1.05
    flat: float = 0.0
    pooling: float = 1.0

    @property
    def bytes(self) -> int:
        """Of float32 weights and row-wise Adagrad's state."""
        return self.rows * (4 * self.dim + optimizer_state("rowwise_adagrad").row_bytes(self.dim))


def make_profile(shapes: Sequence[Shape], samples: int, seed: int) -> AccessProfile:
    """Access counts of so many samples of tables ``t0``, ``t1``, ...: expected ones, rounded up or down at random."""
    generator = np.random.default_rng(seed)
    state = optimizer_state("rowwise_adagrad").row_bytes(1)  # whatever the dim
    tables = [
        TableAccess(f"t{i}", one.rows, one.dim, _counts(one, samples, generator), optimizer_bytes=state)
        for i, one in enumerate(shapes)
    ]
    return AccessProfile(tables, samples)


def _counts(shape: Shape, samples: int, generator: np.random.Generator) -> npt.NDArray[np.int32]:
    """int32 ``[rows]``. Popular rows lie evenly apart, so that row shards are alike."""
    stride = int(0.618 * shape.rows) | 1
    while np.gcd(stride, shape.rows) > 1:
        stride += 2
    ranks = np.arange(1, shape.rows + 1, dtype=np.int64) * stride % shape.rows
    expected = (ranks.astype(np.float32) + np.float32(1.0 + shape.flat)) ** np.float32(-shape.exponent)
    expected *= np.float32(samples * shape.pooling / float(expected.sum(dtype=np.float64)))
    expected += generator.random(shape.rows, dtype=np.float32)
    return expected.astype(np.int32)


class Problem:
    """A model to plan, and the devices that it is planned for.

    Args:
        profile: of the shapes, as :func:`make_profile` makes it.
        devices: CUDA devices, 8 a host; they need not be there.
        batch: samples a device and step.
        budget: share of the tables' bytes that all devices' HBM has for them together, besides inputs and outputs.
        hbm: bytes a device instead.
        bandwidths: of the topology, by its names and in bytes a millisecond; TorchRec's constants for those left out.
        room_by_row: whether HBM has room besides for inputs and outputs of tables that are all sharded by row, where
            each device holds those of the global batch for every table; else for its part of them and one table's more.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        profile: AccessProfile,
        *,
        devices: int,
        batch: int,
        budget: float = 1.0,
        hbm: int | None = None,
        bandwidths: dict[str, float] | None = None,
        room_by_row: bool = True,
    ) -> None:
        self.shapes, self.profile, self.devices, self.batch = list(shapes), profile, devices, batch
        self.bandwidths, self.room_by_row = bandwidths or {}, room_by_row
        self.hbm = hbm if hbm is not None else int(budget * sum(shape.bytes for shape in shapes) / devices)

    def with_hbm(self, hbm: int) -> Problem:
        """The same with so many bytes a device."""
        other = copy.copy(self)
        other.hbm = hbm
        return other

    def topology(self) -> Topology:
        samples = self.batch * self.devices
        of_tables = [samples * (4 * one.dim + 8 * max(1.0, one.pooling)) for one in self.shapes]
        besides = sum(of_tables) if self.room_by_row else sum(of_tables) / self.devices + max(of_tables)
        return Topology(
            world_size=self.devices,
            local_world_size=min(8, self.devices),
            compute_device="cuda",
            hbm_cap=self.hbm + int(besides),
            ddr_cap=1 << 42,
            **self.bandwidths,
        )

    @cached_property
    def model(self) -> nn.Module:
        """Pooled tables with row-wise Adagrad, on the meta device."""
        configs = [
            EmbeddingBagConfig(name=f"t{i}", num_embeddings=one.rows, embedding_dim=one.dim, feature_names=[f"f{i}"])
            for i, one in enumerate(self.shapes)
        ]
        bags = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), {"lr": 0.01})
        return nn.ModuleDict({"bags": bags})

    def planner(self, provider: str, sharding: str | None = None, **more: Any) -> EmbeddingShardingPlanner:
        """A planner that has planned nothing yet, with ``more`` arguments.

        Args:
            provider: ``"ours"`` or ``"ours_overlay"`` (backing caching or uvm); ``"torchrec"``, as it comes; or
                ``"torchrec_scaleup"``, its ``EmbeddingOffloadScaleupProposer`` with our statistics and all tables in
                UVM caches.
            sharding: the one type that TorchRec with our statistics may use; None: any.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the reservation, which TorchRec means to rename
            same: dict[str, Any] = {
                "topology": self.topology(),
                "batch_size": self.batch,
                "storage_reservation": FixedPercentageStorageReservation(0.0),
                "debug": False,
                **more,
            }
        if provider.startswith("ours"):
            backing = "uvm" if provider == "ours_overlay" else "caching"
            return SlipstreamPlanner(profile=self.profile, backing=backing, **same)
        if provider == "torchrec":
            return EmbeddingShardingPlanner(**same)
        statistics = self.profile.statistics(self.batch * self.devices)
        constraints = {
            name: ParameterConstraints(
                sharding_types=[sharding] if sharding is not None else None,
                compute_kernels=[EmbeddingComputeKernel.FUSED_UVM_CACHING.value],
                pooling_factors=[max(1.0, self.profile.pooling_factor(name))],
                cache_params=CacheParams(load_factor=_START, stats=statistics[name]),
            )
            for name in self.profile.tables
        }
        return EmbeddingShardingPlanner(proposer=EmbeddingOffloadScaleupProposer(), constraints=constraints, **same)

    def predicted_hit_rate(self, planner: EmbeddingShardingPlanner, plan: ShardingPlan) -> float:
        """Share of look-ups whose row is in HBM, were every cache filled with its table's most looked-up rows."""
        if isinstance(planner, SlipstreamPlanner):
            assert planner.placement is not None
            return planner.placement.hit_rate
        hits = 0.0
        for name, sharding in plan.plan["bags"].items():
            table = self.profile[name]
            rows = int(cached_share(sharding.compute_kernel, sharding.cache_params) * table.rows)
            hits += table.lookups * float(table.hit_rate(rows))
        return hits / self.profile.lookups


def cached_share(kernel: str, cache: CacheParams | None) -> float:
    """Share of a table's rows that a TorchRec plan has room for in HBM."""
    if kernel == EmbeddingComputeKernel.FUSED_UVM.value:
        return 0.0
    if kernel != EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
        return 1.0
    # Without parameters TorchRec makes a cache of a fifth of the rows.
    return 0.2 if cache is None or cache.load_factor is None else float(cache.load_factor)
