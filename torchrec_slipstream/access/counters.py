"""Look-ups counted row by row, the choice of the steps that are counted, and how counts fade.

Kept free of FBGEMM. A count is never changed in place: ``touches`` only grows, which staleness relies on (it takes
differences), and what has faded is kept beside it, so that one scatter a step serves both.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# No row's touches exceed this by more than what is added between two calls of lower_high().
TOUCHES_LIMIT = 2**30
# Rows at a time when counts are halved, so that the int64 copies stay small.
_CHUNK = 1 << 22
# Multipliers of splitmix64 (Steele, Lea and Flood, 2014), which spreads consecutive numbers over all 64 bits.
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64 - 1


class RowCounts:
    """Access counts of the rows of one TBE.

    Args:
        rows: how many.
        device: where the counts lie.
        fades: whether :meth:`halve` will be called; costs 4 bytes a row.

    Attributes:
        touches: int32 ``[rows]``, look-ups that were added, less what :meth:`lower_high` took off.
        faded: None, or int32 or int64 ``[rows]``, how much of the touches no longer counts (negative where
            :meth:`lower_high` took off more than has faded).
    """

    def __init__(self, rows: int, device: torch.device, *, fades: bool = False) -> None:
        self.touches = torch.zeros(rows, dtype=torch.int32, device=device)
        self.faded = torch.zeros(rows, dtype=torch.int32, device=device) if fades else None
        self._added = 0
        none = torch.empty(0, dtype=torch.int64, device=device)
        self._none = none, none.int()

    def add(self, rows: Tensor) -> None:
        """Count one look-up of each of ``rows`` (int64 ``[n]``, in range)."""
        self._added += rows.numel()
        if rows.device.type == "cpu":
            # On one thread a sixth faster than scatter_add_; both wait for memory.
            np.add.at(self.touches.numpy(), rows.numpy(), np.int32(1))
            return
        one = torch.ones((), dtype=torch.int32, device=rows.device)
        self.touches.scatter_add_(0, rows, one.expand(rows.numel()))

    def counts(self, begin: int, end: int) -> Tensor:
        """int64 ``[end - begin]``, the access counts, after decay, of a range of rows."""
        counts = self.touches[begin:end].long()
        return counts if self.faded is None else counts - self.faded[begin:end]

    def halve(self, begin: int, end: int, seed: int, first: int) -> None:
        """Halve the counts of a range of rows; odd ones are rounded by coins that depend on the arguments alone.

        Args:
            seed: which halving of which table this is.
            first: number of the first row in its table, so that however a table is sharded its rows get the same coins.
        """
        assert self.faded is not None
        for at in range(begin, end, _CHUNK):
            upto = min(at + _CHUNK, end)
            counts = self.counts(at, upto)
            rows = torch.arange(first + at - begin, first + upto - begin, device=counts.device)
            self.faded[at:upto] += (counts - halved(counts, coins(rows, seed))).to(self.faded.dtype)

    def lower_high(self) -> tuple[Tensor, Tensor]:
        """Keep touches within int32: take a part off the rows that near its end. Their counts stay what they are.

        Returns:
            The rows, int64 ``[n]``, ascending, and what was taken off each, int32 ``[n]``. None, without a look, where
            too little was added since the last call for a row to have come near.
        """
        part = TOUCHES_LIMIT // 2
        if self._added < part:  # after nearly every step: no tensor is made
            return self._none
        self._added = 0
        high = (self.touches > TOUCHES_LIMIT).nonzero().squeeze(1)
        taken = (self.touches[high] - TOUCHES_LIMIT - 1) // part * part + part
        if high.numel():
            self.touches[high] -= taken
            if self.faded is None:
                # int64, as counts that never fade may leave int32.
                self.faded = torch.zeros(self.touches.numel(), dtype=torch.int64, device=self.touches.device)
            self.faded[high] -= taken
        return high, taken

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.touches.nbytes + (0 if self.faded is None else self.faded.nbytes)

    def loaded(self) -> None:
        """Say that ``touches`` were set from outside, so that the next :meth:`lower_high` looks at them."""
        self._added = TOUCHES_LIMIT


def halved(counts: Tensor, coin: Tensor) -> Tensor:
    """Half of the ``counts`` (int64 ``[n]``), odd ones rounded up where ``coin`` (0 or 1) says so."""
    return (counts >> 1) + (counts & coin)


def coins(rows: Tensor, seed: int) -> Tensor:
    """int64 ``[n]``, 0 or 1, as if thrown, for each of ``rows`` (int64 ``[n]``); the same for the same seed."""
    word = rows * _signed(_GOLDEN) + _signed(mixed(seed))
    word = (word ^ (word >> 30)) * _signed(_FIRST)
    word = (word ^ (word >> 27)) * _signed(_SECOND)
    return (word >> 47) & 1


def is_counted(step: int, every: int) -> bool:
    """Whether a step (from 0) is the one that is counted of its block of ``every`` steps.

    Drawn for each block by itself, from the block's number alone: all ranks and resumed runs agree.
    """
    block, place = divmod(step, every)
    return place == mixed(block) % every


def mixed(number: int) -> int:
    """A 64-bit hash of a number: splitmix64's output function."""
    word = (number + 1) * _GOLDEN & _WORD
    word = (word ^ (word >> 30)) * _FIRST & _WORD
    word = (word ^ (word >> 27)) * _SECOND & _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The int64 with the same bits; torch multiplies those modulo 2^64."""
    return word - 2**64 if word >= 2**63 else word
