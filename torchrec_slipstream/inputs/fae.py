"""FAE's order of inputs (arXiv 2103.00686): hot and cold ones never share a batch, and the batches take turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.config import FaeInputs
from torchrec_slipstream.errors import StateError
from torchrec_slipstream.inputs.batches import kjts_of, size_of
from torchrec_slipstream.inputs.choice import Choice
from torchrec_slipstream.inputs.rows import RowSets

COLD, HOT = 0, 1
"""The lanes."""

# Least and largest rate, in percent.
_LEAST_RATE, _MOST_RATE = 1.0, 100.0
_NONE = -1
_SAVED = ("rate", "falls", "loss", "lane", "quota", "sizes", "left")


class FaeSelector:
    """Deals samples into cold and hot batches, and drops none.

    A sample is hot if all its look-ups are of hot rows, also one without look-ups. A hot batch looks up hot rows only:
    with the same rows in an overlay, the backing TBE gets no look-up of it. Where re-plans change the overlay, samples
    read afterwards go by its new rows; those read before keep the lane that they got.

    Args:
        hot: the hot rows of all tables (``inputs/hot.py``); or what says which they are now, a collective call.
        changes: how often they have changed so far, the same on all ranks. After each change ``hot`` is asked anew.
    """

    lanes = 2
    weighs = False

    def __init__(self, hot: RowSets | Callable[[], RowSets], changes: Callable[[], int] = lambda: 0) -> None:
        self._ask_hot = hot if callable(hot) else lambda: hot
        self._changes = changes
        self._seen = changes()
        self.hot = self._ask_hot()

    def choose(self, batch: Any) -> Choice:
        """Keep all; lane 1 for hot samples, 0 for the others."""
        return Choice(
            keep=torch.ones(size_of(batch), dtype=torch.bool),
            lane=self.hot.samples(kjts_of(batch)).all_inside.to(torch.uint8).cpu(),
        )

    def step(self, steps: int) -> None:
        """Follow the hot rows, if they have changed."""
        if (changes := self._changes()) != self._seen:
            self._seen, self.hot = changes, self._ask_hot()

    def state_dict(self) -> dict[str, Any]:
        """A checksum of the hot rows, which a resumed run finds by itself."""
        return {"selector": "fae", "hot": self.hot.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the hot rows are the same.

        Raises:
            StateError: they are not, or the state is of another selector.
        """
        if state.get("selector") != "fae":
            raise StateError(f"this is the state of another selector ({state.get('selector')!r}), not of FAE's")
        if state.get("hot") != self.hot.digest:
            raise StateError(
                "the saved state was made with other hot rows; resume with the profile or placement of that run"
            )


class ShuffleScheduler:
    """Deals out a window's batches in turns: cold first, then hot, then cold again, a share of each lane at each turn.

    A turn takes ``rate`` percent of the window's batches of its lane, rounded up, so at 100 all cold batches go before
    all hot ones, and at 1 they mix as finely as they can. After each swap of lanes the test loss is asked for. If it
    did not fall, the rate is halved (not below 1); if it fell ``patience`` times in a row, it is doubled (not above
    100), and falls are counted anew. The first loss has none before it and changes nothing. One that is NaN did not
    fall, and the next is compared with the one before it. A lane that is used up takes no more turns; there is no swap
    then, and no loss is asked for. Every window starts cold, where it has cold batches; from the last lane of one
    window or epoch to the first of the next is a swap like any other.

    The model that is tested is a few steps behind the batch that is dealt out, as a pipeline reads ahead.

    Args:
        config: the window, and the rate and patience to begin with.
        test_loss: the model's loss on test data; called on all ranks at once, from inside the iterator. None: the rate
            stays.
        total: sums a float64 tensor over the ranks, so that all go by the mean of their losses.
    """

    def __init__(
        self,
        config: FaeInputs,
        test_loss: Callable[[], float] | None = None,
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.window = config.window
        self.rate = float(config.rate)
        self._patience = config.patience
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

    def begin(self) -> None:
        """Drop what is left of a window that was broken off. The rate, loss and falls stay, and which lane was last."""
        self._quota, self._sizes, self._left = 0, [], []

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
                self.rate, self._falls = min(_MOST_RATE, 2 * self.rate), 0
        else:
            self.rate, self._falls = max(_LEAST_RATE, self.rate / 2), 0

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
