"""Batches between the stream and their training step."""

from __future__ import annotations

from collections import deque
from typing import Any

from torchrec_slipstream.errors import InputError

_MOST_AHEAD = 64  # TorchRec's pipelines read 2 to 4 batches ahead


class HandedOut:
    """Batches that were handed out and that no training step has confirmed: a pipeline reads some ahead, and a resumed
    run has to train on them again.

    Attributes:
        batches: the oldest first.
    """

    def __init__(self) -> None:
        self.batches: deque[Any] = deque()
        self._forgets = False

    def add(self, batch: Any) -> None:
        """Raises InputError where nobody seems to confirm any."""
        if len(self.batches) == _MOST_AHEAD:
            raise InputError(
                f"{_MOST_AHEAD} batches were handed out, and no training step was reported for them; call the "
                "session's step() after the training step of each batch"
            )
        if not self._forgets:
            self.batches.append(batch)

    def confirm(self) -> None:
        """The oldest was trained on, if there is one."""
        if self.batches:
            self.batches.popleft()

    def forget(self) -> None:
        """Keep none from now on."""
        self._forgets = True
        self.batches.clear()
