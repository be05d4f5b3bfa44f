"""What a table's access counts forecast: the distinct rows of a batch, and the misses of a cache (TorchRec's form).

Look-ups are taken as drawn independently by the counts, as SCARS does (arXiv 2411.01611). Real batches are correlated,
so what is measured is a little lower; `benchmarks/placement.py` puts both side by side.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torchrec.distributed.types import CacheStatistics

from torchrec_slipstream.access.histogram import CountHistogram
from torchrec_slipstream.errors import ProfileError

POLICIES = ("lru", "static")
# Points of the miss-rate curve whose area is the cacheability.
_CURVE_POINTS = 128

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def row_probabilities(histogram: CountHistogram, lookups: int) -> tuple[Floats, Ints]:
    """Chance that one look-up goes to one row, by class of rows, the likeliest first.

    Look-ups that the counts do not attribute are spread evenly over the rows without a count, which is where a sketch
    lost them; over all rows, where every row has a count.

    Returns:
        float64 ``[m]`` and the rows of each class, int64 ``[m]``. The chances of all rows add up to 1, or are 0 where
        there was no look-up.
    """
    counts, rows = histogram.counts.astype(np.float64), histogram.rows
    if lookups == 0:
        return np.zeros(len(rows)), rows
    if lost := lookups - histogram.lookups:
        if counts[-1] == 0:
            counts[-1] = lost / int(rows[-1])
        else:
            counts += lost / histogram.total_rows
        order = np.argsort(-counts, kind="stable")
        counts, rows = counts[order], rows[order]
    return counts / lookups, rows


def expected_distinct(chances: Floats, rows: Ints, lookups: float) -> float:
    """Distinct rows among ``lookups`` independent look-ups: ``sum over rows of 1 - (1 - p)^n`` (SCARS)."""
    return float(_occurs(chances, lookups) @ rows)


def _occurs(chances: Floats, lookups: float) -> Floats:
    """Chance that a row occurs among so many look-ups, ``1 - (1 - p)^n``, exact for the smallest ``p``."""
    if lookups <= 0:
        return np.zeros(len(chances))
    with np.errstate(divide="ignore"):  # a row that takes all look-ups: log(0), and a chance of 1
        return -np.expm1(lookups * np.log1p(-np.minimum(chances, 1.0)))


class AccessStatistics(CacheStatistics):
    """``CacheStatistics`` of one table from its measured access counts, for TorchRec's planner.

    It holds classes of rows only (some thousand numbers), so that it can be copied and sent as often as planners do.
    Give it to a table with ``ParameterConstraints(cache_params=CacheParams(stats=...))``.

    Args:
        chances: float64 ``[m]``, chance that a look-up goes to a row of the class, descending.
        rows: int64 ``[m]``, rows of each class.
        lookups: look-ups of the table in one global batch.
        policy: ``"lru"``, FBGEMM's cache, the only one that TorchRec's proposer supports; or ``"static"``, where the
            most looked-up rows are pinned.

    Raises:
        ProfileError: the policy is not known, or lookups is negative.
    """

    def __init__(self, chances: Floats, rows: Ints, lookups: float, policy: str = "lru") -> None:
        if policy not in POLICIES:
            raise ProfileError(f"policy={policy!r} is not known; give one of {', '.join(POLICIES)}")
        if not lookups >= 0:
            raise ProfileError(f"lookups={lookups!r} of a batch; give a number of at least 0")
        used = chances > 0
        self.policy = policy
        self.lookups = float(lookups)
        self.rows = int(rows.sum())
        self._class_rows = rows[used].astype(np.float64)
        self._used_rows = int(rows[used].sum())
        # log(1 - p), finite where one row takes all look-ups.
        self._log_others = np.log1p(-np.minimum(chances[used], 1 - 1e-15))
        # Expected distinct rows of a batch, by class.
        self._distinct = -np.expm1(self.lookups * self._log_others) * self._class_rows

    @property
    def expected_lookups(self) -> float:
        """Distinct rows expected in one global batch: what TorchRec calls cache look-ups."""
        return float(self._distinct.sum())

    def expected_miss_rate(self, clf: float) -> float:
        """Share of a batch's distinct rows that are not in a cache of ``clf`` times the table's rows, in ``[0, 1]``.

        1.0 at ``clf`` = 0 and below, 0.0 at 1 and above, and monotone between.

        With the LRU policy a row is in the cache if it occurred in the last T look-ups, where T is such that as many
        distinct rows as the cache holds are expected in them (Che et al., "Hierarchical Web Caching Systems", 2002).
        """
        if clf <= 0:
            return 1.0
        held = clf * self.rows
        if clf >= 1 or held >= self._used_rows or not self._distinct.any():
            return 0.0
        return self._static_miss_rate(held) if self.policy == "static" else self._lru_miss_rate(self._window(held))

    @cached_property
    def cacheability(self) -> float:
        """Area under ``expected_miss_rate`` over ``clf`` from 0 to 1: 0 is easy to cache, 1 is hard."""
        if not self._distinct.any():
            return 0.0
        if self.policy == "static":
            held = np.cumsum(self._class_rows)
            miss = 1.0 - np.cumsum(self._distinct) / self._distinct.sum()
        else:
            windows = np.geomspace(1e-2, self._window(self._used_rows * (1 - 1e-6)), _CURVE_POINTS)
            absent = [np.exp(window * self._log_others) for window in windows]
            held = self._used_rows - np.array([self._class_rows @ one for one in absent])
            miss = np.array([self._distinct @ one for one in absent]) / self.expected_lookups
        held, miss = np.concatenate([[0.0], held]), np.concatenate([[1.0], miss])
        return float(np.clip(np.trapezoid(miss, held) / self.rows, 0.0, 1.0))

    def _static_miss_rate(self, held: float) -> float:
        full = np.cumsum(self._class_rows)
        place = int(np.searchsorted(full, held, side="right"))
        missed = float(self._distinct[place:].sum())
        inside = held - (float(full[place - 1]) if place else 0.0)
        missed -= float(self._distinct[place]) * inside / float(self._class_rows[place])
        return min(1.0, max(0.0, missed / self.expected_lookups))

    def _lru_miss_rate(self, window: float) -> float:
        absent = np.exp(window * self._log_others)
        return min(1.0, float(self._distinct @ absent) / self.expected_lookups)

    def _window(self, held: float) -> float:
        """Look-ups until ``held`` distinct rows are expected, which must be fewer than are used at all.

        Newton's steps from 0: what is held grows ever slower, so they come near from below and never pass.
        """
        window = 0.0
        for _ in range(200):
            absent = np.exp(window * self._log_others) * self._class_rows
            missing = held - (self._used_rows - float(absent.sum()))
            step = missing / -float(absent @ self._log_others)
            window += max(0.0, step)
            if step <= 1e-12 * window:
                break
        return window

    def __deepcopy__(self, memo: dict[int, object]) -> AccessStatistics:
        # TorchRec copies its proposals over and over, and these never change.
        return self

    def __repr__(self) -> str:
        return (
            f"AccessStatistics(policy={self.policy!r}, rows={self.rows}, lookups={self.lookups:g}, "
            f"expected_lookups={self.expected_lookups:g}, cacheability={self.cacheability:.3f})"
        )


def checked_batch(batch_size: float) -> float:
    if isinstance(batch_size, bool) or not batch_size > 0 or not math.isfinite(batch_size):
        raise ProfileError(f"batch_size={batch_size!r}; give the global batch's samples, a number above 0")
    return float(batch_size)
