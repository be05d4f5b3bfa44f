"""FAE's shuffle scheduler (arXiv 2103.00686): how often cold and hot batches take turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.errors import ConfigError, StateError

FLOOR, CAP = 1.0, 100.0
"""Least and largest rate, in percent."""

_NONE = -1
_SAVED = ("rate", "falls", "loss", "lane", "quota", "sizes", "left")


class ShuffleScheduler:
    """Deals out a window's batches in turns: cold first, then hot, then cold again, a share of each lane at each turn.

    A turn takes ``rate`` percent of the window's batches of its lane, rounded up, so at 100 all cold batches go before
    all hot ones, and at 1 they mix as finely as they can. After each swap of lanes the test loss is asked for. If it
    did not fall, the rate is halved (not below 1); if it fell ``patience`` times in a row, it is doubled (not above
    100), and falls are counted anew. The first loss has none before it and changes nothing. One that is NaN did not
    fall, and the next is compared with the one before it. A lane that is used up takes no more turns; there is no swap
    then, and no loss is asked for. Every window starts cold, where it has cold batches.

    The model that is tested is a few steps behind the batch that is dealt out, as a pipeline reads ahead.

    Args:
        window: input batches a rank to a window; see :class:`Scheduler`. FAE's is an epoch.
        rate: R, in percent, in [1, 100], at first.
        patience: u, falls in a row that double the rate.
        test_loss: the model's loss on test data; called on all ranks at once, from inside the iterator. None: the rate
            stays.
        total: sums a float64 tensor over the ranks, so that all go by the mean of their losses.

    Raises:
        ConfigError: a number is out of its range.
    """

    def __init__(
        self,
        window: int,
        rate: float = 50.0,
        patience: int = 4,
        test_loss: Callable[[], float] | None = None,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        if window < 1 or patience < 1 or not FLOOR <= rate <= CAP:
            raise ConfigError(
                f"window={window!r} and patience={patience!r} must be integers of at least 1, rate={rate!r} a number "
                "in [1, 100]"
            )
        self.window = window
        self.rate = float(rate)
        self._patience = patience
        self._test_loss = test_loss
        self._total = total
        self._falls = 0
        self._loss: float | None = None
        # Of the lane whose turn it is, the batches still to go in this turn.
        self._lane = _NONE
        self._quota = 0
        # Of the window, the batches of each lane: all, and those that are to come.
        self._sizes: list[int] = []
        self._left: list[int] = []

    def next(self, waiting: Sequence[int]) -> int:
        """The lane of the next batch; asks for the test loss where that begins a new turn of another lane."""
        if not any(self._left):
            self._sizes, self._left = [0] * len(waiting), [0] * len(waiting)
            self._quota = 0
            lane = self._turn_of(waiting, after=len(waiting) - 1)
        elif self._quota == 0 or not waiting[self._lane]:
            lane = self._turn_of(waiting, after=self._lane)
        else:
            lane = self._lane
        # All of a new window; within one, what came besides: the epoch's short batches.
        self._sizes = [size + now - left for size, now, left in zip(self._sizes, waiting, self._left, strict=True)]
        self._left = list(waiting)
        if lane != self._lane:
            self._swap_to(lane)
        if self._quota == 0:
            self._quota = max(1, math.ceil(self.rate * self._sizes[lane] / 100))
        self._quota -= 1
        self._left[lane] -= 1
        return lane

    def _turn_of(self, waiting: Sequence[int], *, after: int) -> int:
        """The next lane after that which has batches; the same again if no other has."""
        lanes = len(waiting)
        return next(lane for k in range(1, lanes + 1) if waiting[lane := (after + k) % lanes])

    def _swap_to(self, lane: int) -> None:
        is_first = self._lane == _NONE
        self._lane, self._quota = lane, 0
        if self._test_loss is not None and not is_first:
            both = torch.tensor([self._test_loss(), 1.0], dtype=torch.float64)
            loss, ranks = self._total(both).tolist()
            self.observe(loss / ranks)

    def observe(self, loss: float) -> None:
        """Take in the test loss after a swap."""
        before = self._loss
        if not math.isnan(loss):
            self._loss = loss
        if before is None:
            return
        if loss < before:
            self._falls += 1
            if self._falls == self._patience:
                self.rate, self._falls = min(CAP, 2 * self.rate), 0
        else:
            self.rate, self._falls = max(FLOOR, self.rate / 2), 0

    def state_dict(self) -> dict[str, Any]:
        """The rate, the last loss and falls, and where in its window it is."""
        values = (self.rate, self._falls, self._loss, self._lane, self._quota, self._sizes[:], self._left[:])
        return {"scheduler": "shuffle", **dict(zip(_SAVED, values, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            StateError: the state is of another scheduler.
        """
        if state.get("scheduler") != "shuffle" or any(name not in state for name in _SAVED):
            raise StateError(
                f"this is the state of another scheduler ({state.get('scheduler')!r}) or cut short; resume with the "
                "same inputs method"
            )
        self.rate, self._falls, self._loss, self._lane, self._quota = (state[name] for name in _SAVED[:5])
        self._sizes, self._left = list(state["sizes"]), list(state["left"])
