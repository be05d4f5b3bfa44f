"""FAE's calibrator (arXiv 2103.00686): how many rows are hot, estimated from samples of inputs and of rows.

FAE calls a row hot if it takes at least ``t`` percent of its table's accesses, and looks for the ``t`` whose hot rows
fit a budget, with two economies for tables too large to count: accesses are counted on a sample of the inputs, and rows
over the threshold on a few random chunks of the table, whose mean gets a confidence interval. Tables under 1 MB are hot
whole. :class:`AccessProfile` knows the exact answer as well, so both stand side by side here.

Chunks are runs of neighbouring rows, as in the paper: where ids are sorted by popularity the few chunks that hold the
hot rows are easily missed, and the interval with them. Hashed ids are what it is made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.profile import AccessProfile
from torchrec_slipstream.access.student import t_quantile
from torchrec_slipstream.access.table import TableAccess
from torchrec_slipstream.budget import format_bytes, parse_bytes
from torchrec_slipstream.errors import ProfileError

# The paper's parameters.
CHUNKS = 35
CHUNK_ROWS = 1024
CONFIDENCE = 0.999
SMALL_TABLE = "1MB"
BUDGET = "512MB"

# Halvings of log t: enough that t is found to 12 digits.
_HALVINGS = 60


@dataclass(frozen=True)
class TableEstimate:
    """The hot rows of one table, estimated and exact.

    Attributes:
        rows: of the table.
        whole: the table is small and hot whole; nothing was estimated.
        least_count: H, the look-ups counted *in the sample* from which a row is hot (0 for a whole table). It need not
            be whole; printed is the least count that reaches it.
        hot_rows: estimated hot rows: the mean of the drawn chunks times the chunks of the table.
        low, high: interval of ``hot_rows`` at the confidence that was asked for, within ``[0, rows]``.
        exact_rows: rows that reach H, counted over the whole table.
        row_bytes: bytes of a row with its optimizer state.
    """

    rows: int
    whole: bool
    least_count: float
    hot_rows: float
    low: float
    high: float
    exact_rows: int
    row_bytes: int

    @property
    def covers(self) -> bool:
        """Whether the exact number is in the interval."""
        return self.low <= self.exact_rows <= self.high

    @property
    def hot_bytes(self) -> float:
        """Estimated bytes of the hot rows."""
        return self.hot_rows * self.row_bytes


@dataclass(frozen=True)
class Calibration:
    """What the calibrator found.

    Attributes:
        percent: t, the share of a table's look-ups, in percent, from which a row is hot.
        sampled_percent: x, the share of the inputs that were counted, in percent.
        confidence: of the intervals.
        budget: bytes that the estimate had to fit.
        tables: by name.
    """

    percent: float
    sampled_percent: float
    confidence: float
    budget: int
    tables: Mapping[str, TableEstimate]

    @property
    def hot_bytes(self) -> float:
        """Estimated bytes of all hot rows; at most the budget."""
        return sum(one.hot_bytes for one in self.tables.values())

    @property
    def exact_bytes(self) -> int:
        """Bytes of the rows that reach the threshold, counted."""
        return sum(one.exact_rows * one.row_bytes for one in self.tables.values())

    def __str__(self) -> str:
        width = max(map(len, ["all tables", *self.tables]))
        level = f"{self.confidence:.1%} interval"
        lines = [f"{'table':<{width}}  {'rows':>13}  {'count':>9}  {'hot rows':>11}  {level:>25}  {'exact':>11}"]
        for name, one in self.tables.items():
            interval = "whole" if one.whole else f"{one.low:,.0f} to {one.high:,.0f}{'' if one.covers else ' !'}"
            lines.append(
                f"{name:<{width}}  {one.rows:>13,}  {math.ceil(one.least_count):>9,}  {one.hot_rows:>11,.0f}"
                f"  {interval:>25}  {one.exact_rows:>11,}"
            )
        lines.append(
            f"t = {self.percent:.4g}% of a table's look-ups, {self.sampled_percent:g}% of the inputs counted: "
            f"{format_bytes(self.hot_bytes)} estimated, {format_bytes(self.exact_bytes)} exact, "
            f"of {format_bytes(self.budget)}"
        )
        return "\n".join(lines)


def least_hot_count(percent: float, lookups: float, sampled_percent: float = 100.0) -> float:
    """H: look-ups counted in a sample of the inputs from which a row is hot.

    Args:
        percent: t, in percent of the table's look-ups.
        lookups: T, look-ups of the table in *all* inputs.
        sampled_percent: x, the share of the inputs that is counted, in percent.

    The paper's example: t = 0.01%, 60.5 million look-ups, x = 5% give 302.5.
    """
    return percent / 100 * lookups * sampled_percent / 100


def calibrate(
    profile: AccessProfile,
    budget: int | str = BUDGET,
    *,
    chunks: int = CHUNKS,
    chunk_rows: int = CHUNK_ROWS,
    confidence: float = CONFIDENCE,
    small_table: int | str = SMALL_TABLE,
    seed: int = 0,
) -> Calibration:
    """Find the smallest threshold t whose hot rows, as estimated from random chunks, fit a budget.

    Args:
        profile: counts of a sample of the inputs (``AccessProfile.measure(..., every=20)`` is the paper's 5%) or of
            all of them; ``sampled_every`` says which.
        budget: L, bytes for hot rows with their optimizer state: a whole number or a string such as ``"512MB"``.
        chunks: n, chunks drawn from each table without replacement; a table that has no more is counted whole.
        chunk_rows: m, neighbouring rows in a chunk.
        confidence: of the intervals, in (0, 1).
        small_table: tables whose weights take less are hot whole.
        seed: of the draw. The same chunks serve every t that is tried, so the estimate falls as t rises.

    Raises:
        ProfileError: a number out of range; or the small tables alone exceed the budget.
        ConfigError: a size that is none.
    """
    if chunks < 2 or chunk_rows < 1 or not 0 < confidence < 1:
        raise ProfileError(
            f"chunks={chunks!r} has to be at least 2, chunk_rows={chunk_rows!r} at least 1 and "
            f"confidence={confidence!r} in (0, 1)"
        )
    limit, small = parse_bytes(budget), parse_bytes(small_table)
    random = np.random.default_rng(seed)
    drawn = [_Drawn(table, small, chunks, chunk_rows, random) for table in profile.tables.values()]
    whole = sum(one.table.rows * one.table.row_bytes for one in drawn if one.whole)
    if whole > limit:
        raise ProfileError(
            f"the tables of less than {format_bytes(small)}, which are hot whole, take {format_bytes(whole)}, "
            f"{format_bytes(whole - limit)} more than the budget of {format_bytes(limit)}; give at least that, or a "
            "smaller small_table"
        )

    def estimate(percent: float) -> float:
        return sum(one.hot_rows(percent) * one.table.row_bytes for one in drawn)

    # Below `low` every row that was looked up is hot, above `high` none can be.
    low, high = 50 / max([1, *(one.table.lookups for one in drawn)]), 101.0
    if estimate(low) <= limit:
        high = low
    for _ in range(_HALVINGS if high > low else 0):
        middle = math.sqrt(low * high)
        if estimate(middle) <= limit:
            high = middle
        else:
            low = middle
    return Calibration(
        percent=high,
        sampled_percent=100 / profile.sampled_every,
        confidence=confidence,
        budget=limit,
        tables={one.table.name: one.result(high, confidence, profile.sampled_every) for one in drawn},
    )


class _Drawn:
    """A table with the chunks that were drawn from it."""

    def __init__(
        self, table: TableAccess, small: int, chunks: int, chunk_rows: int, random: np.random.Generator
    ) -> None:
        self.table = table
        self.whole = table.rows * table.embedding_dim * table.element_size < small
        self.number = -(-table.rows // chunk_rows)
        self.drawn = min(chunks, self.number)
        self._chunks: list[npt.NDArray[np.integer]] = []
        if not self.whole:
            for place in np.sort(random.choice(self.number, self.drawn, replace=False)):
                counts = table.counts_of(place * chunk_rows, min((place + 1) * chunk_rows, table.rows))
                self._chunks.append(np.sort(counts[counts > 0]))

    def hot_by_chunk(self, percent: float) -> npt.NDArray[np.float64]:
        """Rows of each drawn chunk that reach the threshold, ``[drawn]``."""
        least = least_hot_count(percent, self.table.lookups)
        return np.array([len(chunk) - int(np.searchsorted(chunk, least)) for chunk in self._chunks], np.float64)

    def hot_rows(self, percent: float) -> float:
        """Estimated hot rows of the table."""
        return float(self.table.rows if self.whole else self.hot_by_chunk(percent).sum() * self.number / self.drawn)

    def result(self, percent: float, confidence: float, sampled_every: int) -> TableEstimate:
        table = self.table
        if self.whole:
            return TableEstimate(table.rows, True, 0.0, table.rows, table.rows, table.rows, table.rows, table.row_bytes)
        found, hot = self.hot_by_chunk(percent), self.hot_rows(percent)
        half = 0.0
        if self.drawn < self.number:
            # The variance of a mean of n drawn from N without replacement.
            variance = (self.number - self.drawn) / self.number * found.var(ddof=1) / self.drawn
            half = t_quantile((1 + confidence) / 2, self.drawn - 1) * math.sqrt(variance) * self.number
        # The profile's counts are scaled to all inputs, and so is this; H is told as counted in the sample.
        least = least_hot_count(percent, table.lookups)
        histogram = table.histogram
        exact = int(histogram.rows[(histogram.counts >= least) & (histogram.counts > 0)].sum())
        return TableEstimate(
            rows=table.rows,
            whole=False,
            least_count=least_hot_count(percent, table.lookups, 100 / sampled_every),
            hot_rows=hot,
            low=max(0.0, hot - half),
            high=min(float(table.rows), hot + half),
            exact_rows=exact,
            row_bytes=table.row_bytes,
        )
