"""What planning relies on of TorchRec's planner, checked before anything is planned.

All of it is public, but it changes between releases: whoever has one where it differs shall hear so at once, and not by
a TypeError among the proposals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import Perf, PerfModel, Proposer, Shard, ShardingOption, Storage
from torchrec.distributed.types import CacheParams

from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.placement.proposer import HotRowProposer
from torchrec_slipstream.placement.settling import SettledPerfModel
from torchrec_slipstream.tbe.versions import lacking_message, misfits, names_of

# What is called, with its arguments by position and by name.
_CALLS: tuple[tuple[Callable[..., Any], tuple[str, ...], str], ...] = (
    (
        EmbeddingShardingPlanner,
        (),
        "topology batch_size enumerator storage_reservation proposer partitioner performance_model stats constraints "
        "debug callbacks timeout_seconds",
    ),
    (EmbeddingShardingPlanner.plan, ("module", "sharders"), ""),
    (EmbeddingEnumerator, (), "topology batch_size constraints estimator"),
    (EmbeddingEnumerator.populate_estimates, ("sharding_options",), ""),
    (EmbeddingPerfEstimator, (), "topology constraints"),
    (EmbeddingStorageEstimator, (), "topology constraints"),
    (HeuristicalStorageReservation, (), "percentage"),
    (HeuristicalStorageReservation.reserve, (), "topology batch_size module sharders constraints"),
    (GreedyProposer, (), "use_depth threshold"),
    (Topology, (), "world_size local_world_size compute_device hbm_cap ddr_cap"),
    (Shard, (), "size offset storage perf rank"),
    (Storage, ("hbm", "ddr"), ""),
    (Perf, ("fwd_compute", "fwd_comms", "bwd_compute", "bwd_comms"), "input_dist_comms"),
    (
        ShardingOption,
        (),
        "name tensor module input_lengths batch_size sharding_type partition_by compute_kernel shards is_pooled "
        "feature_names output_dtype num_poolings cache_params",
    ),
    (CacheParams, (), "algorithm load_factor reserved_memory precision prefetch_pipeline"),
)
# What TorchRec calls of ours, and where it declares it.
_CALLED: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (HotRowProposer, Proposer, ("load", "propose", "feedback")),
    (SettledPerfModel, PerfModel, ("rate",)),
)


def check_planner() -> None:
    """Raises PlanError unless TorchRec's planner can be called, and can call ours, as this package does."""
    lacks = [
        lack
        for function, positional, named in _CALLS
        for lack in misfits(function, function.__qualname__, positional, named.split())
    ]
    for ours, theirs, methods in _CALLED:
        for method in methods:
            given = names_of(getattr(theirs, method))
            lacks += misfits(getattr(ours, method), f"{theirs.__name__}.{method} without", (), given)
    if lacks:
        raise PlanError(f"cannot plan: {lacking_message(lacks)}")
