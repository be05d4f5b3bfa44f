"""Compaction: some look-ups of one batch (the live ones, the hot ones), and how to cut a batch down to them.

Kept free of FBGEMM: it takes the mask of the look-ups to keep and ordinary tensors. On a CPU their positions are found
at once. On a GPU that would stall the host until the device has counted them, so the count travels to pinned
memory behind an event while the forward goes on, and is read only when the backward asks for it, long after. Until
then the kept look-ups can be had with padding behind them, in tensors as long as the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Compaction:
    """Positions of the live look-ups of one batch.

    Args:
        live: bool ``[N]``, one entry a look-up; True where its row is updated.
        offsets: int ``[bags + 1]``, non-decreasing, ``offsets[0] == 0`` and ``offsets[-1] <= N``.

    Attributes:
        mask: ``live``.
    """

    def __init__(self, live: Tensor, offsets: Tensor) -> None:
        self._offsets = offsets
        self.mask = live
        if live.device.type == "cpu":
            self._positions = positions_of(live)
            self._count: int | None = self._positions.numel()
            self._running = _complete_cumsum(live, offsets.dtype)
            return
        self._running = _complete_cumsum(live, torch.int64)
        # Live look-up number k goes to slot k; every stale one goes to one spare slot at the end. Slots that nobody
        # goes to keep a position that can be read.
        slots = torch.where(live, self._running[:-1], live.numel())
        self._positions = torch.zeros(live.numel() + 1, dtype=torch.int64, device=live.device)
        self._positions.scatter_(0, slots, torch.arange(live.numel(), device=live.device))
        self._count = None
        self._pinned = torch.empty(1, dtype=torch.int64, pin_memory=True)
        self._pinned.copy_(self._running[-1:], non_blocking=True)
        self._counted = torch.cuda.Event()
        self._counted.record()

    @property
    def count(self) -> int:
        """Number of live look-ups. On a GPU this waits for the copy begun in the constructor."""
        if self._count is None:
            self._counted.synchronize()
            self._count = int(self._pinned[0])
        return self._count

    @property
    def full_offsets(self) -> Tensor:
        """``[bags + 1]``, the offsets of the batch as a whole."""
        return self._offsets

    @property
    def lookups(self) -> int:
        """Number of look-ups of the batch as a whole."""
        return self._running.numel() - 1

    @property
    def positions(self) -> Tensor:
        """int64 ``[count]``, ascending positions of the live look-ups."""
        return self._positions.narrow(0, 0, self.count)

    @property
    def padded_positions(self) -> Tensor:
        """int64: :attr:`positions`, on a GPU with any positions behind them up to ``[N]``. Never waits."""
        return self._positions if self._count is not None else self._positions[:-1]

    @property
    def valid(self) -> Tensor | None:
        """bool ``[N]``, which of :attr:`padded_positions` are not padding; None on a CPU: all."""
        if self._running.device.type == "cpu":
            return None
        return torch.arange(self.lookups, device=self._running.device) < self._running[-1]

    @property
    def ranks(self) -> Tensor:
        """``[N]``, how many live look-ups precede each look-up."""
        return self._running[:-1]

    def take(self, values: Tensor) -> Tensor:
        """Entries (or rows) of ``values`` (``[N, ...]``) that belong to live look-ups, in order."""
        return values.index_select(0, self.positions)

    def offsets(self) -> Tensor:
        """``[bags + 1]`` in the dtype of the batch's offsets: bag boundaries among the live look-ups."""
        return self.live_before(self._offsets).to(self._offsets.dtype)

    def live_before(self, positions: Tensor) -> Tensor:
        """How many live look-ups precede each of ``positions`` (int, values in ``[0, N]``)."""
        return self._running.index_select(0, positions)

    def mean_factor(self) -> Tensor | None:
        """float32 ``[bags]``, live over full length of every bag; None where no bag is cut in part.

        Mean pooling divides a bag's gradient by its length, which compaction makes too short; multiplying the
        gradient by this factor first brings it back. A bag that is live or stale as a whole needs no factor (a
        factor of 1, or no look-up at all). On a GPU the factor is always given: to look would stall.
        """
        full = self._offsets.diff()
        live = self.offsets().diff()
        if live.device.type == "cpu" and not bool(((live != full) & (live > 0)).any()):
            return None
        # Empty and wholly stale bags get 1, so that no gradient becomes NaN or 0 for nothing.
        return torch.where(live > 0, live / full.clamp(min=1), 1.0).to(torch.float32)


def positions_of(mask: Tensor) -> Tensor:
    """int64, ascending positions of True in a 1-D bool tensor. Waits for the device."""
    if mask.device.type == "cpu":
        # numpy's flatnonzero is about ten times faster than torch.nonzero on one thread.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _complete_cumsum(live: Tensor, dtype: torch.dtype) -> Tensor:
    """Running count of True with a leading 0: ``[N + 1]``."""
    running = torch.empty(live.numel() + 1, dtype=dtype, device=live.device)
    running[0] = 0
    torch.cumsum(live, 0, dtype=dtype, out=running[1:])
    return running
