"""A small click model with a loss, and batches for it, to train whole and in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    JaggedTensor,
    KeyedJaggedTensor,
    PoolingType,
)
from torchrec.datasets.utils import Batch

from tests.models import META

ROWS, DIM, DENSE = (60, 30, 20), 8, 4
FEATURES = [f"f{i}" for i in range(len(ROWS))]
HOT = 5  # in each table, the rows below


class Clicks(nn.Module):
    """Mean loss over the samples of a batch.

    ``exact``: a sample's loss is linear in its embeddings, so that its gradient is the same in every company, bit for
    bit if the whole batch's size is a power of 2. Otherwise an MLP follows, whose products are added up in another
    order. ``sequences``: every look-up counts by itself besides, in tables without pooling.
    """

    def __init__(self, *, exact: bool, weighted: bool = False, sequences: bool = False) -> None:
        super().__init__()
        self.exact = exact
        pooling = (PoolingType.SUM, PoolingType.SUM if weighted else PoolingType.MEAN, PoolingType.SUM)
        tables = [
            EmbeddingBagConfig(
                name=f"t{i}", embedding_dim=DIM, num_embeddings=rows, feature_names=[FEATURES[i]], pooling=pooling[i]
            )
            for i, rows in enumerate(ROWS)
        ]
        self.bags = EmbeddingBagCollection(device=META, tables=tables, is_weighted=weighted)
        self.sequences = None
        if sequences:
            alone = [
                EmbeddingConfig(name=f"s{i}", embedding_dim=DIM, num_embeddings=rows, feature_names=[FEATURES[i]])
                for i, rows in enumerate(ROWS)
            ]
            self.sequences = EmbeddingCollection(device=META, tables=alone)
        if not exact:
            width = DENSE + len(ROWS) * DIM
            generator = torch.Generator().manual_seed(0)
            self.over = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 1))
            for parameter in self.over.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.bags(batch.sparse_features).values()
        if self.sequences is not None:
            pooled = torch.cat([pooled, *(_summed(one) for one in self.sequences(batch.sparse_features).values())], 1)
        if self.exact:
            return (pooled * torch.linspace(-1, 1, pooled.shape[1]) * (batch.labels[:, None] - 0.3)).sum(dim=1).mean()
        logits = self.over(torch.cat([batch.dense_features, pooled], dim=1)).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)


def _summed(jagged: JaggedTensor) -> Tensor:
    """``[B, dim]``."""
    samples = torch.repeat_interleave(jagged.lengths())
    return jagged.values().new_zeros(jagged.lengths().numel(), DIM).index_add(0, samples, jagged.values())


def make_batch(popular: Sequence[bool], seed: int, *, longest: int = 3, weighted: bool = False) -> Batch:
    """A batch with so many samples; all rows of the ``popular`` ones are hot."""
    generator = torch.Generator().manual_seed(seed)
    size = len(popular)
    values, lengths = [], []
    for rows in ROWS:
        for is_popular in popular:
            # The others have a cold row in each bag, so that they are not popular by chance.
            count = int(torch.randint(0 if is_popular else 1, longest + 1, (1,), generator=generator))
            bag = torch.randint(0, HOT if is_popular else rows, (count,), generator=generator)
            if not is_popular:
                bag[0] = HOT + bag[0] % (rows - HOT)
            values.append(bag)
            lengths.append(count)
    ids = torch.cat(values)
    weights = torch.rand(ids.numel(), generator=generator) if weighted else None
    features = KeyedJaggedTensor(FEATURES, ids, lengths=torch.tensor(lengths), weights=weights)
    labels = (torch.rand(size, generator=generator) < 0.3).float()
    return Batch(torch.randn(size, DENSE, generator=generator), features, labels)


def is_popular(batch: Batch) -> Tensor:
    """bool ``[B]``, by the rows alone."""
    features = batch.sparse_features
    size = features.stride()
    bags = torch.arange(size).repeat(len(ROWS)).repeat_interleave(features.lengths())
    cold = torch.zeros(size, dtype=torch.int64).index_add_(0, bags, (features.values() >= HOT).long())
    return cold == 0
