"""TorchRec models for the tests, sharded with real DistributedModelParallel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_slipstream.placement import Placement, ShardPlacement, TablePlacement

META = torch.device("meta")
ROWS = (120, 40)
DIM = 8


class TwoCollections(nn.Module):
    """A pooled collection (one sum, one mean table) and a sequence collection; returns one row a sample.

    ``weighted``: the pooled one's look-ups have weights; TorchRec then takes sums only.
    """

    def __init__(self, *, weighted: bool = False) -> None:
        super().__init__()
        pooling = (PoolingType.SUM, PoolingType.SUM if weighted else PoolingType.MEAN)
        self.bags = EmbeddingBagCollection(
            device=META,
            is_weighted=weighted,
            tables=[
                EmbeddingBagConfig(
                    name=f"b{i}", embedding_dim=DIM, num_embeddings=rows, feature_names=[f"fb{i}"], pooling=pool
                )
                for i, (rows, pool) in enumerate(zip(ROWS, pooling, strict=True))
            ],
        )
        self.sequences = EmbeddingCollection(
            device=META,
            tables=[
                EmbeddingConfig(name=f"s{i}", embedding_dim=DIM, num_embeddings=rows, feature_names=[f"fs{i}"])
                for i, rows in enumerate(ROWS)
            ],
        )

    def forward(self, bags: KeyedJaggedTensor, sequences: KeyedJaggedTensor) -> Tensor:
        pooled = self.bags(bags).values()
        parts = [jagged.values().sum(dim=0, keepdim=True) for jagged in self.sequences(sequences).values()]
        return torch.cat([pooled, torch.cat(parts, dim=1).expand(pooled.shape[0], -1)], dim=1)


class _BagSharder(EmbeddingBagCollectionSharder):
    """Stock, plus the row-wise types that TorchRec leaves out on a CPU for want of a gloo reduce-scatter of old."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"]


# What sequence collections do not have, and what they get in its place.
_OF_SEQUENCES = {"column_wise": "table_wise", "table_row_wise": "row_wise", "grid_shard": "row_wise"}


def sharded(
    model: nn.Module,
    sharding: str | Mapping[str, str] = "table_wise",
    *,
    seed: int = 0,
    learning_rate: float = 0.1,
    optimizer: type[torch.optim.Optimizer] = RowWiseAdagrad,
) -> DistributedModelParallel:
    """The model under DistributedModelParallel on the CPU, with a fused optimizer, weights seeded by table and row.

    ``sharding``: the type of all tables, or by table.
    """
    import torch.distributed as dist

    options = {"lr": learning_rate} | ({} if optimizer is torch.optim.SGD else {"eps": 1e-8})
    embeddings = [parameter for module in model.modules() if _configs(module) for parameter in module.parameters()]
    apply_optimizer_in_backward(optimizer, embeddings, options)
    sharders = [_BagSharder(), EmbeddingCollectionSharder()]
    types = {}
    for module in model.modules():
        for name in [config.name for config in _configs(module)]:
            of_table = sharding if isinstance(sharding, str) else sharding[name]
            is_sequence = isinstance(module, EmbeddingCollection)
            types[name] = _OF_SEQUENCES.get(of_table, of_table) if is_sequence else of_table
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={
            name: ParameterConstraints(
                sharding_types=[of_table],
                compute_kernels=["dense" if of_table == "data_parallel" else "fused"],
                min_partition=4,
            )
            for name, of_table in types.items()
        },
        debug=False,
    )
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    torch.manual_seed(seed)
    parallel = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    for name, value in sorted(parallel.state_dict().items()):
        generator = torch.Generator().manual_seed(len(name) + seed)
        whole = torch.rand(value.shape, generator=generator) - 0.5
        for shard in getattr(value, "local_shards", lambda: [])():
            at, size = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(whole[at[0] : at[0] + size[0], at[1] : at[1] + size[1]])
    return parallel


def _configs(module: nn.Module) -> list[EmbeddingBagConfig] | list[EmbeddingConfig]:
    if isinstance(module, EmbeddingBagCollection):
        return module.embedding_bag_configs()
    return module.embedding_configs() if isinstance(module, EmbeddingCollection) else []


def placement_of(
    parallel: DistributedModelParallel, share: float | Mapping[str, float], *, seed: int = 0, backing: str = "uvm"
) -> Placement:
    """A placement made by hand of a sharded model, with a share of each shard's rows hot: of all tables, or by table.

    Rows are drawn anew with each ``seed``. What a planner would predict is 0.
    """
    shards: list[ShardPlacement] = []
    tables: dict[str, TablePlacement] = {}
    zero: dict[str, Any] = {"lookups": 0, "hbm_bytes": 0, "host_bytes": 0}
    for path, module in parallel.module.named_modules():
        for name, of_table in (getattr(module, "module_sharding_plan", None) or {}).items():
            if of_table.sharding_spec is None:  # data parallel
                continue
            fqn = f"{path}.{name}"
            mine = []
            for one in of_table.sharding_spec.shards:
                (row, column), (rows, columns) = one.shard_offsets, one.shard_sizes
                generator = np.random.default_rng([seed, len(shards), row, column])
                count = int(rows * (share if not isinstance(share, Mapping) else share.get(name, 0.0)))
                hot = np.sort(generator.permutation(rows)[:count]).astype(np.int64)
                one_shard = ShardPlacement(
                    table=fqn, rank=one.placement.rank(), row_offset=row, col_offset=column, rows=rows,
                    columns=columns, whole=False, hot_rows=hot, hot_lookups=0, placed_bytes=0, misses=0.0, **zero,
                )  # fmt: skip
                mine.append(one_shard)
            shards += mine
            tables[fqn] = TablePlacement(
                fqn=fqn, name=name, kernel="fused_uvm", sharding_type=of_table.sharding_type, load_factor=None,
                rows=max(s.row_offset + s.rows for s in mine), dim=max(s.col_offset + s.columns for s in mine),
                hot_rows=sum(len(s.hot_rows) for s in mine), hit_rate=0.0, **zero,
            )  # fmt: skip
    ranks = 1 + max(one.rank for one in shards)
    none = (0,) * ranks
    return Placement(
        tables=tables, shards=tuple(shards), hbm_budget=0, hbm_bytes=none, host_bytes=none, hbm_capacity=none,
        host_capacity=none, expected_ms=0.0, backing=backing,
    )  # fmt: skip


def state_of(parallel: DistributedModelParallel) -> dict[str, Tensor]:
    """Copies of this rank's shards of all weights and optimizer states, by name and place: from public state dicts."""
    state: dict[str, Tensor] = {}
    optimizer = parallel.fused_optimizer.state_dict()["state"]
    whole = [*parallel.state_dict().items(), *(item for values in optimizer.values() for item in values.items())]
    for name, value in whole:
        for shard in getattr(value, "local_shards", lambda: [])():
            state[f"{name}@{shard.metadata.shard_offsets}"] = shard.tensor.clone()
    return state


def batches_for(
    model: TwoCollections, *, steps: int, size: int = 8, rank: int = 0, longest: int = 3, weighted: bool = False
) -> Iterator[tuple[KeyedJaggedTensor, KeyedJaggedTensor]]:
    """Skewed bags of 0 to ``longest`` look-ups a feature, seeded by step and rank."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        bags, sequences = (_jagged(prefix, size, generator, longest) for prefix in ("fb", "fs"))
        if weighted:
            weights = torch.rand(bags.values().numel(), generator=generator)
            bags = KeyedJaggedTensor(bags.keys(), bags.values(), weights=weights, lengths=bags.lengths())
        yield bags, sequences


def _jagged(prefix: str, size: int, generator: torch.Generator, longest: int) -> KeyedJaggedTensor:
    lengths = torch.randint(0, longest + 1, (len(ROWS) * size,), generator=generator)
    values = []
    for feature, rows in enumerate(ROWS):
        count = int(lengths[feature * size : (feature + 1) * size].sum())
        values.append((rows ** torch.rand(count, generator=generator)).long().clamp(max=rows) - 1)
    return KeyedJaggedTensor(keys=[f"{prefix}{i}" for i in range(len(ROWS))], values=torch.cat(values), lengths=lengths)
