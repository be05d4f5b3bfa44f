"""Counts ids as they come: a count a row for tables of ordinary size, the rows met so far for huge or unknown ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.table import Counts

_INT32_MAX = 2**31 - 1
# Tables up to this many rows get a count for every row at once (64 MB as int32).
_DENSE_ROWS = 1 << 24
# Look-ups gathered before they are sorted into the rows met so far, at the least.
_PENDING = 1 << 20


class Tally:
    """The access counts of one table while they are being taken.

    Args:
        rows: rows of the table; ids are below it, which the caller has checked. None: one more than the largest id.
    """

    def __init__(self, rows: int | None) -> None:
        self.rows = rows
        self._dense: Counts | None = None
        if rows is not None and rows <= _DENSE_ROWS:
            self._dense = np.zeros(rows, dtype=np.int32)
        self._ids: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._counts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._pending: list[npt.NDArray[np.int64]] = []
        self._pending_lookups = 0
        # No row's count is above this.
        self._bound = 0

    def add(self, ids: npt.NDArray[np.integer]) -> None:
        """Count a look-up for each of the ids, ``[n]``, duplicates and all."""
        places = ids.astype(np.int64, copy=False)
        if self._dense is None:
            self._pending.append(places)
            self._pending_lookups += len(ids)
            # Sorting costs about as much as what it is merged with, so wait for as much.
            if self._pending_lookups > max(_PENDING, len(self._ids)):
                self._settle()
            return
        self._bound += len(ids)
        if self._bound > _INT32_MAX and self._dense.dtype == np.int32:
            self._bound = int(self._dense.max()) + len(ids)
            if self._bound > _INT32_MAX:
                self._dense = self._dense.astype(np.int64)
        np.add.at(self._dense, places, self._dense.dtype.type(1))

    def finish(self, scale: int = 1) -> tuple[int, Counts, npt.NDArray[np.int64] | None]:
        """Rows of the table, counts times ``scale``, and their ids where they are not those of all rows.

        Few rows used of a large table come as ids and counts, else there is a count a row, whichever is smaller.
        """
        if self._dense is not None:
            return len(self._dense), _scaled(self._dense, scale), None
        self._settle()
        rows = self.rows if self.rows is not None else int(self._ids[-1]) + 1 if len(self._ids) else 1
        counts = _scaled(self._counts, scale)
        # An id takes 8 bytes and a count 4.
        if 3 * len(self._ids) < rows:
            return rows, counts, self._ids
        dense = np.zeros(rows, dtype=counts.dtype)
        dense[self._ids] = counts
        return rows, dense, None

    def _settle(self) -> None:
        if not self._pending:
            return
        ids, counts = np.unique(np.concatenate(self._pending), return_counts=True)
        self._pending, self._pending_lookups = [], 0
        both = np.union1d(self._ids, ids)
        total = np.zeros(len(both), dtype=np.int64)
        total[np.searchsorted(both, self._ids)] = self._counts
        total[np.searchsorted(both, ids)] += counts
        self._ids, self._counts = both, total


def _scaled(counts: Counts, scale: int) -> Counts:
    """Counts times ``scale``, int32 where that holds them."""
    fits = int(counts.max(initial=0)) * scale <= _INT32_MAX
    if scale == 1 and (counts.dtype == np.int32) == fits:
        return counts
    scaled: Counts = counts.astype(np.int32 if fits else np.int64)
    scaled *= scale
    return scaled
