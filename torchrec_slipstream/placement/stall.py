"""Whether to re-plan now, and how many bytes may move, for training to wait no longer than a share of its time."""

from __future__ import annotations

from time import perf_counter

# A first move is made to learn what moving costs: of so many chunks.
_PROBE_CHUNKS = 4
# Aimed at, of the share that is allowed: what one re-plan costs is only known when it is over.
_AIM = 0.9
# Weight of the past in what was learnt.
_DECAY = 0.8
# Least part of a move's mean cost that is put down to its bytes: times are noisy.
_LEAST_SLOPE = 0.1


class StallLimit:
    """Keeps what re-plans took, to decide and to move, within a share of the time since the session began.

    To decide costs what it did last. A move costs something for itself and something a byte, both learnt by least
    squares from the moves made. What is not spent is saved up, so that a limit below what one re-plan costs makes
    re-plans rare instead of ending them.

    Args:
        share: of run time, in ``(0, 1]``; None: no limit.
        chunk_bytes: what is copied at a time.
    """

    def __init__(self, share: float | None, chunk_bytes: int) -> None:
        self._share = share
        self._probe = float(_PROBE_CHUNKS * chunk_bytes)
        # Faded sums over the moves: 1, bytes, seconds, bytes^2, bytes * seconds.
        self._sums: tuple[float, ...] = (0.0,) * 5
        self._spent = 0.0
        self._decision = 0.0
        self._has_decided = False
        self._began = perf_counter()

    def restart(self) -> None:
        """Begin to save up now."""
        self._spent, self._began = 0.0, perf_counter()

    @property
    def _saved(self) -> float:
        assert self._share is not None
        return _AIM * self._share * (perf_counter() - self._began) - self._spent

    def can_decide(self) -> bool:
        """Whether it may be decided now what should move."""
        return self._share is None or self._saved >= self._decision

    def decided(self, seconds: float) -> None:
        """Learn from a decision. The first is not charged: it pays for memory that is touched for the first time."""
        if self._has_decided:
            self._spent += seconds
            self._decision = seconds
        self._has_decided = True

    def affordable_bytes(self) -> float:
        """Bytes that may move now."""
        if self._share is None:
            return float("inf")
        moves, bytes_, seconds, squares, products = self._sums
        if moves == 0.0:
            return self._probe
        mean = seconds / bytes_
        spread = moves * squares - bytes_ * bytes_
        slope = (moves * products - bytes_ * seconds) / spread if spread > 1e-6 * bytes_ * bytes_ else mean
        slope = min(max(slope, _LEAST_SLOPE * mean), mean)
        for_itself = (seconds - slope * bytes_) / moves
        saved = self._saved - self._decision  # this one's, which is not over
        # Half of it at least should go into bytes.
        return (saved - for_itself) / slope if saved > 2.0 * for_itself else 0.0

    def moved(self, bytes_: int, seconds: float) -> None:
        """Learn from a move."""
        self._spent += seconds
        if bytes_:
            new = (1.0, float(bytes_), seconds, float(bytes_) ** 2, bytes_ * seconds)
            self._sums = tuple(_DECAY * old + one for old, one in zip(self._sums, new, strict=True))
