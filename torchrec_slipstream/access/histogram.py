"""How many rows of a table were looked up how often: all that allocation and forecasts need of its counts.

A table of 10^7 rows has a few thousand different counts, so what works on the histogram does not feel the table's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

# Counts below this are tallied by np.bincount, the few above by sorting them.
_SMALL = 1 << 16
# Rows at a time, so that the int64 copy which np.bincount makes stays small.
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class CountHistogram:
    """Rows by access count, the most looked-up first.

    Attributes:
        counts: int64 ``[m]``, the different access counts, descending. The last may be 0.
        rows: int64 ``[m]``, how many rows have each count; all positive.
    """

    counts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @classmethod
    def of(cls, counts: npt.NDArray[np.integer], untouched: int = 0) -> CountHistogram:
        """The histogram of the access ``counts`` of some rows (integers of any size), and of ``untouched`` further
        rows with a count of 0."""
        small = np.zeros(_SMALL, dtype=np.int64)
        large: list[npt.NDArray[np.int64]] = []
        for begin in range(0, len(counts), _CHUNK):
            part = counts[begin : begin + _CHUNK]
            is_large = part >= _SMALL
            if is_large.any():
                large.append(part[is_large].astype(np.int64))
                part = part[~is_large]
            tally = np.bincount(part, minlength=1)
            small[: len(tally)] += tally
        small[0] += untouched
        values = np.flatnonzero(small)[::-1]
        rows = small[values]
        if large:
            high, high_rows = np.unique(np.concatenate(large), return_counts=True)
            values, rows = np.concatenate([high[::-1], values]), np.concatenate([high_rows[::-1], rows])
        return cls(values.astype(np.int64), rows.astype(np.int64))

    @cached_property
    def total_rows(self) -> int:
        """Rows of the table, or of the part of it that was counted."""
        return int(self.rows.sum())

    @cached_property
    def lookups(self) -> int:
        """Look-ups of all rows."""
        return int(self.counts @ self.rows)
