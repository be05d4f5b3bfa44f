"""Tables in two tiers: hot rows in a GPU's memory, the others in the host's, planned from an access profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import EnumerableShardingSpec, ModuleSharder, ShardingPlan

from examples.samples import SPARSE_NAMES, Samples
from torchrec_slipstream import AccessProfile, Placement, SlipstreamPlanner, TableAccess
from torchrec_slipstream.budget import parse_bytes

PLACEMENTS = ("off", "planned", "live")
SIMULATED = (
    "no GPU here: both tiers are in host memory, to try placement and re-planning out. Hit rates, rows moved and "
    "results are real; times are not those of two tiers, and nothing gets faster."
)


@dataclass(frozen=True)
class Tiers:
    """What to plan hot rows from.

    Attributes:
        profile: access counts of the tables.
        budget: bytes of fast memory a rank.
    """

    profile: AccessProfile
    budget: int

    def plan(
        self,
        model: nn.Module,
        sharders: Sequence[ModuleSharder[nn.Module]],
        *,
        batch_size: int,
        sharding_types: list[str],
        device: torch.device,
        local_size: int,
    ) -> tuple[ShardingPlan, Placement]:
        """A stock TorchRec plan, and which rows are hot. Collective over the default group.

        Without a GPU the tables are planned as for one, and the plan is then moved to the CPU.
        """
        kernels = [EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.FUSED_UVM.value]
        planner = SlipstreamPlanner(
            profile=self.profile,
            topology=Topology(world_size=dist.get_world_size(), compute_device="cuda", local_world_size=local_size),
            hbm_budget=self.budget,
            batch_size=batch_size,
            backing="uvm",
            constraints={
                name: ParameterConstraints(sharding_types=sharding_types, compute_kernels=kernels)
                for name in self.profile.tables
            },
            debug=False,
        )
        plan = planner.collective_plan(model, list(sharders), dist.GroupMember.WORLD)
        assert planner.placement is not None
        if device.type == "cpu":
            _move_to_cpu(plan)
        return plan, planner.placement


def tiers_for(
    samples: Samples,
    profile_path: Path | None,
    budget: str | float,
    *,
    embedding_dim: int,
    world_size: int,
    optimizer_bytes: int = 4,
) -> Tiers:
    """What the command line asks for. Without a profile file, the first tenth of the samples is measured.

    Args:
        budget: bytes as the planner takes them (``"64MiB"``), or a share of what all rows take with their state.
        optimizer_bytes: optimizer state a row; 4 of row-wise Adagrad.

    Raises ConfigError or ProfileError for a budget or a file that is not one.
    """
    if profile_path is not None:
        profile = AccessProfile.load(profile_path)
    else:
        # In two windows: what rows of equal counts had later tells what a count is worth.
        tenth = max(2, len(samples) // 10)
        earlier, later = (_count(samples, part, embedding_dim, optimizer_bytes) for part in _halves(tenth))
        profile = earlier.followed_by(later)
    return Tiers(profile, budget_bytes(budget, samples.table_rows, 4 * embedding_dim + optimizer_bytes, world_size))


def _halves(samples: int) -> tuple[slice, slice]:
    return slice(0, samples // 2), slice(samples // 2, samples)


def _count(samples: Samples, part: slice, embedding_dim: int, optimizer_bytes: int) -> AccessProfile:
    tables = []
    for i, (feature, rows) in enumerate(zip(SPARSE_NAMES, samples.table_rows, strict=True)):
        counts = torch.bincount(samples.sparse[part, i], minlength=rows).int().numpy()
        tables.append(TableAccess(f"t_{feature}", rows, embedding_dim, counts, optimizer_bytes=optimizer_bytes))
    return AccessProfile(tables, part.stop - part.start)


def budget_bytes(budget: str | float, table_rows: Sequence[int], row_bytes: int, world_size: int) -> int:
    """Bytes a rank of a budget that may be a share of all rows' bytes."""
    if isinstance(budget, float):
        return int(budget * sum(table_rows) * row_bytes / world_size)
    return parse_bytes(budget)


def _move_to_cpu(plan: ShardingPlan) -> None:
    """Every shard on the CPU of its rank. TorchRec takes FUSED_UVM there for a table in host memory."""
    for module_plan in plan.plan.values():
        for sharding in module_plan.values():
            spec = sharding.sharding_spec
            assert isinstance(spec, EnumerableShardingSpec)
            for shard in spec.shards:
                assert shard.placement is not None
                shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
