"""What Slipstream's input skipping goes by, and what it reports (arXiv 2404.04270)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torchrec_slipstream.errors import ConfigError
from torchrec_slipstream.inputs.movement import MOVEMENTS
from torchrec_slipstream.inputs.search import Found


@dataclass(frozen=True, kw_only=True)
class SlipstreamKnobs:
    """What the method goes by. Defaults are the artefact's, where it has any.

    Attributes:
        drop_share: D, share of the hot inputs that the search aims at, in [0, 1).
        search_window: w, accepted distance from D, in [0, 1].
        stale_lookups: alpha, stale look-ups that an input needs, at least 1; None: all that it has (26 of 26).
        each_table: alpha counts in every table (the artefact's Taobao run), not over all look-ups.
        sample_share: i, share of the inputs read that are kept for the search, in (0, 1].
        start: training step before which the first snapshot is taken, counted from the first batch chosen from; at
            least 0.
        snapshot_steps: steps from it to the second, after which the search is, at least 1. The artefact's
            round(p * hot batches): see :func:`snapshot_steps_of`.
        again: steps from a first snapshot to the next; 0: once a run, as published; else more than ``snapshot_steps``.
        min_touches: look-ups between the snapshots that a row needs to be stale, at least 1.
        max_threshold: upper end of the search; None: the largest movement. (With ``per_table`` it has none.)
        movement: "plain", as published; "per_touch"; "relative": see :class:`Snapshot`.
        per_table: every table has a threshold of its own, below which the same share of its look-ups is.
        seed: of the sampling.
    """

    drop_share: float = 0.3
    search_window: float = 0.08
    stale_lookups: int | None = None
    each_table: bool = False
    sample_share: float = 0.01
    start: int = 0
    snapshot_steps: int = 100
    again: int = 0
    min_touches: int = 5
    max_threshold: float | None = 0.1
    movement: str = "plain"
    per_table: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        bad = [
            name
            for name, fits in {
                "drop_share": 0 <= self.drop_share < 1,
                "search_window": 0 <= self.search_window <= 1,
                "stale_lookups": self.stale_lookups is None or self.stale_lookups >= 1,
                "sample_share": 0 < self.sample_share <= 1,
                "start": self.start >= 0,
                "snapshot_steps": self.snapshot_steps >= 1,
                "again": self.again == 0 or self.again > self.snapshot_steps,
                "min_touches": self.min_touches >= 1,
                "max_threshold": self.max_threshold is None or self.max_threshold > 0,
                "movement": self.movement in MOVEMENTS,
            }.items()
            if not fits
        ]
        if bad:
            given = ", ".join(f"{name}={getattr(self, name)!r}" for name in bad)
            raise ConfigError(f"{given}: out of range; see SlipstreamKnobs for what each may be")


@dataclass(frozen=True)
class SlipstreamShares:
    """Inputs that a rank read (``+`` adds ranks).

    Attributes:
        inputs: all.
        remaining: those read while a set of stale rows was there.
        hot: of the remaining, those whose look-ups are all of hot rows.
        dropped: of the hot ones.
    """

    inputs: int = 0
    remaining: int = 0
    hot: int = 0
    dropped: int = 0

    @property
    def of_all(self) -> float:
        """Share of all inputs that was dropped."""
        return self.dropped / max(1, self.inputs)

    @property
    def of_remaining(self) -> float:
        """Share of the remaining inputs that was dropped."""
        return self.dropped / max(1, self.remaining)

    @property
    def of_hot(self) -> float:
        """Share of the remaining hot inputs that was dropped: what D is of."""
        return self.dropped / max(1, self.hot)

    def __add__(self, other: SlipstreamShares) -> SlipstreamShares:
        return SlipstreamShares(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Search:
    """One search: the step it was after, what it found, the threshold of each table, and the stale rows."""

    step: int
    found: Found
    thresholds: dict[str, float]
    stale_rows: int


def snapshot_steps_of(share: float, batches: int) -> int:
    """Steps between the snapshots: p times the input batches of an epoch, 1 at least.

    The artefact takes p of its *hot* batches, pure ones. Ours are mixed, and so many of them hold as many hot inputs.
    """
    return max(1, round(share * batches))
