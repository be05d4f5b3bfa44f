"""Samples in memory, and the batches that TorchRec trains on.

Whatever the source (a Criteo file, the synthetic generator), the training job sees `Samples`: three tensors in
Criteo's shape. `batches` cuts them into TorchRec `Batch`es, one shard for each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

DENSE_NAMES = tuple(f"I{i}" for i in range(1, 14))
SPARSE_NAMES = tuple(f"C{i}" for i in range(1, 27))


@dataclass(frozen=True)
class Samples:
    """N labelled impressions in Criteo's shape.

    Attributes:
        dense: float32 [N, 13], zero or more; a missing value is 0.
        sparse: int64 [N, 26], one row id a feature: column f lies in [0, table_rows[f]).
        labels: float32 [N], 0 or 1.
        table_rows: rows of the embedding table of each of the 26 features.

    Raises ValueError where the shapes, types or ranges are not these.
    """

    dense: torch.Tensor
    sparse: torch.Tensor
    labels: torch.Tensor
    table_rows: tuple[int, ...]

    def __post_init__(self) -> None:
        n = self.labels.shape[0] if self.labels.dim() == 1 else -1
        for name, tensor, shape, dtype in (
            ("labels", self.labels, (n,), torch.float32),
            ("dense", self.dense, (n, len(DENSE_NAMES)), torch.float32),
            ("sparse", self.sparse, (n, len(SPARSE_NAMES)), torch.int64),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; give {dtype} {shape}")
        if len(self.table_rows) != len(SPARSE_NAMES):
            raise ValueError(f"table_rows has {len(self.table_rows)} numbers; give {len(SPARSE_NAMES)}")
        if n == 0:
            return
        # An id past the table's end is read past the end by FBGEMM on a GPU: stop it here, where it can be named.
        low, high = self.sparse.min(dim=0).values, self.sparse.max(dim=0).values
        for feature, rows in enumerate(self.table_rows):
            if low[feature] < 0 or high[feature] >= rows:
                raise ValueError(
                    f"{SPARSE_NAMES[feature]} has row ids from {low[feature]} to {high[feature]}, but its table has "
                    f"{rows} rows; give ids in [0, {rows}), or a larger table"
                )

    def __len__(self) -> int:
        return self.labels.shape[0]

    def slice(self, start: int, stop: int) -> Samples:
        """Samples start .. stop-1, as views."""
        return Samples(self.dense[start:stop], self.sparse[start:stop], self.labels[start:stop], self.table_rows)

    def split(self, n_train: int) -> tuple[Samples, Samples]:
        """The first `n_train` samples, and the rest: file order is time order, so the test lies after the training."""
        if not 0 < n_train < len(self):
            raise ValueError(
                f"n_train is {n_train}, of {len(self)} samples; give 1 to {len(self) - 1} so that both parts have some"
            )
        return self.slice(0, n_train), self.slice(n_train, len(self))

    def batch(self, index: torch.Tensor) -> Batch:
        """The samples of `index` (int64 [B]) as a TorchRec batch, its features in the order C1 .. C26."""
        size, features = index.numel(), len(SPARSE_NAMES)
        values = self.sparse[index].t().reshape(-1)  # feature-major, as a KJT wants them
        # One id a bag, so lengths, offsets and the counts of each key are known: giving them saves the KJT computing
        # them when first asked.
        kjt = KeyedJaggedTensor(
            keys=list(SPARSE_NAMES),
            values=values,
            lengths=torch.ones(features * size, dtype=torch.int32),
            offsets=torch.arange(features * size + 1, dtype=torch.int32),
            stride=size,
            length_per_key=[size] * features,
            offset_per_key=list(range(0, features * size + 1, size)) if size else [0] * (features + 1),
        )
        return Batch(dense_features=self.dense[index], sparse_features=kjt, labels=self.labels[index])


def count_batches(n: int, batch_size: int, *, world_size: int = 1, drop_last: bool = True) -> int:
    """How many batches every rank gets from `batches` for `n` samples, 1 or more.

    Raises ValueError for sizes below 1, and for too few samples to make one batch on every rank.
    """
    if batch_size < 1 or world_size < 1:
        raise ValueError(f"batch_size is {batch_size} and world_size {world_size}; give 1 or more for both")
    whole, rest = divmod(n, batch_size * world_size)
    # Too few left over to give each rank one: they ride with the batch before (see batches).
    total = whole + int(not drop_last and rest >= world_size)
    if total == 0:
        raise ValueError(
            f"{n} samples make no batch of {batch_size} on each of {world_size} ranks; give more samples or a smaller "
            "batch_size" + (", or drop_last=False" if drop_last else "")
        )
    return total


def batches(
    samples: Samples,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
) -> Iterator[Batch]:
    """One epoch's batches of one rank.

    The order of the samples depends on `seed` and `epoch` only, and a global batch is `batch_size * world_size`
    consecutive ones of it, cut between the ranks: so two ranks at 128 see in each step what one rank at 256 sees.
    Every rank gets the same number of batches (they meet in collectives), and over all ranks each sample comes
    exactly once; without `drop_last` the last global batch is a shorter one cut as evenly as can be. Where that
    would leave a rank without any, those few samples join the batch before.

    Args:
        batch_size: samples a batch and rank.
        drop_last: leave out the samples that do not fill a global batch.

    Raises ValueError at once (not at the first batch) for a rank outside [0, world_size), and as `count_batches` does.
    """
    total = count_batches(len(samples), batch_size, world_size=world_size, drop_last=drop_last)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, of world_size {world_size}; give 0 to {world_size - 1}")
    return _generate(samples, batch_size, seed, epoch, shuffle, rank, world_size, drop_last, total)


def _generate(
    samples: Samples,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    rank: int,
    world_size: int,
    drop_last: bool,
    total: int,
) -> Iterator[Batch]:
    n, global_batch = len(samples), batch_size * world_size
    if shuffle:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator)
    else:
        order = torch.arange(n)
    for step in range(total):
        last = step == total - 1 and not drop_last
        chunk = order[step * global_batch : n if last else (step + 1) * global_batch]
        yield samples.batch(chunk.tensor_split(world_size)[rank])
