"""Which rows get a budget of fast memory: over all tables, those of the most worth a byte.

The greedy order is the best there is for pinned rows (a fractional knapsack, whose remainder is less than one row). It
works on histograms: what is sorted are the different access counts, never the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access import CountHistogram
from torchrec_slipstream.errors import PlanError

# Two different fractions with denominators below this differ by more than float64 rounds, so that their order is exact.
_MAX_ROW_BYTES = 1 << 26
# Rows at a time where rows have to be looked at: bounds the memory besides the result.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TableDemand:
    """A table that wants fast memory for its rows.

    Attributes:
        name: unique among the tables; decides between rows of equal worth a byte.
        histogram: the access counts of all its rows, the untouched ones included.
        row_bytes: bytes of one row in fast memory, its optimizer state included; 1 .. 2^26.
        values: float64 ``[m]``, what a row of each count class of the histogram is worth, finite, at least 0 and never
            rising (a row looked up less is worth no more than one looked up more often). None: its access count.
    """

    name: str
    histogram: CountHistogram
    row_bytes: int
    values: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class TableShare:
    """The rows of a table that are hot, in a form that does not grow with them.

    Attributes:
        least_count: rows looked up more often than this are hot.
        ties: of the rows looked up exactly this often, so many are hot too: the lowest row ids.
        hot_rows: how many rows that makes.
        hot_bytes: what they take of the budget.
        hot_lookups: look-ups of the measured traffic that they would have served.
    """

    least_count: int
    ties: int
    hot_rows: int
    hot_bytes: int
    hot_lookups: int


def allocate(tables: Sequence[TableDemand], budget: float) -> dict[str, TableShare]:
    """Give the budget to the rows of most worth a byte, over all tables.

    Rows stand in one order: worth a byte, the greatest first; at equal worth by table name; within a table by access
    count, the greatest first, then by row id. The hot rows are the longest beginning of that order that fits. So no
    row is left out for one of less worth a byte, a greater budget only adds rows, and the order of ``tables`` does not
    matter. Rows never looked up come last, and are taken as well if the budget reaches them.

    Access counts over bytes are compared exactly; where a table gives ``values``, as float64 quotients.

    Args:
        budget: bytes, a whole number; or ``math.inf``.

    Returns:
        A share for each table, by name, in the order of ``tables``. Time and memory follow the number of different
        counts, not of rows.

    Raises:
        PlanError: a table or the budget is not as described.
    """
    limit = _check(tables, budget)
    shares = {table.name: _nothing(table) for table in tables}
    # By name, and within a table by count as the histogram has them: the stable sort keeps that among equals.
    by_name = sorted((table for table in tables if len(table.histogram.counts)), key=lambda table: table.name)
    if not by_name:
        return shares
    sizes = [len(table.histogram.counts) for table in by_name]
    rows = np.concatenate([table.histogram.rows for table in by_name])
    row_bytes = np.repeat(np.array([table.row_bytes for table in by_name], dtype=np.int64), sizes)
    order = _order(by_name, row_bytes)

    used = np.cumsum((rows * row_bytes)[order])
    whole = int(np.searchsorted(used, limit, side="right"))  # classes that fit whole
    taken = np.zeros_like(rows)
    taken[order[:whole]] = rows[order[:whole]]
    if whole < len(order):
        last = order[whole]
        left = limit - (int(used[whole - 1]) if whole else 0)
        taken[last] = left // int(row_bytes[last])

    begin = 0
    for table, size in zip(by_name, sizes, strict=True):
        shares[table.name] = _share(table, taken[begin : begin + size])
        begin += size
    return shares


def hot_rows_of(
    counts: npt.NDArray[np.integer], share: TableShare, ids: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """The ids of a table's hot rows. No sort; memory besides the result does not grow with the table.

    Args:
        counts: ``[n]``, the access counts that the share was allocated on.
        ids: int64 ``[n]``, ascending, the rows that they are of; all other rows have a count of 0. None: of all rows.

    Returns:
        int64 ``[share.hot_rows]``, ascending.

    Raises:
        PlanError: the share is not of these counts.
    """
    if ids is not None and share.least_count == 0 and share.ties:
        return _with_unlisted(counts, share, ids)
    found: list[npt.NDArray[np.int64]] = []
    ties = share.ties
    for begin in range(0, len(counts), _CHUNK):
        part = counts[begin : begin + _CHUNK]
        is_hot = part > share.least_count
        if ties:
            equal = np.flatnonzero(part == share.least_count)[:ties]
            is_hot[equal] = True
            ties -= len(equal)
        rows = np.flatnonzero(is_hot)
        rows += begin
        found.append(rows if ids is None else ids[rows])
    hot = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    return _checked(hot, share)


def _with_unlisted(
    counts: npt.NDArray[np.integer], share: TableShare, ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Hot rows where some rows without a look-up are hot, and those are not all listed."""
    looked_up = ids[counts > 0]
    # The lowest so many untouched rows lie below this, whatever the others are.
    end = share.ties + len(looked_up)
    is_untouched = np.ones(end, dtype=bool)
    is_untouched[looked_up[looked_up < end]] = False
    untouched = np.flatnonzero(is_untouched)[: share.ties]
    hot = np.concatenate([looked_up, untouched])
    hot.sort()
    return _checked(hot, share)


def _checked(hot: npt.NDArray[np.int64], share: TableShare) -> npt.NDArray[np.int64]:
    if len(hot) != share.hot_rows:
        raise PlanError(
            f"the share has {share.hot_rows} hot rows, but {len(hot)} rows have such counts; "
            "give the counts that it was allocated on"
        )
    return hot


def _order(tables: Sequence[TableDemand], row_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The positions of all count classes (the tables' histograms, one after the other) by worth a byte, descending."""
    if any(table.values is not None for table in tables):
        values = [table.histogram.counts if table.values is None else table.values for table in tables]
        return np.argsort(-(np.concatenate(values) / row_bytes), kind="stable")
    # A mixed number compares exactly where a rounded quotient of large counts would not.
    quotient, remainder = np.divmod(np.concatenate([table.histogram.counts for table in tables]), row_bytes)
    return np.lexsort((-(remainder / row_bytes), -quotient))


def _nothing(table: TableDemand) -> TableShare:
    counts = table.histogram.counts
    return TableShare(least_count=int(counts[0]) if len(counts) else 0, ties=0, hot_rows=0, hot_bytes=0, hot_lookups=0)


def _share(table: TableDemand, taken: npt.NDArray[np.int64]) -> TableShare:
    """``taken``: int64 ``[m]``, hot rows of each count class."""
    classes = np.flatnonzero(taken)
    if not len(classes):
        return _nothing(table)
    last = classes[-1]
    hot_rows = int(taken.sum())
    return TableShare(
        least_count=int(table.histogram.counts[last]),
        ties=int(taken[last]),
        hot_rows=hot_rows,
        hot_bytes=hot_rows * table.row_bytes,
        hot_lookups=int(taken @ table.histogram.counts),
    )


def _check(tables: Sequence[TableDemand], budget: float) -> int:
    """The budget as an integer, no greater than what all tables need."""
    if math.isnan(budget) or budget < 0:
        raise PlanError(f"the budget is {budget} bytes; give 0 or more")
    if budget != math.inf and budget != int(budget):
        raise PlanError(f"the budget is {budget} bytes; give a whole number, or math.inf")
    seen: set[str] = set()
    needed = 0
    for table in tables:
        if table.name in seen:
            raise PlanError(f"table {table.name!r} is given twice; give each table once, or add their counts")
        seen.add(table.name)
        if not 1 <= table.row_bytes <= _MAX_ROW_BYTES:
            raise PlanError(f"table {table.name!r}: row_bytes is {table.row_bytes}; give 1 to {_MAX_ROW_BYTES}")
        if table.values is not None:
            _check_values(table.name, table.values, len(table.histogram.counts))
        needed += table.histogram.total_rows * table.row_bytes
    if needed > np.iinfo(np.int64).max:
        raise PlanError(f"the tables need {needed} bytes, which is beyond 2^63; check row_bytes and the counts' length")
    return needed if budget == math.inf else min(int(budget), needed)


def _check_values(name: str, values: npt.NDArray[np.float64], classes: int) -> None:
    if values.shape != (classes,):
        raise PlanError(f"table {name!r}: values has the shape {values.shape}; give one for each of {classes} counts")
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        raise PlanError(f"table {name!r}: values[{bad[0]}] is {values[bad[0]]}; give finite ones of 0 or more")
    rising = np.flatnonzero(np.diff(values) > 0)
    if len(rising):
        at = int(rising[0])
        raise PlanError(
            f"table {name!r}: values rise from {values[at]} to {values[at + 1]} at {at + 1}, where counts fall; "
            "give values that never rise"
        )
