"""What a row's past look-ups are worth tomorrow: what rows looked up so often in one window had in the next.

Access counts say what was. In one table a row looked up ten times comes back, in another (sessions, new items) it never
does; and of rows seen once, some tables see half again and others none. Where traffic is so, rows of equal counts are
not worth the same, and a placement by counts alone fills fast memory with what has gone by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.histogram import CountHistogram
from torchrec_slipstream.errors import ProfileError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Rows at a time: bounds the memory besides the counts.
_CHUNK = 1 << 22
# Counts below this are a class each, those above by binary logarithm, 16 classes an octave.
_SMALL = 1 << 12
_OCTAVE = 16
_CLASSES = _SMALL + _OCTAVE * 64


@dataclass(frozen=True, eq=False)
class Recurrence:
    """Tallies of two consecutive windows of one table's traffic, by how often rows were looked up in the first.

    Held-out estimation, as of word frequencies (Jelinek and Mercer, 1980): what rows with a count of c had in the next
    window, on average, is taken for what such rows will have in the one to come.

    Attributes:
        classes: int64 ``[k]``, ascending: classes of rows by their count in the earlier window.
        rows: int64 ``[k]``, how many rows each class has; all positive.
        earlier: int64 ``[k]``, their look-ups in the earlier window.
        later: int64 ``[k]``, and in the later one.
        pairs: how many pairs of windows are added up in this; best of about equal lengths, as rows go by counts.
        earlier_samples: how long the earlier windows were together, in samples or any unit that all share.
        later_samples: and the later ones. Nothing was learnt where either is 0.
    """

    classes: Ints
    rows: Ints
    earlier: Ints
    later: Ints
    pairs: int = 1
    earlier_samples: int = 1
    later_samples: int = 1

    @classmethod
    def of(
        cls,
        earlier: npt.NDArray[np.integer],
        later: npt.NDArray[np.integer],
        others: int = 0,
        samples: tuple[int, int] = (1, 1),
    ) -> Recurrence:
        """From the access counts of the same rows, ``[n]`` each, and ``others`` more rows that neither window touched.

        ``samples``: how long the earlier and the later window were.

        Raises:
            ProfileError: the windows have different numbers of rows.
        """
        if len(earlier) != len(later):
            raise ProfileError(f"the windows have {len(earlier)} and {len(later)} rows; give two profiles of one table")
        rows, before, after = (np.zeros(_CLASSES, dtype=np.int64) for _ in range(3))
        rows[0] = others
        for begin in range(0, len(earlier), _CHUNK):
            counts = earlier[begin : begin + _CHUNK].astype(np.int64)
            following = later[begin : begin + _CHUNK].astype(np.int64)
            place = counts
            if int(counts.max(initial=0)) >= _SMALL:
                above = _SMALL + (_OCTAVE * np.log2(np.maximum(counts, _SMALL) / _SMALL)).astype(np.int64)
                place = np.where(counts < _SMALL, counts, above)
            rows += np.bincount(place, minlength=_CLASSES)
            np.add.at(before, place, counts)
            np.add.at(after, place, following)
        classes = np.flatnonzero(rows)
        return cls(classes, rows[classes], before[classes], after[classes], 1, int(samples[0]), int(samples[1]))

    def merged(self, other: Recurrence) -> Recurrence:
        """The experience of both."""
        classes = np.union1d(self.classes, other.classes)
        rows, earlier, later = (np.zeros(len(classes), dtype=np.int64) for _ in range(3))
        for one in (self, other):
            places = np.searchsorted(classes, one.classes)
            rows[places] += one.rows
            earlier[places] += one.earlier
            later[places] += one.later
        return Recurrence(
            classes,
            rows,
            earlier,
            later,
            self.pairs + other.pairs,
            self.earlier_samples + other.earlier_samples,
            self.later_samples + other.later_samples,
        )

    def values(self, histogram: CountHistogram, lookups: int) -> Floats:
        """The look-ups that a row of each class of the histogram can expect in as much traffic to come as was counted.

        So they compare with plain counts, and a row that goes on as before is worth its count. Of a row with C of all
        ``lookups``, an earlier window's share of C is taken for its count there; what such rows had in the later window
        is taken per sample. Averages are made to rise with the count by pooling neighbours that do not; between them
        they are linear, beyond them proportional. Where nothing was learnt, rows are worth their counts.

        Args:
            histogram: access counts of the table or a part of it, over any number of windows.
            lookups: of the whole table, in what the histogram counts.

        Returns:
            float64 ``[m]``, never rising with the histogram's classes, in the unit of ``lookups``.
        """
        seen = int(self.earlier.sum()) + int(self.later.sum())
        if not seen or not lookups or min(self.earlier_samples, self.later_samples) < 1:
            return histogram.counts.astype(np.float64)
        mean = self.earlier / self.rows
        worth = _rising(self.later / self.rows, self.rows) * (self.earlier_samples / self.later_samples)
        # Look-ups of an earlier window, on average; by length, as traffic may have come or gone between the two.
        a_window = seen * (self.earlier_samples / (self.earlier_samples + self.later_samples)) / self.pairs
        counts = histogram.counts * (a_window / lookups)
        values = np.interp(counts, mean, worth)
        beyond = counts > mean[-1]
        values[beyond] = worth[-1] * counts[beyond] / max(float(mean[-1]), 0.5)
        return np.minimum.accumulate(values) * (lookups / a_window)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recurrence):
            return NotImplemented
        names = ("classes", "rows", "earlier", "later", "pairs", "earlier_samples", "later_samples")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


def _rising(means: Floats, weights: Ints) -> Floats:
    """The closest means that never fall, by weighted squares: neighbours that do are pooled."""
    pooled: list[tuple[float, float, int]] = []
    for mean, weight in zip(means.tolist(), weights.tolist(), strict=True):
        length = 1
        while pooled and pooled[-1][0] >= mean:
            other, other_weight, other_length = pooled.pop()
            mean = (mean * weight + other * other_weight) / (weight + other_weight)
            weight += other_weight
            length += other_length
        pooled.append((mean, weight, length))
    return np.repeat([mean for mean, _, _ in pooled], [length for _, _, length in pooled])
