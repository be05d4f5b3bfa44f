"""Fill HBM with rows: a table whole where all its rows deserve it, else its hot rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torchrec_slipstream.access import CountHistogram
from torchrec_slipstream.placement.allocation import TableDemand, TableShare, allocate
from torchrec_slipstream.placement.tables import PlannedTable
from torchrec_slipstream.tbe.memory import RowBytes


@dataclass(frozen=True, eq=False)
class ShardDemand:
    """A shard (or a whole table) that wants HBM.

    Attributes:
        key: unique among the demands; decides between rows of equal worth a byte.
        columns: the shard's part of every row.
        may_be_whole: whether the shard may be in HBM whole; False where another shard of its table is not.
    """

    key: str
    table: PlannedTable
    histogram: CountHistogram
    columns: int
    may_be_whole: bool

    @property
    def rows(self) -> int:
        return self.histogram.total_rows

    @property
    def bytes(self) -> RowBytes:
        return self.table.bytes_of(self.columns)

    @property
    def whole_bytes(self) -> int:
        """HBM of the shard in HBM whole."""
        return self.rows * self.bytes.whole

    @property
    def demand(self) -> TableDemand:
        """For hot rows: by what rows of equal counts had later where that is known, else by their counts."""
        return TableDemand(self.key, self.histogram, self.bytes.hot, self.table.access.worth(self.histogram))


@dataclass(frozen=True)
class Filling:
    """What a demand got.

    Attributes:
        whole: the whole shard is in HBM.
        share: its hot rows; all of them where it is whole.
        misses: distinct cold rows that a global batch is expected to look up.
        placed: HBM bytes of its rows, hot or whole.
        fixed: HBM bytes of what FBGEMM and the overlay keep for every row of it.
    """

    whole: bool
    share: TableShare
    misses: float
    placed: int
    fixed: int


def fill(demands: Sequence[ShardDemand], budget: int, memory: int) -> dict[str, Filling] | None:
    """Give HBM to rows by what they are worth a byte (see ``allocate``).

    A shard whose rows are all hot is taken whole, which saves its fixed bytes, and the room goes to the others. Where
    the memory does not even hold the fixed bytes, the shards with the fewest look-ups for theirs get no hot rows.

    Args:
        budget: bytes for hot rows and whole shards.
        memory: bytes for these and for what every row of the shards that are not whole takes.

    Returns:
        A filling for each demand by key; None if what has to be in HBM exceeds the budget or the memory.
    """
    if all(one.may_be_whole for one in demands) and sum(one.whole_bytes for one in demands) <= min(budget, memory):
        return {one.key: _filling(one, None, whole=True) for one in demands}
    whole = {one.key for one in demands if one.table.must_be_whole}
    cold = {one.key for one in demands if not one.table.holds_hot_rows}
    while True:
        spent = sum(one.whole_bytes for one in demands if one.key in whole)
        fixed = sum(
            one.rows * (one.bytes.cold if one.key in cold else one.bytes.fixed)
            for one in demands
            if one.key not in whole
        )
        if spent > budget:
            return None
        if spent + fixed > memory:
            saving = [one for one in demands if one.key not in whole | cold and one.bytes.fixed > one.bytes.cold]
            if not saving:
                return None
            cold |= _coldest(saving, spent + fixed - memory)
            continue
        room = min(budget - spent, memory - spent - fixed)
        wanting = [one for one in demands if one.key not in whole | cold]
        shares = allocate([one.demand for one in wanting], room)
        promoted = _promoted(wanting, shares, room - sum(share.hot_bytes for share in shares.values()))
        if not promoted:
            return {one.key: _filling(one, shares.get(one.key), one.key in whole) for one in demands}
        whole |= promoted


def must_bytes(demands: Sequence[ShardDemand]) -> int:
    """HBM of the shards that their constraints want in HBM whole."""
    return sum(one.whole_bytes for one in demands if one.table.must_be_whole)


def _coldest(saving: Sequence[ShardDemand], needed: int) -> set[str]:
    """Of the shards, those with the fewest look-ups for their fixed bytes, until so many bytes are saved."""
    chosen: set[str] = set()
    for one in sorted(saving, key=lambda one: (one.histogram.lookups / max(1, one.rows), one.key)):
        if needed <= 0:
            break
        chosen.add(one.key)
        needed -= one.rows * (one.bytes.fixed - one.bytes.cold)
    return chosen


def _promoted(wanting: Sequence[ShardDemand], shares: Mapping[str, TableShare], left: int) -> set[str]:
    """The shards that can be whole with the bytes that they have, or else the best of those that can with what is left.

    Hot rows take more than their part of a whole table where each needs a slot of FBGEMM's cache, and less where the
    cache leaves their state (Adam's) in host memory.
    """
    may = [one for one in wanting if one.may_be_whole and one.rows]
    more = {one.key: one.whole_bytes - shares[one.key].hot_bytes for one in may}
    promoted = {key for key, extra in more.items() if extra <= 0}
    if promoted:
        return promoted
    for one in sorted(may, key=lambda one: (-one.histogram.lookups / more[one.key], one.key)):
        if more[one.key] <= left:
            promoted.add(one.key)
            left -= more[one.key]
    return promoted


def share_of_top(histogram: CountHistogram, rows: int, row_bytes: int) -> TableShare:
    """The share that has the ``rows`` most looked-up rows."""
    if rows == histogram.total_rows and rows:
        last, ties = int(histogram.counts[-1]), int(histogram.rows[-1])
        return TableShare(last, ties, rows, rows * row_bytes, histogram.lookups)
    key = "top"
    return allocate([TableDemand(key, histogram, row_bytes)], rows * row_bytes)[key]


def filling_of(demand: ShardDemand, rows: int) -> Filling:
    """The filling that has the ``rows`` most looked-up rows hot."""
    return _filling(demand, share_of_top(demand.histogram, rows, demand.bytes.hot), whole=False)


def _filling(demand: ShardDemand, share: TableShare | None, whole: bool) -> Filling:
    if whole:
        return Filling(
            True, share_of_top(demand.histogram, demand.rows, demand.bytes.whole), 0.0, demand.whole_bytes, 0
        )
    if share is None:
        counts = demand.histogram.counts
        share = TableShare(int(counts[0]) if len(counts) else 0, 0, 0, 0, 0)
    histogram = demand.histogram
    cold = np.where(histogram.counts > share.least_count, 0, histogram.rows)
    cold[histogram.counts == share.least_count] -= share.ties
    misses = demand.table.misses(histogram, cold)
    kept = demand.bytes.fixed if share.hot_rows else demand.bytes.cold
    return Filling(False, share, misses, share.hot_rows * demand.bytes.hot, demand.rows * kept)
