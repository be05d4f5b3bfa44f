"""Compaction: some look-ups of one batch (the live ones, the hot ones), and how to cut a batch down to them.

Kept free of FBGEMM: it takes the mask of the look-ups to keep and ordinary tensors. There are two kinds. On a CPU the
positions are found at once (:class:`Counted`). On a GPU that would stall the host until the device has counted them, so
the count travels to the host while the forward goes on, and is asked for only by the backward, long after; until then
the kept look-ups can be had with padding behind them, in tensors as long as the batch (:class:`Padded`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


class Compaction(ABC):
    """Positions of the live look-ups of one batch; make one with :meth:`of`.

    Args:
        live: bool ``[N]``, one entry a look-up; True where its row is updated.
        offsets: int ``[bags + 1]``, non-decreasing, ``offsets[0] == 0`` and ``offsets[-1] <= N``.

    Attributes:
        mask: ``live``.
        full_offsets: ``offsets``, of the batch as a whole.
        is_padded: whether there may be padding behind :attr:`padded_positions`.
    """

    is_padded: bool

    def __init__(self, live: Tensor, offsets: Tensor, running: Tensor) -> None:
        self.mask = live
        self.full_offsets = offsets
        self._running = running

    @staticmethod
    def of(live: Tensor, offsets: Tensor) -> Compaction:
        """The kind that suits the tensors' device."""
        return Counted(live, offsets) if live.device.type == "cpu" else Padded(live, offsets)

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of live look-ups."""

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """int64 ``[count]``, ascending positions of the live look-ups."""

    @property
    @abstractmethod
    def padded_positions(self) -> Tensor:
        """int64: :attr:`positions`, with any positions behind them up to ``[N]`` if padded. Never waits."""

    @property
    @abstractmethod
    def valid(self) -> Tensor | None:
        """bool ``[N]``, which of :attr:`padded_positions` are not padding; None: all."""

    @abstractmethod
    def mean_factor(self) -> Tensor | None:
        """float32 ``[bags]``, live over full length of every bag; None where surely no bag is cut in part.

        Mean pooling divides a bag's gradient by its length, which compaction makes too short; multiplying the
        gradient by this factor first brings it back. A bag that is live or stale as a whole needs no factor (a
        factor of 1, or no look-up at all).
        """

    @property
    def lookups(self) -> int:
        """Number of look-ups of the batch as a whole."""
        return self._running.numel() - 1

    @property
    def ranks(self) -> Tensor:
        """``[N]``, how many live look-ups precede each look-up."""
        return self._running[:-1]

    def take(self, values: Tensor) -> Tensor:
        """Entries (or rows) of ``values`` (``[N, ...]``) that belong to live look-ups, in order."""
        return values.index_select(0, self.positions)

    def offsets(self) -> Tensor:
        """``[bags + 1]`` in the dtype of the batch's offsets: bag boundaries among the live look-ups."""
        if are_single(self.full_offsets, self.lookups):
            return self._running.to(self.full_offsets.dtype)
        return self.live_before(self.full_offsets).to(self.full_offsets.dtype)

    def live_before(self, positions: Tensor) -> Tensor:
        """How many live look-ups precede each of ``positions`` (int, values in ``[0, N]``)."""
        return self._running.index_select(0, positions)


class Counted(Compaction):
    """The look-ups are counted at once: on a GPU the host would wait."""

    is_padded = False
    valid = None

    def __init__(self, live: Tensor, offsets: Tensor) -> None:
        self._positions = positions_of(live)
        super().__init__(live, offsets, _complete_cumsum(live, offsets.dtype))

    @property
    def count(self) -> int:
        return self._positions.numel()

    @property
    def positions(self) -> Tensor:
        return self._positions

    @property
    def padded_positions(self) -> Tensor:
        return self._positions

    def mean_factor(self) -> Tensor | None:
        full, live = self.full_offsets.diff(), self.offsets().diff()
        return _mean_factor(full, live) if bool(((live != full) & (live > 0)).any()) else None


class Padded(Compaction):
    """Nothing waits for the count until somebody asks for it."""

    is_padded = True

    def __init__(self, live: Tensor, offsets: Tensor) -> None:
        running = _complete_cumsum(live, torch.int64)
        super().__init__(live, offsets, running)
        # Live look-up number k goes to slot k; every stale one goes to one spare slot at the end. Slots that nobody
        # goes to keep a position that can be read.
        slots = torch.where(live, running[:-1], live.numel())
        self._positions = torch.zeros(live.numel() + 1, dtype=torch.int64, device=live.device)
        self._positions.scatter_(0, slots, torch.arange(live.numel(), device=live.device))
        self._coming = _Coming(running[-1:])

    @property
    def count(self) -> int:
        return self._coming.value

    @property
    def positions(self) -> Tensor:
        return self._positions.narrow(0, 0, self.count)

    @property
    def padded_positions(self) -> Tensor:
        return self._positions[:-1]

    @cached_property
    def valid(self) -> Tensor:
        return torch.arange(self.lookups, device=self._running.device) < self._running[-1]

    def mean_factor(self) -> Tensor:
        return _mean_factor(self.full_offsets.diff(), self.offsets().diff())  # to see whether it is needed would stall


class _Coming:
    """A number on its way from the device (int64 ``[1]``) to the host."""

    def __init__(self, number: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._number = number
        if number.is_cuda:
            self._number = torch.empty(1, dtype=torch.int64, pin_memory=True)
            self._number.copy_(number, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @cached_property
    def value(self) -> int:
        """The number, waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._number)


def are_single(offsets: Tensor, lookups: int) -> bool:
    """Whether every bag surely has one look-up, as in click logs: offsets 0, 1, .. ``lookups``. Never waits.

    On a CPU this takes a third of the time of a gather by the offsets; on a GPU nothing is sure.
    """
    if offsets.device.type != "cpu" or offsets.numel() != lookups + 1:
        return False
    array = offsets.numpy()  # whose comparison is five times as fast as torch's on one thread
    return bool((array[1:] > array[:-1]).all())


def positions_of(mask: Tensor) -> Tensor:
    """int64, ascending positions of True in a 1-D bool tensor. Waits for the device."""
    if mask.device.type == "cpu":
        # numpy's flatnonzero is about ten times faster than torch.nonzero on one thread.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def _mean_factor(full: Tensor, live: Tensor) -> Tensor:
    # Empty and wholly stale bags get 1, so that no gradient becomes NaN or 0 for nothing.
    return torch.where(live > 0, live / full.clamp(min=1), 1.0).to(torch.float32)


def _complete_cumsum(live: Tensor, dtype: torch.dtype) -> Tensor:
    """Running count of True with a leading 0: ``[N + 1]``."""
    if live.device.type == "cpu":  # where a call of numpy's costs half of torch's
        array = np.zeros(live.numel() + 1, dtype=np.int32 if dtype == torch.int32 else np.int64)
        np.cumsum(live.numpy(), out=array[1:])
        return torch.from_numpy(array)
    running = torch.empty(live.numel() + 1, dtype=dtype, device=live.device)
    running[0] = 0
    torch.cumsum(live, 0, dtype=dtype, out=running[1:])
    return running
