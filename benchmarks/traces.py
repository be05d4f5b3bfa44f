"""Traffic for the placement benchmark: which rows each batch looks up, of real logs or of synthetic tables.

A *request* is one distinct row of one batch: what crosses the bus once, and what FBGEMM's cache looks up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.samples import SPARSE_NAMES
from torchrec_slipstream.tbe.memory import optimizer_state

Ints = npt.NDArray[np.int64]
WEIGHT_BYTES = 4
# The columns of REES46's shop events that are ids.
EVENT_NAMES = ("user", "session", "product", "subcat", "cat", "brand", "etype")
# Rows that a batch holds more often than this get a number of look-ups for each batch; rarer ones, batches at random.
_OFTEN = 0.5


@dataclass(frozen=True)
class TraceTable:
    """One table: its size, and the rows it has in fast memory cost :attr:`row_bytes` each (row-wise Adagrad)."""

    name: str
    rows: int
    dim: int

    @property
    def row_bytes(self) -> int:
        return WEIGHT_BYTES * self.dim + self.optimizer_bytes

    @property
    def optimizer_bytes(self) -> int:
        return optimizer_state("rowwise_adagrad").row_bytes(self.dim)


@dataclass(frozen=True, eq=False)
class Trace:
    """Batches in time order, over tables whose rows are numbered one table after the other.

    Attributes:
        rows: int32 ``[n]``, the requests: the distinct rows of each batch, ascending within it.
        lookups: int32 ``[n]``, look-ups that each stands for.
        batches: int64 ``[b + 1]``, where each batch begins in ``rows``.
        batch_size: samples a batch.
        about: what it is, for the record.
    """

    tables: tuple[TraceTable, ...]
    rows: npt.NDArray[np.int32]
    lookups: npt.NDArray[np.int32]
    batches: Ints
    batch_size: int
    about: str

    @property
    def starts(self) -> Ints:
        """int64 ``[tables + 1]``: the first row of each table."""
        return np.concatenate([[0], np.cumsum([table.rows for table in self.tables])]).astype(np.int64)

    @property
    def total_rows(self) -> int:
        return sum(table.rows for table in self.tables)

    @property
    def total_bytes(self) -> int:
        return sum(table.rows * table.row_bytes for table in self.tables)

    @property
    def row_bytes(self) -> Ints:
        """int64 ``[total_rows]``."""
        return np.repeat([table.row_bytes for table in self.tables], [table.rows for table in self.tables])

    def count_lookups(self, begin: int, end: int) -> Ints:
        """int64 ``[total_rows]``: look-ups of each row in the batches begin .. end-1."""
        part = slice(self.batches[begin], self.batches[end])
        # Sums of integers below 2^53 are exact.
        return np.bincount(self.rows[part], self.lookups[part], minlength=self.total_rows).astype(np.int64)

    def count_batches(self, begin: int, end: int) -> Ints:
        """int64 ``[total_rows]``: of the batches begin .. end-1, how many look each row up."""
        part = slice(self.batches[begin], self.batches[end])
        return np.bincount(self.rows[part], minlength=self.total_rows)

    def split(self, values: npt.NDArray) -> dict[str, npt.NDArray]:
        """What is by row, as views by table name."""
        starts = self.starts
        return {table.name: values[starts[i] : starts[i + 1]] for i, table in enumerate(self.tables)}


def read_trace(
    path: Path,
    *,
    batch_size: int,
    dim: int,
    headroom: float = 1.0,
    shuffle: bool = False,
    resample: int = 0,
    seed: int = 0,
) -> Trace:
    """A parquet file with Criteo's columns C1 .. C26 or with REES46's event columns, in the file's order.

    Each column is a table. A table has a row for every different id of the whole file (a missing one is an id as
    well), times ``headroom``; which row an id has is drawn at random, so that row numbers tell nothing of the order in
    which ids appear.

    Args:
        shuffle: put the samples into a random order: a control in which traffic does not drift.
        resample: draw so many times the file's samples from it, with replacement: the same, and as long as is wanted.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    names = SPARSE_NAMES if set(SPARSE_NAMES) <= set(file.schema_arrow.names) else EVENT_NAMES
    missing = set(names) - set(file.schema_arrow.names)
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}; give a Criteo or REES46 parquet file")
    data = file.read(columns=list(names))
    generator = np.random.default_rng(seed)
    order = generator.permutation(data.num_rows) if shuffle else np.arange(data.num_rows)
    how = "shuffled" if shuffle else "file order"
    if resample:
        order = generator.integers(0, data.num_rows, resample * data.num_rows)
        how = f"{resample} x its samples, drawn with replacement"
    tables: list[TraceTable] = []
    ids: list[Ints] = []
    for name in names:
        codes = pc.dictionary_encode(data[name].combine_chunks(), null_encoding="encode")
        different = len(codes.dictionary)
        rows = max(different, round(headroom * different))
        place = generator.permutation(rows)[:different]
        ids.append(place[codes.indices.to_numpy()][order])
        tables.append(TraceTable(name, rows, dim))
    about = f"{path.name}, {how}, one row for each of {headroom:g} x distinct ids"
    return assemble(tables, ids, batch_size, about)


def assemble(tables: Sequence[TraceTable], ids: Sequence[Ints], batch_size: int, about: str) -> Trace:
    """From one id a sample and table, int64 ``[samples]`` each. A last batch that is not full is left out."""
    batches = len(ids[0]) // batch_size
    starts = np.cumsum([0, *(table.rows for table in tables)])
    stacked = np.stack([one[: batches * batch_size] + start for one, start in zip(ids, starts, strict=False)])
    batch = np.arange(batches * batch_size) // batch_size
    keys, lookups = np.unique((batch << 32) + stacked, return_counts=True)
    return _from_keys(tables, keys, lookups, batches, batch_size, about)


def _from_keys(
    tables: Sequence[TraceTable], keys: Ints, lookups: npt.NDArray, batches: int, batch_size: int, about: str
) -> Trace:
    """``keys``: int64 ``[n]``, ascending, the batch in the upper and the row in the lower 32 bits."""
    return Trace(
        tables=tuple(tables),
        rows=(keys & 0xFFFFFFFF).astype(np.int32),
        lookups=lookups.astype(np.int32),
        batches=np.searchsorted(keys, np.arange(batches + 1) << 32).astype(np.int64),
        batch_size=batch_size,
        about=about,
    )


@dataclass(frozen=True)
class Production:
    """Synthetic tables of a production model's make.

    ``tables`` of ``smallest`` to ``largest`` rows, log-uniform; dims drawn from ``dims``; Zipf exponents uniform in
    ``exponents``, flattened over the first ``flat`` ranks; look-ups a sample log-uniform in ``pooling``. Of all this,
    one row in ``sample`` is simulated, at random, with the same share of the budgets: rows are independent of each
    other, as are the sets of a cache, so shares stay what they were. Traffic does not drift.
    """

    tables: int = 800
    smallest: int = 100
    largest: int = 10_000_000
    dims: tuple[int, ...] = (16, 32, 64, 96, 128, 256)
    exponents: tuple[float, float] = (0.6, 1.4)
    flat: float = 20.0
    pooling: tuple[float, float] = (0.5, 20.0)
    batch_size: int = 65536
    batches: int = 200
    sample: int = 256
    seed: int = 0


def make_production(sizes: Production) -> Trace:
    """Draw the look-ups of the sampled rows: of each row in each batch a Poisson number, of its popularity's mean.

    (A batch has a Poisson number of look-ups then, instead of a fixed one, which makes rows independent.)
    """
    generator = np.random.default_rng(sizes.seed)
    whole = np.exp(generator.uniform(np.log(sizes.smallest), np.log(sizes.largest), sizes.tables)).astype(np.int64)
    dims = generator.choice(sizes.dims, sizes.tables)
    exponents = generator.uniform(*sizes.exponents, sizes.tables)
    pooling = np.exp(generator.uniform(np.log(sizes.pooling[0]), np.log(sizes.pooling[1]), sizes.tables))
    tables: list[TraceTable] = []
    rates: list[npt.NDArray[np.float64]] = []
    for i in range(sizes.tables):
        ranks = _sampled_ranks(int(whole[i]), sizes.sample, generator)
        popularity = (ranks + sizes.flat) ** -exponents[i]
        rate = popularity / _zipf_sum(int(whole[i]), exponents[i], sizes.flat) * pooling[i] * sizes.batch_size
        rates.append(generator.permutation(rate))
        tables.append(TraceTable(f"t{i:03d}", len(ranks), int(dims[i])))
    rate = np.concatenate(rates)
    often = np.flatnonzero(rate > _OFTEN)
    rare = np.flatnonzero(rate <= _OFTEN)
    dense = generator.poisson(rate[often], (sizes.batches, len(often)))
    batch, at = np.nonzero(dense)
    rows = np.repeat(rare, generator.poisson(rate[rare] * sizes.batches))
    rare_keys, rare_lookups = np.unique(
        (generator.integers(0, sizes.batches, len(rows)) << 32) + rows, return_counts=True
    )
    keys = np.concatenate([(batch << 32) + often[at], rare_keys])
    lookups = np.concatenate([dense[batch, at], rare_lookups])
    order = np.argsort(keys, kind="stable")
    about = (
        f"synthetic: {sizes.tables} tables of {sizes.smallest} to {sizes.largest} rows, {whole.sum()} in all, "
        f"of which one in {sizes.sample} is simulated; no drift"
    )
    return _from_keys(tables, keys[order], lookups[order], sizes.batches, sizes.batch_size, about)


def _sampled_ranks(rows: int, sample: int, generator: np.random.Generator) -> Ints:
    """The popularity ranks (from 1) of a random one in ``sample`` of a table's rows, at least one row."""
    if sample == 1:
        return np.arange(1, rows + 1)
    # One of each run of neighbouring ranks: as good as any sample, and it leaves no table without its popular part.
    begins = np.arange(0, rows, sample)
    ranks = begins + 1 + generator.integers(0, sample, len(begins))
    return ranks[ranks <= rows] if (ranks <= rows).any() else np.array([1 + int(generator.integers(rows))])


def _zipf_sum(rows: int, exponent: float, flat: float) -> float:
    """The sum of (rank + flat)^-exponent over all ranks 1 .. rows, by the midpoint rule."""
    if exponent == 1.0:
        return float(np.log((rows + flat + 0.5) / (flat + 0.5)))
    power = 1.0 - exponent
    return float(((rows + flat + 0.5) ** power - (flat + 0.5) ** power) / power)
