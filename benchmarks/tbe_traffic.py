"""Zipf-distributed traffic without an end, drawn on the device that trains on it, and the profile of its beginning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.tables import choose_stale
from torchrec_slipstream.tbe.memory import optimizer_state

# Of the look-ups, those whose updates are left out where some are.
SKIPPED_SHARE = 0.5


@dataclass(frozen=True)
class Shape:
    """``tables`` of ``rows`` x ``dim`` float32; ``lookups`` a batch, as many of each table, one a bag."""

    tables: int
    rows: int
    dim: int
    lookups: int
    zipf: float = 1.05
    seed: int = 0

    @property
    def bags(self) -> int:
        """Of each table in a batch."""
        return self.lookups // self.tables

    def row_bytes(self, optimizer: str) -> int:
        """Of a row's weights and optimizer state."""
        return 4 * self.dim + optimizer_state(optimizer).row_bytes(self.dim)


class Traffic:
    """Endless batches under a Zipf law: a table's row of rank k is looked up in proportion to k^-zipf, k to ``rows``.

    A row's popularity has nothing to do with its place. A batch depends on its number and the seed alone; no two are
    alike, so that no cache learns them by heart.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        ranks = torch.arange(1, shape.rows + 1, dtype=torch.float64, device=device)
        self._below = ranks.pow_(-shape.zipf).cumsum(0)
        self._below /= self._below[-1].clone()
        generator = torch.Generator(device=device).manual_seed(shape.seed)
        places = [torch.randperm(shape.rows, generator=generator, device=device) for _ in range(shape.tables)]
        self._places = torch.stack([one.int() for one in places])
        self.offsets = torch.arange(shape.tables * shape.bags + 1, device=device)
        self.begins = torch.arange(shape.tables, device=device).repeat_interleave(shape.bags) * shape.rows

    def batch(self, number: int) -> Tensor:
        """int64 ``[tables * bags]``, table-major, rows of each table."""
        shape = self.shape
        generator = torch.Generator(device=self.device).manual_seed((shape.seed << 32) + number + 1)
        drawn = torch.rand(shape.tables, shape.bags, generator=generator, dtype=torch.float64, device=self.device)
        ranks = torch.searchsorted(self._below, drawn).clamp_(max=shape.rows - 1)
        return self._places.gather(1, ranks).long().view(-1)

    def count(self, batches: range) -> Tensor:
        """int32 ``[tables * rows]``, look-ups of every row over the batches of these numbers."""
        counts = torch.zeros(self.shape.tables * self.shape.rows, dtype=torch.int32, device=self.device)
        one = torch.ones((), dtype=torch.int32, device=self.device).expand(self.begins.numel())
        for number in batches:
            counts.index_add_(0, self.batch(number) + self.begins, one)
        return counts


class Profile:
    """What was counted before anything is timed: who is hot, and whose updates are left out."""

    def __init__(self, traffic: Traffic, batches: range) -> None:
        self.shape = traffic.shape
        self.counts = traffic.count(batches)

    @cached_property
    def order(self) -> Tensor:
        """int64 ``[tables * rows]``, all rows, those looked up most first."""
        return self.counts.argsort(descending=True, stable=True)

    def hottest(self, rows: int) -> Tensor:
        """int64 ``[rows]``, ascending: of all rows, numbered through all tables, those looked up most."""
        return self.order[:rows].sort().values

    def by_table(self, numbers: Tensor) -> dict[int, Tensor]:
        """Ascending numbers of rows as rows of each table."""
        ends = [rows * self.shape.rows for rows in range(1, self.shape.tables)]
        parts = numbers.tensor_split(torch.searchsorted(numbers, torch.tensor(ends, device=numbers.device)).tolist())
        return {table: part - table * self.shape.rows for table, part in enumerate(parts)}

    @cached_property
    def stale(self) -> Tensor:
        """int64 ``[n]``, random rows with half of the look-ups."""
        stale = choose_stale(self.counts.cpu(), SKIPPED_SHARE, "random", seed=self.shape.seed)
        return stale.nonzero().squeeze(1).to(self.counts.device)
