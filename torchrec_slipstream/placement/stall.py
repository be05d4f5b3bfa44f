"""How many bytes of rows may move now, for training to wait no longer than a share of its run time."""

from __future__ import annotations

from time import perf_counter

# A first move is made to learn what moving costs: of so many chunks.
_PROBE_CHUNKS = 4
# Weight of the past in what was learnt.
_DECAY = 0.8
# Least part of a move's mean cost that is put down to its bytes: times are noisy.
_LEAST_SLOPE = 0.1


class StallLimit:
    """Keeps what moving rows took within a share of the time since the session began.

    A move costs something for itself and something a byte, both learnt by least squares from the moves made. What is
    not spent is saved up, so that a limit below the cost of a small move makes moves rare instead of ending them.

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
        self._began = perf_counter()

    def restart(self) -> None:
        """Begin to save up now."""
        self._spent, self._began = 0.0, perf_counter()

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
        saved = self._share * (perf_counter() - self._began) - self._spent
        # Half of it at least should go into bytes.
        return (saved - for_itself) / slope if saved > 2.0 * for_itself else 0.0

    def moved(self, bytes_: int, seconds: float) -> None:
        """Learn from a move."""
        self._spent += seconds
        if bytes_:
            new = (1.0, float(bytes_), seconds, float(bytes_) ** 2, bytes_ * seconds)
            self._sums = tuple(_DECAY * old + one for old, one in zip(self._sums, new, strict=True))
