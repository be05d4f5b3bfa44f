"""The hit rate at any byte budget, over tables of different row sizes: rows are taken by look-ups a byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.table import TableAccess


@dataclass(frozen=True, eq=False)
class HitCurve:
    """Hit rate over bytes: what a plot draws.

    Attributes:
        bytes: int64 ``[n]``, budgets, ascending.
        hit_rate: float64 ``[n]``, share of the look-ups that the hot rows of that budget serve.
    """

    bytes: npt.NDArray[np.int64]
    hit_rate: npt.NDArray[np.float64]


class BudgetCurve:
    """All tables' rows in the order in which a budget buys them: by look-ups a byte, the exact greedy.

    Built from the tables' histograms, so its size is that of all their different counts together. Rows are taken whole;
    it ends at the first that does not fit, so that it never leaves out a row denser than one it takes.
    """

    def __init__(self, tables: Sequence[TableAccess]) -> None:
        self.total_bytes = sum(table.rows * table.row_bytes for table in tables)
        self.lookups = sum(table.lookups for table in tables)
        self._names = [table.name for table in tables]
        which = [np.full(len(table.histogram.counts), i) for i, table in enumerate(tables)]
        self._table = np.concatenate([*which, np.empty(0, np.int64)])
        self._counts = _joined([table.histogram.counts for table in tables])
        self._rows = _joined([table.histogram.rows for table in tables])
        self._row_bytes = np.array([table.row_bytes for table in tables], np.int64)[self._table]
        looked_up = self._counts > 0
        order = np.lexsort((self._table, -(self._counts / self._row_bytes)))
        order = order[looked_up[order]]
        self._table, self._counts, self._rows = self._table[order], self._counts[order], self._rows[order]
        self._row_bytes = self._row_bytes[order]
        # Running totals with a 0 before the first.
        self._bytes = np.concatenate([[0], np.cumsum(self._rows * self._row_bytes)])
        self._hits = np.concatenate([[0], np.cumsum(self._rows * self._counts)])

    def hit_rate(self, budgets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Share of the look-ups served at each budget, float64 ``[n]``, from int64 bytes ``[n]``. 1.0 where there are
        no look-ups at all, and where everything fits."""
        place = np.searchsorted(self._bytes, budgets, side="right") - 1
        hits = self._hits[place].astype(np.float64)
        inside = np.flatnonzero(place < len(self._rows))
        part = place[inside]
        hits[inside] += (budgets[inside] - self._bytes[part]) // self._row_bytes[part] * self._counts[part]
        return np.where((budgets >= self.total_bytes) | (self.lookups == 0), 1.0, hits / max(1, self.lookups))

    def hot_rows(self, budget: int) -> Mapping[str, int]:
        """How many rows of each table are hot at the budget, those without any look-up left out."""
        place = int(np.searchsorted(self._bytes, budget, side="right")) - 1
        rows = np.bincount(self._table[:place], weights=self._rows[:place], minlength=len(self._names)).astype(np.int64)
        if place < len(self._rows):
            rows[self._table[place]] += (budget - int(self._bytes[place])) // int(self._row_bytes[place])
        return {name: int(number) for name, number in zip(self._names, rows, strict=True)}

    def sampled(self, points: int) -> HitCurve:
        """The curve at so many budgets (2 or more): 0, and evenly on a logarithmic scale from one row to all rows."""
        least = max(1, int(self._row_bytes.min(initial=self.total_bytes)))
        budgets = np.geomspace(least, max(least, self.total_bytes), points - 1).round().astype(np.int64)
        budgets[-1] = self.total_bytes
        budgets = np.unique(np.concatenate([[0], budgets]))
        return HitCurve(budgets, self.hit_rate(budgets))


def _joined(parts: list[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return np.concatenate([*parts, np.empty(0, np.int64)])
