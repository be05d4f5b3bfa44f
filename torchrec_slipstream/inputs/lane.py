"""Samples of one kind, on their way from input batches into full ones."""

from __future__ import annotations

from collections import deque
from typing import Any

from torchrec_slipstream.inputs.batches import Piece, joined, size_of


class Lane:
    """A queue of samples of one rank.

    Attributes:
        samples: how many there are.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._pieces: deque[Piece] = deque()

    def add(self, batch: Any) -> None:
        """Append the samples of a batch."""
        if samples := size_of(batch):
            self._pieces.append(Piece(batch, 0, samples))
            self.samples += samples

    def take(self, samples: int) -> Any:
        """Remove the first ``samples`` (1 to all), as one batch; an input batch that is just they comes as it is."""
        taken = []
        self.samples -= samples
        while samples:
            piece = self._pieces.popleft()
            if piece.samples > samples:
                cut = piece.begin + samples
                self._pieces.appendleft(Piece(piece.batch, cut, piece.end))
                piece = Piece(piece.batch, piece.begin, cut)
            taken.append(piece)
            samples -= piece.samples
        return _whole(taken)

    def take_last(self, samples: int) -> Any:
        """Remove the last ``samples`` (1 to all), as one batch: the first have waited longer, and go out next."""
        taken: deque[Piece] = deque()
        self.samples -= samples
        while samples:
            piece = self._pieces.pop()
            if piece.samples > samples:
                cut = piece.end - samples
                self._pieces.append(Piece(piece.batch, piece.begin, cut))
                piece = Piece(piece.batch, cut, piece.end)
            taken.appendleft(piece)
            samples -= piece.samples
        return _whole(list(taken))

    def all(self) -> Any | None:
        """All samples as one batch, which stay; None where there are none."""
        return _whole(list(self._pieces)) if self._pieces else None


def _whole(pieces: list[Piece]) -> Any:
    piece = pieces[0]
    return piece.batch if len(pieces) == 1 and piece.samples == size_of(piece.batch) else joined(pieces)
