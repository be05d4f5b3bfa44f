"""Rows of a TBE with their optimizer state, read and written behind FBGEMM's back, its UVM cache included.

FBGEMM's cache (``EmbeddingLocation.MANAGED_CACHING``) may hold a newer copy of a row than the table, under a tag which
is the row's number among all cached tables. A row that is taken from here leaves the cache, and must not be looked up
through the TBE until it is written back: then there is no old copy of it to find.
"""

from __future__ import annotations

from functools import cached_property

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

from torchrec_slipstream.tbe.finding import TBE


class BackingRows:
    """The rows of one TBE's physical tables; ``table`` is their place in its ``embedding_specs``."""

    def __init__(self, tbe: TBE) -> None:
        self.tbe = tbe

    @cached_property
    def _tables(self) -> list[list[Tensor]]:
        weights = self.tbe.split_embedding_weights()
        if self.tbe.optimizer == EmbOptimType.EXACT_SGD:
            return [[table] for table in weights]
        return [[table, *states] for table, states in zip(weights, self.tbe.split_optimizer_states(), strict=True)]

    def of(self, table: int) -> list[Tensor]:
        """The table's weights ``[rows, dim]`` and optimizer states ``[rows]`` or ``[rows, dim]``: views."""
        return self._tables[table]

    def look(self, table: int, rows: Tensor, which: int) -> Tensor:
        """Current weights (``which`` 0) or a state of ``rows``: a copy."""
        values = self.of(table)[which].index_select(0, rows)
        if which == 0 and (cached := self._cached(table, rows)) is not None:
            values = _newer(self.tbe, values, cached)
        return values

    def take(self, table: int, rows: Tensor) -> list[Tensor]:
        """Current weights and states of ``rows`` (int64 ``[n]``), copies; the rows leave FBGEMM's cache."""
        weights, *states = [tensor.index_select(0, rows) for tensor in self.of(table)]
        if (cached := self._cached(table, rows)) is not None:
            weights = _newer(self.tbe, weights, cached)
            self._drop(cached)
        return [weights, *states]

    def write(self, table: int, rows: Tensor, values: list[Tensor]) -> None:
        """Write weights and states of ``rows`` (int64 ``[n]``, distinct), which FBGEMM's cache does not hold."""
        for tensor, value in zip(self.of(table), values, strict=True):
            tensor.index_copy_(0, rows, value)

    def _cached(self, table: int, rows: Tensor) -> Tensor | None:
        """int64 ``[n]``, where FBGEMM's cache has the rows, -1 where it has not; None if the table has no cache."""
        tbe = self.tbe
        if tbe.lxu_cache_weights.numel() == 0:
            return None
        feature = tbe.feature_table_map.index(table)
        first = int(tbe.cache_hash_size_cumsum[feature])
        if first < 0:  # this one of the TBE's tables is not cached
            return None
        locations: Tensor = torch.ops.fbgemm.lxu_cache_lookup(
            rows + first, tbe.lxu_cache_state, int(tbe.total_cache_hash_size), False
        )
        return locations.long()

    def _drop(self, locations: Tensor) -> None:
        """Take rows out of the cache without writing them back; locks of batches that were prefetched go as well."""
        held = locations[locations >= 0]
        self.tbe.lxu_cache_state.view(-1)[held] = -1
        if self.tbe.prefetch_pipeline:
            self.tbe.lxu_cache_locking_counter.view(-1)[held] = 0


def _newer(tbe: TBE, values: Tensor, locations: Tensor) -> Tensor:
    """``values`` (``[n, dim]``), but from the cache where it has the row."""
    # A slot is as wide as the widest cached table; a row takes its beginning.
    cached = tbe.lxu_cache_weights.index_select(0, locations.clamp(min=0))[:, : values.shape[1]]
    return torch.where((locations >= 0)[:, None], cached.to(values.dtype), values)
