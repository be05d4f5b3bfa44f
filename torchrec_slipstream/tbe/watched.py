"""A shard of an attached TBE as the choice of inputs sees it: weights, and how often rows are looked up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_slipstream.tbe.finding import TableShard
from torchrec_slipstream.tbe.update_filter import UpdateFilter


@dataclass(frozen=True)
class FilteredShard:
    """The shard at a ``place`` of an update filter, whose rows are counted one by one."""

    filter: UpdateFilter
    place: int

    @property
    def at(self) -> TableShard:
        """Which part of which table."""
        return self.filter.shards[self.place]

    @property
    def device(self) -> torch.device:
        """Where weights and touches are given."""
        return self.filter.device

    def weights(self, rows: Tensor) -> Tensor:
        """``[n, dim]``, a copy of the current weights of ``rows`` (int64 ``[n]``, of the shard)."""
        return self.filter.weights(self.place, rows)

    def touches(self, rows: Tensor) -> Tensor:
        """int64 ``[n]``, look-ups in counted training steps; only differences mean something."""
        return self.filter.touches.index_select(0, rows + self.at.row_begin).long()


def watched_shards(filters: Iterable[UpdateFilter]) -> list[FilteredShard]:
    """The shards of this rank whose rows are counted one by one."""
    return [FilteredShard(one, place) for one in filters for place, shard in enumerate(one.shards) if shard.counted]
