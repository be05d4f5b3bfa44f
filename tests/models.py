"""TorchRec models for the tests, sharded with real DistributedModelParallel."""

from __future__ import annotations

from collections.abc import Iterator

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
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

META = torch.device("meta")
ROWS = (120, 40)
DIM = 8


class TwoCollections(nn.Module):
    """A pooled collection (one sum, one mean table) and a sequence collection; returns one row a sample."""

    def __init__(self) -> None:
        super().__init__()
        pooling = (PoolingType.SUM, PoolingType.MEAN)
        self.bags = EmbeddingBagCollection(
            device=META,
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
        return ["table_wise", "row_wise", "column_wise"]


def sharded(
    model: nn.Module, sharding: str = "table_wise", *, seed: int = 0, learning_rate: float = 0.1
) -> DistributedModelParallel:
    """The model under DistributedModelParallel on the CPU, fused row-wise Adagrad, weights seeded by table and row."""
    import torch.distributed as dist

    apply_optimizer_in_backward(RowWiseAdagrad, model.parameters(), {"lr": learning_rate, "eps": 1e-8})
    sharders = [_BagSharder(), EmbeddingCollectionSharder()]
    names = [c.name for m in model.modules() for c in _configs(m)]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={
            name: ParameterConstraints(
                sharding_types=[sharding if name.startswith("b") or sharding != "column_wise" else "table_wise"],
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
                min_partition=4,
            )
            for name in names
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


def batches_for(
    model: TwoCollections, *, steps: int, size: int = 8, rank: int = 0
) -> Iterator[tuple[KeyedJaggedTensor, KeyedJaggedTensor]]:
    """Skewed bags of 0 to 3 look-ups a feature, seeded by step and rank."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        yield tuple(_jagged(prefix, size, generator) for prefix in ("fb", "fs"))  # type: ignore[misc]


def _jagged(prefix: str, size: int, generator: torch.Generator) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 4, (len(ROWS) * size,), generator=generator)
    values = []
    for feature, rows in enumerate(ROWS):
        count = int(lengths[feature * size : (feature + 1) * size].sum())
        values.append((rows ** torch.rand(count, generator=generator)).long().clamp(max=rows) - 1)
    return KeyedJaggedTensor(keys=[f"{prefix}{i}" for i in range(len(ROWS))], values=torch.cat(values), lengths=lengths)
