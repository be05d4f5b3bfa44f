"""How far traffic has moved between two profiles, and what a placement made from the older one still serves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.histogram import CountHistogram
from torchrec_slipstream.access.table import TableAccess
from torchrec_slipstream.errors import ProfileError

if TYPE_CHECKING:
    from torchrec_slipstream.access.profile import AccessProfile

# Rows compared at a time, where a table is dense.
_CHUNK = 1 << 22
# Variance from which a binomial's mean deviation is the normal's to 1e-6: logarithms of factorials lose as much.
_NORMAL = 1e6


@dataclass(frozen=True)
class TableDrift:
    """How far the traffic of one table, or of all, moved.

    Attributes:
        total_variation: half the sum over rows of the difference of the shares of look-ups, in ``[0, 1]``: the share
            of look-ups that would have to go elsewhere. 1 where one profile has no look-ups and the other has.
        by_chance: total variation to expect of two samples of such sizes of *one* traffic. With few look-ups a row it
            is large; only what exceeds it has moved.
        hit_rate: share of the later look-ups that the rows hottest in the *earlier* profile serve.
        best_hit_rate: the same of the rows hottest in the later one, which nobody could know.
    """

    total_variation: float
    by_chance: float
    hit_rate: float
    best_hit_rate: float

    @property
    def regret(self) -> float:
        """Share of the later look-ups that a new choice of hot rows would win."""
        return self.best_hit_rate - self.hit_rate


@dataclass(frozen=True)
class Drift:
    """Drift of all look-ups together, and by table; hit rates at the budget (bytes) that was asked for."""

    overall: TableDrift
    tables: Mapping[str, TableDrift]
    budget: int

    def __str__(self) -> str:
        width = max(map(len, ["all tables", *self.tables]))
        lines = [f"{'':<{width}}  {'moved':>6}  {'chance':>6}  {'hits':>6}  {'best':>6}  {'regret':>6}"]
        for name, one in [*self.tables.items(), ("all tables", self.overall)]:
            cells = (one.total_variation, one.by_chance, one.hit_rate, one.best_hit_rate, one.regret)
            lines.append(f"{name:<{width}}  " + "  ".join(f"{cell:>6.1%}" for cell in cells))
        return "\n".join(lines)


def drift(earlier: AccessProfile, later: AccessProfile, budget: int | float | str) -> Drift:
    """Compare two profiles of the same tables; see :class:`Drift`.

    Args:
        earlier: its hottest rows are taken to be hot.
        later: the traffic that they have to serve.
        budget: bytes of fast memory, as for :meth:`AccessProfile.hit_rate`.

    Raises:
        ProfileError: the profiles have different tables, or tables of different sizes.
    """
    if earlier.tables.keys() != later.tables.keys():
        lone = sorted(earlier.tables.keys() ^ later.tables.keys())
        raise ProfileError(
            f"only one of the two profiles has table(s) {', '.join(map(repr, lone))}; select(names) first"
        )
    hot, best = earlier.hot_rows(budget), later.hot_rows(budget)
    # Look-ups were seen in bundles where only every k-th batch was counted.
    bundle = max(earlier.sampled_every, later.sampled_every)
    all_totals = (_counted(earlier), _counted(later))
    tables: dict[str, TableDrift] = {}
    moved = chance = hits = best_hits = 0.0
    for name, before in earlier.tables.items():
        after = later[name]
        if (before.rows, before.row_bytes) != (after.rows, after.row_bytes):
            raise ProfileError(
                f"table {name!r} has {before.rows} rows of {before.row_bytes} bytes in one profile and {after.rows} of "
                f"{after.row_bytes} in the other; compare profiles of the same tables"
            )
        own, shared = _variations(before, after, all_totals, bundle)
        served, servable = after.hit_rate(before.top_rows(hot[name])), after.hit_rate(best[name])
        tables[name] = TableDrift(*own, served, servable)
        moved, chance = moved + shared[0], chance + shared[1]
        hits, best_hits = hits + served * after.lookups, best_hits + servable * after.lookups
    if (all_totals[0] == 0) != (all_totals[1] == 0):
        moved, chance = 1.0, 0.0
    served, servable = (hits / later.lookups, best_hits / later.lookups) if later.lookups else (1.0, 1.0)
    overall = TableDrift(min(1.0, moved), min(1.0, chance), served, servable)
    return Drift(overall, tables, earlier.budget_bytes(budget))


def _counted(profile: AccessProfile) -> int:
    return sum(table.counted_lookups for table in profile.tables.values())


def _variations(
    before: TableAccess, after: TableAccess, all_totals: tuple[int, int], bundle: int
) -> list[tuple[float, float]]:
    """Total variation, and what chance alone makes of it, as shares of the table's look-ups and of all look-ups."""
    totals = [(before.counted_lookups, after.counted_lookups), all_totals]
    moved = [0.0, 0.0]
    pooled: Counter[int] = Counter()
    for old, new in _pairs(before, after):
        for i, (a, b) in enumerate(totals):
            moved[i] += float(np.abs(old / max(1, a) - new / max(1, b)).sum()) / 2
        histogram = CountHistogram.of(old.astype(np.int64) + new)
        pooled.update(dict(zip(histogram.counts.tolist(), histogram.rows.tolist(), strict=True)))
    result = []
    for i, (a, b) in enumerate(totals):
        if not a or not b:
            result.append((float(a != b) if i == 0 else 0.0, 0.0))
            continue
        # Given how often both saw a row, how many of those the first saw is binomial.
        deviation = sum(rows * _mean_deviation(round(count / bundle), a / (a + b)) for count, rows in pooled.items())
        result.append((min(1.0, moved[i]), min(1.0, bundle * deviation * (1 / a + 1 / b) / 2)))
    return result


def _pairs(before: TableAccess, after: TableAccess) -> Iterator[tuple[npt.NDArray, npt.NDArray]]:
    """Counts of the same rows in both, part by part; rows that neither lists may be left out."""
    if before.ids is not None and after.ids is not None:
        ids = np.union1d(before.ids, after.ids)
        both = np.zeros((2, len(ids)), dtype=np.int64)
        both[0, np.searchsorted(ids, before.ids)] = before.counts
        both[1, np.searchsorted(ids, after.ids)] = after.counts
        yield both[0], both[1]
        return
    for begin in range(0, before.rows, _CHUNK):
        end = min(begin + _CHUNK, before.rows)
        yield before.counts_of(begin, end), after.counts_of(begin, end)


def _mean_deviation(number: int, chance: float) -> float:
    """Mean distance of a binomial from its mean (De Moivre's closed form; the normal's, where it is as good)."""
    if number == 0 or not 0 < chance < 1:
        return 0.0
    variance = number * chance * (1 - chance)
    if variance > _NORMAL:
        return math.sqrt(2 / math.pi * variance)
    above = math.floor(number * chance) + 1
    if above > number:  # only where number * chance was rounded up to number
        return 0.0
    log = (
        math.lgamma(number + 1)
        - math.lgamma(above + 1)
        - math.lgamma(number - above + 1)
        + above * math.log(chance)
        + (number - above + 1) * math.log1p(-chance)
    )
    return 2 * above * math.exp(log)
