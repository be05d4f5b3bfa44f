"""One model with a table for every sharding, pooling and kind of bag, so that one run on real ranks proves them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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

from tests.models import META
from torchrec_slipstream import Slipstream
from torchrec_slipstream.placement.migration import migrate

SHARDINGS = {"tw": "table_wise", "rw": "row_wise", "cw": "column_wise", "twrw": "table_row_wise"}
# Each makes processes wait for each other, so not all that there could be, but each sharding and pooling once.
POOLED = ("tw_sum", "rw_mean", "cw_sum", "twrw_mean")
WEIGHTED = ("rw_weighted",)
SEQUENCES = ("tw_sequence", "rw_sequence")
ROWS, BAGS = 60, 6
# By the last part of a table's name: look-ups a bag at most, and dim, so that overlays have pools of both.
LONGEST = {"one": 1, "many": 3}
DIMS = {"one": 16, "many": 8}
Batch = tuple[KeyedJaggedTensor, ...]


class Mixed(nn.Module):
    """Pooled, weighted and sequence collections with tables such as ``rw_mean_one``; one row a sample.

    A table's gradient depends on its own output alone, so that rounding in one does not reach another.
    """

    def __init__(self, groups: Sequence[str] = POOLED + WEIGHTED + SEQUENCES) -> None:
        super().__init__()
        pooled, weighted = ([_pooled(g, b) for g in of if g in groups for b in LONGEST] for of in (POOLED, WEIGHTED))
        sequences = [
            EmbeddingConfig(name=g, embedding_dim=DIMS["many"], num_embeddings=ROWS, feature_names=[f"f_{g}"])
            for g in SEQUENCES
            if g in groups
        ]
        self.bags = EmbeddingBagCollection(device=META, tables=pooled) if pooled else None
        self.weighted = EmbeddingBagCollection(device=META, is_weighted=True, tables=weighted) if weighted else None
        self.sequences = EmbeddingCollection(device=META, tables=sequences) if sequences else None
        self.tables = [config.name for module in self.collections() for config in _configs(module)]

    def collections(self) -> list[EmbeddingBagCollection | EmbeddingCollection]:
        return [one for one in (self.bags, self.weighted, self.sequences) if one is not None]

    def forward(self, *batch: KeyedJaggedTensor) -> Tensor:
        outputs = []
        for module, features in zip(self.collections(), batch, strict=True):
            if module is self.sequences:
                rows = [jagged.values().sum(dim=0) for jagged in module(features).values()]
                outputs.append(torch.cat(rows).expand(BAGS, -1))
            else:
                outputs.append(module(features).values())
        return torch.cat(outputs, dim=1)

    def shardings(self) -> dict[str, str]:
        """What ``tests.models.sharded`` wants."""
        return {name: SHARDINGS[name.split("_")[0]] for name in self.tables}

    def batches(self, steps: int, rank: int) -> Iterator[Batch]:
        """Skewed bags, seeded by step and rank."""
        for step in range(steps):
            generator = torch.Generator().manual_seed(1000 * rank + step)
            parts = []
            for module in self.collections():
                names = [config.name for config in _configs(module)]
                lengths, values = [], []
                for name in names:
                    most = LONGEST.get(name.rsplit("_", 1)[1], 3)
                    lengths.append(torch.randint(0, most + 1, (BAGS,), generator=generator))
                    draws = torch.rand(int(lengths[-1].sum()), generator=generator)
                    values.append((ROWS**draws).long().clamp(max=ROWS) - 1)
                weights = torch.rand(sum(map(len, values)), generator=generator) if module is self.weighted else None
                keys = [f"f_{name}" for name in names]
                parts.append(KeyedJaggedTensor(keys, torch.cat(values), weights=weights, lengths=torch.cat(lengths)))
            yield tuple(parts)


def _pooled(group: str, bags: str) -> EmbeddingBagConfig:
    name = f"{group}_{bags}"
    pooling = PoolingType.MEAN if group.endswith("mean") else PoolingType.SUM
    return EmbeddingBagConfig(
        name=name, embedding_dim=DIMS[bags], num_embeddings=ROWS, feature_names=[f"f_{name}"], pooling=pooling
    )


def _configs(module: EmbeddingBagCollection | EmbeddingCollection) -> list[EmbeddingBagConfig] | list[EmbeddingConfig]:
    if isinstance(module, EmbeddingBagCollection):
        return module.embedding_bag_configs()
    return module.embedding_configs()


def move_at_random(session: Slipstream, seed: int) -> int:
    """Make other rows of this rank hot, drawn by ``seed``, as many as there are slots; how many moved."""
    generator = torch.Generator().manual_seed(seed)
    moved = 0
    for overlay in session._hot.overlays:
        if overlay is None:
            continue
        wanted = {}
        for pool in overlay.pools:
            rows = [overlay.shards[place].rows for place in pool.shards]
            hot = torch.zeros(sum(rows), dtype=torch.bool)
            hot[torch.randperm(len(hot), generator=generator)[: pool.slots]] = True
            for place, part in zip(pool.shards, hot.split(rows), strict=True):
                wanted[place] = part.nonzero().squeeze(1)
        moved += migrate(overlay, wanted, chunk_bytes=100).rows
    return moved
