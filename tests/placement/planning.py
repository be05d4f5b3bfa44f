"""Small models, profiles and topologies for planning; nothing is materialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.types import ModuleSharder
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_slipstream.access import AccessProfile, TableAccess
from torchrec_slipstream.placement import SlipstreamPlanner

GIB = 2**30
SHARDERS: list[ModuleSharder[nn.Module]] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]


def model_of(
    rows: Sequence[int], dims: Sequence[int], *, optimizer: type[torch.optim.Optimizer] | None = RowWiseAdagrad
) -> nn.Module:
    """A pooled collection ``bags`` with a table ``t0``, ``t1``, ... each, on the meta device."""
    model = nn.Module()
    model.bags = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(name=f"t{i}", num_embeddings=n, embedding_dim=dim, feature_names=[f"f{i}"])
            for i, (n, dim) in enumerate(zip(rows, dims, strict=True))
        ],
    )
    if optimizer is not None:
        apply_optimizer_in_backward(optimizer, model.bags.parameters(), {"lr": 0.1})
    return model


def sequence_model(rows: int, dim: int) -> nn.Module:
    """A sequence collection ``sequences`` with one table ``s``."""
    model = nn.Module()
    model.sequences = EmbeddingCollection(
        device=torch.device("meta"),
        tables=[EmbeddingConfig(name="s", num_embeddings=rows, embedding_dim=dim, feature_names=["fs"])],
    )
    apply_optimizer_in_backward(RowWiseAdagrad, model.sequences.parameters(), {"lr": 0.1})
    return model


def skewed(rows: int, lookups: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """int32 ``[rows]``, counts of Zipf-like traffic, the popular rows anywhere in the table."""
    generator = np.random.default_rng(seed)
    drawn = (generator.zipf(1.3, lookups) - 1) % rows
    return np.bincount(generator.permutation(rows)[drawn], minlength=rows).astype(np.int32)


def profile_of(
    counts: Sequence[np.ndarray[Any, Any]], dims: Sequence[int], samples: int | None = None
) -> AccessProfile:
    """A profile of tables ``t0``, ``t1``, ...; one look-up a sample unless ``samples`` says otherwise."""
    tables = [
        TableAccess(f"t{i}", len(c), dim, c.astype(np.int32), optimizer_bytes=4)
        for i, (c, dim) in enumerate(zip(counts, dims, strict=True))
    ]
    return AccessProfile(tables, samples if samples is not None else max(int(c.sum()) for c in counts))


def topology_of(devices: int, *, host: int = 8, device: str = "cuda", hbm: int = GIB, ddr: int = 64 * GIB) -> Topology:
    return Topology(
        world_size=devices, local_world_size=min(host, devices), compute_device=device, hbm_cap=hbm, ddr_cap=ddr
    )


def planner_of(profile: AccessProfile, topology: Topology, **more: Any) -> SlipstreamPlanner:
    """A planner with nothing reserved, so that bytes can be worked out by hand."""
    more.setdefault("storage_reservation", FixedPercentageStorageReservation(0.0))
    return SlipstreamPlanner(profile=profile, topology=topology, **more)


def sharded_as(*types: str) -> dict[str, ParameterConstraints]:
    """Constraints that give table ``t0`` the first sharding type, ``t1`` the second, ..."""
    return {f"t{i}": ParameterConstraints(sharding_types=[one], min_partition=32) for i, one in enumerate(types)}
