"""Where samples wait: for a full batch, and as batches for the training step that confirms them."""

from __future__ import annotations

from collections import deque
from typing import Any

from torchrec_slipstream.errors import InputError
from torchrec_slipstream.inputs.batches import Piece, joined, size_of

_MOST_AHEAD = 64  # TorchRec's pipelines read 2 to 4 batches ahead


class Lane:
    """A queue of samples of one kind, on their way from input batches into full ones.

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


class HandedOut:
    """Batches that were handed out and that no training step has confirmed: a pipeline reads some ahead, and a resumed
    run has to train on them again.

    Attributes:
        batches: the oldest first.
    """

    def __init__(self) -> None:
        self.batches: deque[Any] = deque()
        self._forgets = False

    def check_room(self) -> None:
        """Raises InputError where nobody seems to confirm any: ask before there is a batch that could be lost."""
        if len(self.batches) == _MOST_AHEAD:
            raise InputError(
                f"{_MOST_AHEAD} batches were handed out, and no training step was reported for them; call the "
                "session's step() after the training step of each batch"
            )

    def add(self, batch: Any) -> None:
        """Append the newest."""
        if not self._forgets:
            self.batches.append(batch)

    def confirm(self) -> None:
        """The oldest was trained on, if there is one."""
        if self.batches:
            self.batches.popleft()

    def clear(self) -> None:
        """Forget those that wait: nobody trains on them any more."""
        self.batches.clear()

    def forget(self) -> None:
        """Keep none from now on."""
        self._forgets = True
        self.clear()


def _whole(pieces: list[Piece]) -> Any:
    piece = pieces[0]
    return piece.batch if len(pieces) == 1 and piece.samples == size_of(piece.batch) else joined(pieces)
