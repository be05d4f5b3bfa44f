"""The most looked-up rows of a table that is too large to count, in bounded memory.

The sketch is Apache DataSketches' ``frequent_items_sketch`` (a Misra-Gries summary, Anderson et al., IMC 2017). Fed
with the distinct rows of a batch it took 0.27 us a row where ``count_min_sketch`` took 0.35, found as many of the hot
rows in a quarter of the bytes, and it lists the rows, which a count-min sketch would have to be asked for one by one.

Rows are spread by hash over small sketches of 768 rows instead of one large one. It finds as much and costs 10% more
time, but it makes a resumed run equal an uninterrupted one: to make room, a sketch subtracts the median of the first
1024 counts in its memory's order, which is the median of all, and so no matter of order, where there are fewer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_slipstream.access.counters import coins, halved
from torchrec_slipstream.errors import AttachError

# Rows that a small sketch holds: three quarters of its 2^10 places.
PART_ROWS = 768
_LOG2_PLACES = 10
_SPREAD = np.uint64(0x9E3779B97F4A7C15)

Int64s = npt.NDArray[np.int64]


class RowSketch:
    """Look-ups of the most looked-up rows of one table (or of a rank's shard of it).

    Args:
        rows: how many rows to list at most; rounded down to a multiple of 768.

    Attributes:
        total: look-ups that were added, after decay.

    Raises:
        AttachError: datasketches is not installed.
    """

    def __init__(self, rows: int) -> None:
        try:
            import datasketches
        except ImportError as error:
            raise AttachError(
                "counting look-ups by a sketch needs datasketches: pip install datasketches. "
                "Or count every row: AccessConfig(counter='sampled', sketch_tables=(), max_counted_rows=None)."
            ) from error
        self._make = lambda: datasketches.frequent_items_sketch(_LOG2_PLACES)
        self._all = datasketches.frequent_items_error_type.NO_FALSE_NEGATIVES
        self._parts: list[Any] = [self._make() for _ in range(max(1, rows // PART_ROWS))]
        # What was subtracted before the small sketches were last rebuilt.
        self._errors = np.zeros(len(self._parts))
        self.total = 0.0

    def add(self, rows: Tensor) -> None:
        """Count one look-up of each of ``rows`` (int ``[n]``, numbered within the shard). Waits for the device."""
        # numpy's sort takes a third of torch's time.
        self._feed(*np.unique(rows.cpu().long().numpy(), return_counts=True))
        self.total += rows.numel()

    def halve(self, seed: int, first: int) -> None:
        """Halve all counts, as :meth:`RowCounts.halve` does, and what may be missing of them."""
        rows, counts = self.items()
        errors = (self._errors + self._subtracted()) / 2
        kept = halved(torch.from_numpy(counts), coins(torch.from_numpy(rows) + first, seed)).numpy()
        self._rebuild(rows[kept > 0], kept[kept > 0], errors, self.total / 2)

    def items(self) -> tuple[Int64s, Int64s]:
        """The rows that the sketch lists (int64 ``[n]``, ascending) and their counts (int64 ``[n]``, at least 1).

        No count is too large, none is too small by more than :attr:`error`, and rows that are not listed have at most
        that; but for the coins of :meth:`halve`, which are right on average.
        """
        found = [(item[0], item[2]) for part in self._parts for item in part.get_frequent_items(self._all, 0)]
        pairs = np.array([pair for pair in found if pair[1] > 0], dtype=np.int64).reshape(-1, 2)
        pairs = pairs[pairs[:, 0].argsort()]
        return pairs[:, 0].copy(), pairs[:, 1].copy()

    @property
    def error(self) -> float:
        """How many look-ups of a row may be missing from its count."""
        return float((self._errors + self._subtracted()).max())

    @property
    def nbytes(self) -> int:
        """Bytes that it holds, about: 18 for every place, and a Python int for every row that it lists."""
        listed = sum(part.num_active_items for part in self._parts)
        return len(self._parts) * 2**_LOG2_PLACES * 18 + listed * 32

    # ------------------------------------------------------------------------------------------- its state

    def state(self) -> dict[str, Tensor]:
        """Its rows and counts, and what each small sketch has subtracted; a sketch loaded from it goes on alike."""
        rows, counts = self.items()
        return {
            "sketch.rows": torch.from_numpy(rows),
            "sketch.counts": torch.from_numpy(counts),
            "sketch.errors": torch.from_numpy(self._errors + self._subtracted()),
            "sketch.total": torch.tensor(self.total, dtype=torch.float64),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` of a sketch of the same size gave."""
        rows, counts, errors = (state[f"sketch.{name}"].cpu().numpy() for name in ("rows", "counts", "errors"))
        self._rebuild(rows, counts, errors, float(state["sketch.total"]))

    # ------------------------------------------------------------------------------------------- the parts

    def _rebuild(self, rows: Int64s, counts: Int64s, errors: npt.NDArray[np.float64], total: float) -> None:
        self._parts = [self._make() for _ in self._parts]
        self._errors = errors.copy()
        self._feed(rows, counts)
        self.total = total

    def _feed(self, rows: Int64s, counts: Int64s) -> None:
        """Add distinct rows with their counts, in ascending order: it says which rows are there to be subtracted."""
        part_of = (rows.astype(np.uint64) * _SPREAD >> np.uint64(33)).astype(np.int64) % len(self._parts)
        order = part_of.argsort(kind="stable")
        row_list, count_list = rows[order].tolist(), counts[order].tolist()
        begin = 0
        ends = np.bincount(part_of, minlength=len(self._parts)).cumsum().tolist()
        for part, end in zip(self._parts, ends, strict=True):
            update = part.update
            for row, count in zip(row_list[begin:end], count_list[begin:end], strict=True):
                update(row, count)
            begin = end

    def _subtracted(self) -> npt.NDArray[np.float64]:
        """By small sketch, what it has subtracted from every count: its bounds of a row that is not there."""
        return np.array([part.get_upper_bound(-1) for part in self._parts], dtype=np.float64)
