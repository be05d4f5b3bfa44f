"""The DLRM configurations of the papers, and an embedding-bound one, with traffic to train them on.

Layers, dims and data sets are those of FAE's and Slipstream's tables (arXiv 2103.00686, 2404.04270). Kaggle's and
Avazu's tables have a row for every id of the public data sets; Terabyte's are as large as in TorchRec's DLRM example,
178M rows, as the papers do not say how theirs, 266M, are spread over the features. Tables larger than ``max_rows`` are
made as small by hashing, as one does where they do not fit: a configuration says so in its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Floats = npt.NDArray[np.float64]

# Rows of each categorical feature's table.
_KAGGLE = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
_TERABYTE = (
    *(45833188, 36746, 17245, 7413, 20243, 3, 7114, 1441, 62, 29275261, 1572176, 345138, 10),
    *(2209, 11267, 128, 4, 974, 14, 48937457, 11316796, 40094537, 452104, 12606, 104, 35),
)
_AVAZU = (
    *(7, 7, 4737, 7745, 26, 8552, 559, 36, 2686408, 6729486, 8251, 5, 4),
    *(2626, 8, 9, 435, 4, 68, 172, 60),
)

# The look-ups of a bag add up: at the others' rate, stock's loss jumps about from seed to seed.
_OURS: dict[str, Any] = {"positives": 0.032, "table_rate": 0.002}


@dataclass(frozen=True)
class Configuration:
    """A DLRM and its data's shape.

    Attributes:
        dense: dense features.
        table_rows: rows of each table.
        dim: columns of every table.
        dense_sizes, over_sizes: hidden layers below (the last, of ``dim``, is added) and on top (of 1, likewise).
        lookups: of each bag, of every feature.
        batch: samples a step.
        zipf: exponent of the ids' popularity, before they are hashed into the tables, which makes it flatter.
        positives: share of positive labels.
        table_rate: learning rate of the tables (row-wise Adagrad).
    """

    name: str
    dense: int
    table_rows: tuple[int, ...]
    dim: int
    dense_sizes: tuple[int, ...]
    over_sizes: tuple[int, ...]
    lookups: int = 1
    batch: int = 1024
    zipf: float = 1.2
    positives: float = 0.25
    table_rate: float = 0.02

    @property
    def features(self) -> list[str]:
        return [f"C{i + 1}" for i in range(len(self.table_rows))]

    @property
    def table_bytes(self) -> int:
        """Weights and row-wise Adagrad's state."""
        return sum(self.table_rows) * 4 * (self.dim + 1)

    def hashed(self, max_rows: int) -> Configuration:
        """The same with no table of more than ``max_rows``."""
        return replace(self, table_rows=tuple(min(rows, max_rows) for rows in self.table_rows))

    def with_batch(self, batch: int) -> Configuration:
        return replace(self, batch=batch)


CONFIGURATIONS = {
    one.name: one
    for one in (
        Configuration("kaggle", 13, _KAGGLE, 16, (512, 256, 64), (512, 256), positives=0.256),
        Configuration("terabyte", 13, _TERABYTE, 64, (512, 256), (512, 512, 256), positives=0.032),
        Configuration("avazu", 1, _AVAZU, 16, (512, 256, 64), (512, 256), positives=0.17),
        # Ours: bags of many look-ups under layers so small that the step waits for the embeddings; clicks as rare as in
        # the Terabyte log. In the second most look-ups are of few rows.
        Configuration(*("embedding_bound", 13, (100_000,) * 26, 64, (32,), (32,)), lookups=20, zipf=1.05, **_OURS),
        Configuration(
            *("embedding_bound_skewed", 13, (100_000,) * 26, 16, (32,), (32,)), lookups=10, batch=2048, **_OURS
        ),
        # Histories, say: few features, long bags of wide rows.
        Configuration(
            *("embedding_bound_wide", 13, (100_000,) * 8, 256, (32,), (32,)), lookups=100, zipf=1.05, **_OURS
        ),
    )
}


def make_batches(configuration: Configuration, train: int, test: int, *, seed: int = 0) -> tuple[list[Batch], Batch]:
    """Synthetic batches: ids of a Zipf law without an end, hashed into the tables; labels of a planted model.

    The planted log-odds are the sum of an effect of every row that is looked up and of the dense features', scaled to a
    standard deviation of 1.5.

    Returns:
        ``train`` batches, and one of ``test`` samples.
    """
    generator = np.random.default_rng(seed)
    samples = train * configuration.batch + test
    bag = configuration.lookups
    dense = generator.standard_normal((samples, configuration.dense)).astype(np.float32)
    logits = dense @ generator.standard_normal(configuration.dense) / np.sqrt(configuration.dense)
    columns = []
    for rows in configuration.table_rows:
        ids = (generator.zipf(configuration.zipf, (samples, bag)) - 1) % rows
        # Popularity has nothing to do with a row's place.
        ids = generator.permutation(rows)[ids]
        effects = generator.standard_normal(rows)
        logits += effects[ids].mean(axis=1) * np.sqrt(bag / len(configuration.table_rows))
        columns.append(ids)
    logits = 1.5 * (logits - logits.mean()) / logits.std()
    labels = (generator.random(samples) < _sigmoid(logits + _bias(logits, configuration.positives))).astype(np.float32)

    def batch_of(begin: int, end: int) -> Batch:
        count = end - begin
        values = torch.from_numpy(np.concatenate([one[begin:end].ravel() for one in columns]))
        lengths = torch.full((len(columns) * count,), bag, dtype=torch.int32)
        return Batch(
            torch.from_numpy(dense[begin:end]),
            KeyedJaggedTensor.from_lengths_sync(configuration.features, values, lengths),
            torch.from_numpy(labels[begin:end]),
        )

    size = configuration.batch
    return [batch_of(i * size, (i + 1) * size) for i in range(train)], batch_of(train * size, samples)


def _sigmoid(values: Floats) -> Floats:
    return 1 / (1 + np.exp(-values))


def _bias(logits: Floats, positives: float) -> float:
    """What added to the logits gives the share of positives, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _sigmoid(logits + middle).mean() < positives else (low, middle)
    return low
