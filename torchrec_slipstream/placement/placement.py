"""The placement: which rows are hot, a table and shard, and what that is expected to give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardPlacement:
    """One shard of a table on one device.

    Attributes:
        table: fqn of the table: the path of its collection in the model, and its name.
        rank: the device.
        row_offset, col_offset: where the shard begins in the table of ``table_rows`` x ``dim``.
        rows, columns: of the shard.
        whole: the whole shard is in HBM, in a table whose kernel is FUSED.
        hot_rows: int64 ``[n]``, ascending, the shard's hot rows counted from its first row; empty where it is whole,
            and where the device has no HBM.
        lookups, hot_lookups: of the profile's traffic, those that this shard serves, and those of as many to come that
            are expected from HBM.
        hbm_bytes, host_bytes: of its rows with their optimizer state, and of what is kept for every row.
        placed_bytes: of the HBM bytes, those that the budget is for: of hot rows, or of the whole shard.
        misses: distinct cold rows that one global batch is expected to look up in this shard.
    """

    table: str
    rank: int
    row_offset: int
    col_offset: int
    rows: int
    columns: int
    whole: bool
    hot_rows: npt.NDArray[np.int64]
    lookups: int
    hot_lookups: int
    hbm_bytes: int
    host_bytes: int
    placed_bytes: int
    misses: float

    @property
    def has_good_rows(self) -> bool:
        """Whether ``hot_rows`` are ascending rows of the shard."""
        rows = self.hot_rows
        return not len(rows) or bool(rows[0] >= 0 and rows[-1] < self.rows and (np.diff(rows) > 0).all())


@dataclass(frozen=True, kw_only=True)
class TablePlacement:
    """One table over all its shards.

    Attributes:
        fqn, name: with and without the path of its collection.
        kernel, sharding_type: TorchRec's ``EmbeddingComputeKernel`` and ``ShardingType`` values.
        load_factor: of FBGEMM's cache, for the kernel FUSED_UVM_CACHING.
        hot_rows: of ``rows``, how many are hot (all of a FUSED table on a device with HBM); where column shards hold
            different rows hot, their mean.
        hit_rate: share of look-ups to come that are expected to find their row in HBM, with the hot rows pinned; nan
            where none was looked up.
    """

    fqn: str
    name: str
    kernel: str
    sharding_type: str
    rows: int
    dim: int
    load_factor: float | None
    hot_rows: int
    lookups: int
    hit_rate: float
    hbm_bytes: int
    host_bytes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Placement:
    """What a :class:`~torchrec_slipstream.SlipstreamPlanner` decided besides the sharding plan.

    Attributes:
        tables: by fqn.
        shards: of all tables and devices.
        hbm_budget: bytes a device that rows were allowed.
        hbm_bytes, host_bytes: planned, by device: rows, state, inputs and outputs, and what FBGEMM may take more by
            rounding each cache up to sets of 32 rows.
        hbm_capacity, host_capacity: by device, after the storage reservation.
        expected_ms: of a step's embedding part on the slowest device.
    """

    tables: Mapping[str, TablePlacement]
    shards: tuple[ShardPlacement, ...]
    hbm_budget: int
    hbm_bytes: tuple[int, ...]
    host_bytes: tuple[int, ...]
    hbm_capacity: tuple[int, ...]
    host_capacity: tuple[int, ...]
    expected_ms: float
    backing: str = field(default="caching")

    @cached_property
    def hit_rate(self) -> float:
        """Share of all look-ups that find their row in HBM, with the hot rows pinned; nan without look-ups."""
        # A column shard serves its part of every row.
        parts = [(shard, shard.columns / self.tables[shard.table].dim) for shard in self.shards]
        lookups = sum(shard.lookups * part for shard, part in parts)
        return sum(shard.hot_lookups * part for shard, part in parts) / lookups if lookups else float("nan")

    def placed_on(self, rank: int) -> int:
        """Bytes of one device's budget that its hot rows and whole shards take."""
        return sum(shard.placed_bytes for shard in self.on(rank))

    def save(self, path: str | Path) -> None:
        """Write the placement as an ``.npz`` file; it appears whole or not at all.

        Raises:
            PlanError: the path cannot be written.
        """
        from torchrec_slipstream.placement.files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Placement:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: the file is missing, foreign, of another version, or damaged.
        """
        from torchrec_slipstream.placement.files import load

        return load(path)

    def __eq__(self, other: object) -> bool:
        """Equal in everything, hot rows included."""
        if not isinstance(other, Placement):
            return NotImplemented
        mine, theirs = (
            [[value for name, value in vars(shard).items() if name != "hot_rows"] for shard in one.shards]
            for one in (self, other)
        )
        names = [one.name for one in fields(self) if one.name not in ("tables", "shards")]
        return (
            mine == theirs
            and str(dict(self.tables)) == str(dict(other.tables))  # nan, for a table without look-ups, equals nan
            and all(getattr(self, name) == getattr(other, name) for name in names)
            and all(
                np.array_equal(one.hot_rows, two.hot_rows) for one, two in zip(self.shards, other.shards, strict=True)
            )
        )

    def __str__(self) -> str:
        """The placement as a table, a line a table of the model."""
        from torchrec_slipstream.placement.stats import boxed

        return "\n".join(boxed(self)[1:])

    def on(self, rank: int) -> tuple[ShardPlacement, ...]:
        """The shards of one device."""
        return tuple(shard for shard in self.shards if shard.rank == rank)
