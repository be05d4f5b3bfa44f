"""The access counts of one table, dense or sparse, and what they say about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.histogram import CountHistogram
from torchrec_slipstream.access.recurrence import Recurrence
from torchrec_slipstream.access.statistics import expected_distinct, row_probabilities
from torchrec_slipstream.errors import ProfileError

Counts: TypeAlias = npt.NDArray[np.integer]

# Rows looked at together, so that masks over 10^9 rows stay small.
_CHUNK = 1 << 24
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class TableAccess:
    """How often each row of one logical table was looked up.

    Two forms: *dense*, a count for every row; and *sparse*, where ``ids`` names the rows that ``counts`` belongs to and
    all others have 0 (sketches, and tables of which few rows are used). Both say the same in every figure. The arrays
    are not copied and must not change any more; a table of 10^9 rows fits 4 GB as int32.

    Attributes:
        name: the table's name, unique in its model.
        rows: rows of the whole logical table, whichever part of it a rank holds.
        embedding_dim: values a row.
        counts: int32 or int64, ``[rows]``, or ``[n]`` where ``ids`` is given. None is negative.
        ids: int64 ``[n]``, ascending, each in ``[0, rows)``; or None for the dense form.
        lookups: all look-ups seen. More than ``counts.sum()`` where a sketch could not say whose they were; default:
            that sum. Hit rates count those as misses until the whole table is hot; forecasts of distinct rows spread
            them evenly over the rows without a count.
        element_size: bytes of one weight.
        optimizer_bytes: bytes of optimizer state a row.
        recurrence: what rows looked up so often had in the window after, where two windows were measured; None else.

    Raises:
        ProfileError: the values do not fit together; the message names the table and the value.
    """

    name: str
    rows: int
    embedding_dim: int
    counts: Counts
    ids: npt.NDArray[np.int64] | None = None
    lookups: int = -1
    element_size: int = 4
    optimizer_bytes: int = 0
    recurrence: Recurrence | None = None

    def __post_init__(self) -> None:
        for field, least in (("rows", 1), ("embedding_dim", 1), ("element_size", 1), ("optimizer_bytes", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise self._error(f"{field} is {value!r}; give an integer of at least {least}")
            object.__setattr__(self, field, int(value))
        self._check_counts()
        self._check_ids()
        # int32 counts are summed in int64.
        counted = int(self.counts.sum(dtype=np.int64))
        if self.lookups == -1:
            object.__setattr__(self, "lookups", counted)
        if isinstance(self.lookups, bool) or not isinstance(self.lookups, (int, np.integer)) or self.lookups < counted:
            raise self._error(
                f"lookups is {self.lookups!r}, and the counts alone add up to {counted}; leave lookups out, or give "
                "all look-ups that were seen"
            )
        object.__setattr__(self, "lookups", int(self.lookups))

    # -------------------------------------------------------------------------------------------------- figures

    @property
    def row_bytes(self) -> int:
        """Bytes of one row with its optimizer state."""
        return self.embedding_dim * self.element_size + self.optimizer_bytes

    @property
    def counted_lookups(self) -> int:
        """Look-ups that are attributed to a row: ``counts.sum()``."""
        return self.histogram.lookups

    @cached_property
    def histogram(self) -> CountHistogram:
        """Rows by access count, over all rows of the table."""
        return CountHistogram.of(self.counts, untouched=self.rows - len(self.counts))

    @cached_property
    def probabilities(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Chance that a look-up goes to a row, by class of rows, the likeliest first: float64 ``[m]`` and the rows of
        each class, int64 ``[m]``. The chances of all rows add up to 1, or to 0 where there was no look-up."""
        return row_probabilities(self.histogram, self.lookups)

    def hit_rate(self, hot_rows: int | npt.NDArray[np.integer]) -> float:
        """Share of the look-ups that these rows serve, in ``[0, 1]``.

        Args:
            hot_rows: how many of the most looked-up rows are hot; or the ids of the hot rows, each once.

        A table without look-ups misses none: 1.0, whatever is hot. Look-ups that are attributed to no row count as
        misses unless all rows are hot.

        Raises:
            ProfileError: a negative number of rows; or ids that are no integers, that the table does not have, or twice
                the same.
        """
        if isinstance(hot_rows, np.ndarray):
            hits, number = self._lookups_of(hot_rows), hot_rows.size
        else:
            number = self._row_number(hot_rows)
            above = np.cumsum(self.histogram.rows)
            whole = int(np.searchsorted(above, number, side="right"))
            hits = int(self.histogram.counts[:whole] @ self.histogram.rows[:whole])
            if whole < len(above):
                taken = int(above[whole - 1]) if whole else 0
                hits += (number - taken) * int(self.histogram.counts[whole])
        if self.lookups == 0 or number >= self.rows:
            return 1.0
        return hits / self.lookups

    def expected_distinct(self, lookups_in_batch: float) -> float:
        """Distinct rows that so many look-ups are expected to touch (SCARS, arXiv 2411.01611: look-ups drawn
        independently by these counts; real batches are correlated and touch fewer). 0 for a table without look-ups."""
        return expected_distinct(*self.probabilities, lookups_in_batch)

    @property
    def cacheability(self) -> float:
        """Area under the curve of look-ups missed over the share of rows that are hot, the most looked-up first.

        0: one row takes all look-ups (or there are none); 0.5: all rows take alike. TorchRec's own figure, over the
        distinct rows of a batch and its LRU cache, is that of :meth:`AccessProfile.statistics`.
        """
        chances, rows = self.probabilities
        left = 1.0 - np.cumsum(chances * rows)
        before = np.concatenate([[1.0], left[:-1]])
        return float(((before + left) / 2) @ rows / self.rows) if self.lookups else 0.0

    # ----------------------------------------------------------------------------------------------------- rows

    def counts_of(self, begin: int, end: int) -> Counts:
        """Access counts of the rows ``[begin, end)``, ``[end - begin]``: a view of dense counts, else a new array.

        Raises:
            ProfileError: the range is not within the table.
        """
        if not 0 <= begin <= end <= self.rows:
            raise self._error(f"rows [{begin}, {end}) were asked for; give a range within [0, {self.rows})")
        if self.ids is None:
            return self.counts[begin:end]
        low, high = np.searchsorted(self.ids, [begin, end])
        counts = np.zeros(end - begin, dtype=self.counts.dtype)
        counts[self.ids[low:high] - begin] = self.counts[low:high]
        return counts

    def top_rows(self, number: int) -> npt.NDArray[np.int64]:
        """The ``number`` most looked-up rows (all, where the table has no more), int64, ascending. Of rows with equal
        counts the lowest come first. Found by the histogram's threshold: no sort.

        Raises:
            ProfileError: the number is negative.
        """
        number = min(self._row_number(number), self.rows)
        if number == self.rows:
            return np.arange(self.rows, dtype=np.int64)
        if number == 0:
            return np.empty(0, dtype=np.int64)
        above = np.cumsum(self.histogram.rows)
        place = int(np.searchsorted(above, number))
        least = int(self.histogram.counts[place])
        ties = number - (int(above[place - 1]) if place else 0)
        if least == 0 and self.ids is not None:
            used = self.ids[self.counts > 0]
            # Of the first ties + len(used) rows at least `ties` are unused.
            unused = np.setdiff1d(np.arange(min(self.rows, ties + len(used))), used, assume_unique=True)
            return np.sort(np.concatenate([used, unused[:ties]]))
        parts: list[npt.NDArray[np.int64]] = []
        for begin in range(0, len(self.counts), _CHUNK):
            part = self.counts[begin : begin + _CHUNK]
            found = np.flatnonzero(part >= least if ties else part > least)
            tied = np.flatnonzero(part[found] == least)
            if len(tied) > ties:
                found = np.delete(found, tied[ties:])
            ties -= min(ties, len(tied))
            parts.append(found + begin)
        places = np.concatenate(parts)
        return places if self.ids is None else self.ids[places]

    # -------------------------------------------------------------------------------------- arithmetic, equality

    def merged(self, other: TableAccess) -> TableAccess:
        """The counts of both. Sparse if both are.

        Raises:
            ProfileError: the tables differ in name, rows, dimension or bytes.
        """
        for field in ("name", "rows", "embedding_dim", "element_size", "optimizer_bytes"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise self._error(f"{field} is {mine!r} here and {theirs!r} in the other; merge counts of one table")
        largest = sum(int(one.counts.max(initial=0)) for one in (self, other))
        dtype = np.int32 if largest <= _INT32_MAX else np.int64
        ids: npt.NDArray[np.int64] | None = None
        counts: Counts
        if self.ids is not None and other.ids is not None:
            ids = np.union1d(self.ids, other.ids)
            counts = np.zeros(len(ids), dtype=dtype)
            counts[np.searchsorted(ids, self.ids)] = self.counts
            counts[np.searchsorted(ids, other.ids)] += other.counts.astype(dtype)
        elif self.ids is None and other.ids is None:
            counts = np.add(self.counts, other.counts, dtype=dtype)
        else:
            dense, sparse = (self, other) if self.ids is None else (other, self)
            counts = dense.counts.astype(dtype)
            counts[sparse.ids] += sparse.counts.astype(dtype)
        return replace(
            self,
            counts=counts,
            ids=ids,
            lookups=self.lookups + other.lookups,
            recurrence=_both(self.recurrence, other.recurrence),
        )

    def followed_by(self, later: TableAccess, samples: tuple[int, int] = (1, 1)) -> TableAccess:
        """The counts of both, and what this window said of the later one; see :meth:`AccessProfile.followed_by`.

        Args:
            later: the window after this one.
            samples: how long this window and the later one are; default: equally long. Nothing is learnt from windows
                of no samples.

        Raises:
            ProfileError: as :meth:`merged`.
        """
        together = self.merged(later)
        if min(samples) < 1:
            return together
        if self.ids is None and later.ids is None:
            learnt = Recurrence.of(self.counts, later.counts, samples=samples)
        else:
            listed, _ = together.looked_up()
            others = self.rows - len(listed)
            learnt = Recurrence.of(self._counts_at(listed), later._counts_at(listed), others, samples)
        # In place of what either had learnt within itself: of shorter windows, where a count is another rate.
        return replace(together, recurrence=learnt)

    def worth(self, histogram: CountHistogram) -> npt.NDArray[np.float64] | None:
        """What a row of each class of the histogram (of this table, or a part of it) can expect in as much traffic as
        was counted, float64 ``[m]``, never rising; None where only one window was measured, and its counts are all that
        is known."""
        return None if self.recurrence is None else self.recurrence.values(histogram, self.lookups)

    def decayed(self, factor: float) -> TableAccess:
        """Counts and look-ups times ``factor`` in ``[0, 1]``, rounded: what is rounded away stays among ``lookups``.

        Raises:
            ProfileError: the factor is not in that range.
        """
        if not 0 <= factor <= 1:
            raise self._error(f"the decay factor is {factor!r}; give a number in [0, 1]")
        counts = np.empty_like(self.counts)
        for begin in range(0, len(counts), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            counts[part] = np.rint(self.counts[part] * factor)
        lookups = max(round(self.lookups * factor), int(counts.sum(dtype=np.int64)))
        return replace(self, counts=counts, lookups=lookups)

    def __eq__(self, other: object) -> bool:
        """Same table, same count of every row and same look-ups; whether dense or sparse, int32 or int64, is alike."""
        if not isinstance(other, TableAccess):
            return NotImplemented
        fields = ("name", "rows", "embedding_dim", "lookups", "element_size", "optimizer_bytes", "recurrence")
        if any(getattr(self, field) != getattr(other, field) for field in fields):
            return False
        if self.ids is None and other.ids is None:
            return np.array_equal(self.counts, other.counts)
        (mine, my_counts), (theirs, their_counts) = self.looked_up(), other.looked_up()
        return np.array_equal(mine, theirs) and np.array_equal(my_counts, their_counts)

    def looked_up(self) -> tuple[npt.NDArray[np.int64], Counts]:
        """The rows with a count above 0, int64 ascending, and their counts."""
        places = np.flatnonzero(self.counts)
        return (places if self.ids is None else self.ids[places]), self.counts[places]

    def _counts_at(self, rows: npt.NDArray[np.int64]) -> Counts:
        """Of rows given ascending."""
        if self.ids is None:
            return self.counts[rows]
        counts = np.zeros(len(rows), dtype=self.counts.dtype)
        _, here, there = np.intersect1d(rows, self.ids, assume_unique=True, return_indices=True)
        counts[here] = self.counts[there]
        return counts

    def __repr__(self) -> str:
        form = "dense" if self.ids is None else f"sparse, {len(self.ids)} rows listed"
        return f"TableAccess({self.name!r}: {self.rows} x {self.embedding_dim}, {self.lookups} look-ups, {form})"

    # --------------------------------------------------------------------------------------------------- checks

    def _check_counts(self) -> None:
        counts = self.counts
        if not isinstance(counts, np.ndarray) or counts.dtype not in (np.int32, np.int64) or counts.ndim != 1:
            what = f"{counts.dtype} {counts.shape}" if isinstance(counts, np.ndarray) else type(counts).__name__
            raise self._error(f"the counts are {what}; give a one-dimensional numpy array of int32 or int64")
        if self.ids is None and len(counts) != self.rows:
            raise self._error(f"there are {len(counts)} counts for {self.rows} rows; give one a row, or their ids")
        if len(counts) and counts.min() < 0:
            raise self._error(
                f"row {self._id_at(int(counts.argmin()))} has a count of {counts.min()}; counts are 0 or more "
                "(an int32 count overflows above 2^31 - 1: count in int64)"
            )
        object.__setattr__(self, "counts", _read_only(counts))

    def _check_ids(self) -> None:
        ids = self.ids
        if ids is None:
            return
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.shape != self.counts.shape:
            what = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
            raise self._error(f"the ids are {what}; give a numpy array of int64 {self.counts.shape}, one a count")
        if len(ids) and (ids[0] < 0 or ids[-1] >= self.rows):
            bad = ids[0] if ids[0] < 0 else ids[-1]
            raise self._error(f"id {bad} is not a row of the table; ids are 0 to {self.rows - 1}")
        if (places := np.flatnonzero(ids[1:] <= ids[:-1])).size:
            at = int(places[0])
            raise self._error(f"id {ids[at + 1]} follows {ids[at]}; give the ids ascending, each once")
        object.__setattr__(self, "ids", _read_only(ids))

    def _id_at(self, place: int) -> int:
        return place if self.ids is None or place >= len(self.ids) else int(self.ids[place])

    def _row_number(self, number: int) -> int:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise self._error(f"{number!r} hot rows were asked for; give an integer of at least 0, or an array of ids")
        return int(number)

    def _lookups_of(self, rows: npt.NDArray[np.integer]) -> int:
        if rows.dtype.kind not in "iu" or rows.ndim != 1:
            raise self._error(
                f"the hot rows are {rows.dtype} {rows.shape}; give their ids as a one-dimensional numpy array of "
                "integers (for none, np.empty(0, np.int64))"
            )
        rows = np.sort(rows)
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.rows):
            raise self._error(f"hot row {rows[0] if rows[0] < 0 else rows[-1]} is not in [0, {self.rows})")
        if (twice := np.flatnonzero(rows[1:] == rows[:-1])).size:
            raise self._error(f"hot row {rows[twice[0]]} is given twice; give each hot row once")
        if self.ids is None:
            return int(self.counts[rows].sum(dtype=np.int64))
        return int(self.counts[np.isin(self.ids, rows, assume_unique=True)].sum(dtype=np.int64))

    def _error(self, text: str) -> ProfileError:
        return ProfileError(f"table {self.name!r}: {text}")


def _both(one: Recurrence | None, other: Recurrence | None) -> Recurrence | None:
    return one.merged(other) if one is not None and other is not None else one if one is not None else other


def _read_only(array: npt.NDArray) -> npt.NDArray:
    """A view that cannot be written: the histogram of it is kept."""
    view = array.view()
    view.flags.writeable = False
    return view
