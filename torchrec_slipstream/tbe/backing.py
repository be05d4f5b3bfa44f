"""Rows of a TBE with their optimizer state, read and written behind FBGEMM's back, its UVM cache included.

FBGEMM's cache (``EmbeddingLocation.MANAGED_CACHING``) may hold a newer copy of a row than the table, under a tag which
is the row's number among all cached tables. A row that is taken from here is evicted first, and must not be looked up
through the TBE until it is written back: then there is no old copy of it to find. Evicting writes before it takes the
tag away, so that one whole truth is left whatever fails in between.

The cache, as read in FBGEMM 1.6.0's and 1.8.0's ``src/split_embeddings_cache``: ``lxu_cache_state`` ``[sets, ways]``
has the tags, -1 none; a location is set * ways + way, a row of ``lxu_cache_weights``. A slot without a tag is filled
like any other (by its LRU time, or first of all in LFU) and neither evicted nor flushed. ``prefetch`` of a TBE that
locks cache lines (``prefetch_pipeline``) counts the batches that need a line, and the backward of each counts down the
lines that it used itself; a row that left looks up nothing in those batches any more, so its line's count goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

from torchrec_slipstream.tbe.compaction import positions_of
from torchrec_slipstream.tbe.finding import TBE


class BackingRows:
    """The rows of one TBE's physical tables; ``table`` is their place in its ``embedding_specs``."""

    def __init__(self, tbe: TBE) -> None:
        self.tbe = tbe

    @cached_property
    def _tables(self) -> list[list[Tensor]]:
        weights = self.tbe.split_embedding_weights()
        sgd = self.tbe.optimizer == EmbOptimType.EXACT_SGD
        states = [()] * len(weights) if sgd else self.tbe.split_optimizer_states()
        # As `.data`, which has a version of its own: autograd would take what is written here, as it does not take
        # FBGEMM's own updates, for a reason to refuse a backward that is still to come.
        return [[tensor.data for tensor in (table, *more)] for table, more in zip(weights, states, strict=True)]

    def of(self, table: int) -> list[Tensor]:
        """The table's weights ``[rows, dim]`` and optimizer states ``[rows]`` or ``[rows, dim]``: views."""
        return self._tables[table]

    def look(self, table: int, rows: Tensor, which: int) -> Tensor:
        """Current weights (``which`` 0) or a state of ``rows``: a copy."""
        values = self.of(table)[which].index_select(0, rows)
        if which == 0 and (cached := self._cached(table, rows)) is not None:
            values = _newer(self.tbe, values, cached)
        return values

    def has_cache(self, table: int) -> bool:
        """Whether FBGEMM's cache may have rows of the table."""
        return self._first_tag(table) is not None

    def _first_tag(self, table: int) -> int | None:
        tbe = self.tbe
        if tbe.lxu_cache_weights.numel() == 0:
            return None
        first = int(tbe.cache_hash_size_cumsum[tbe.feature_table_map.index(table)])
        return first if first >= 0 else None

    def _cached(self, table: int, rows: Tensor) -> Tensor | None:
        """int64 ``[n]``, where FBGEMM's cache has the rows, -1 where it has not; None if the table has no cache.

        Waits for the device.
        """
        tbe = self.tbe
        if (first := self._first_tag(table)) is None:
            return None
        locations: Tensor = torch.ops.fbgemm.lxu_cache_lookup(
            rows + first, tbe.lxu_cache_state, int(tbe.total_cache_hash_size), False
        )
        return locations.long()

    def evict(self, table: int, rows: Tensor) -> None:
        """Write back what FBGEMM's cache has of the rows (int64 ``[n]``), and take them out of it."""
        locations = self._cached(table, rows)
        if locations is None:
            return
        held = positions_of(locations >= 0)
        rows, locations = rows[held], locations[held]
        weights = self.of(table)[0]
        weights.index_copy_(0, rows, _newer(self.tbe, weights.index_select(0, rows), locations))
        self.tbe.lxu_cache_state.view(-1)[locations] = -1
        if self.tbe.prefetch_pipeline:
            self.tbe.lxu_cache_locking_counter.view(-1)[locations] = 0
        for prefetched in self.tbe.lxu_cache_locations_list:  # a row may be back before the forward that it was for
            prefetched.masked_fill_(torch.isin(prefetched, locations.to(prefetched.dtype)), -1)


@dataclass(frozen=True, eq=False)
class _Run:
    """Rows that are moved at once: of one table, or of several that lie end to end in memory and have no cache.

    ``first`` is the first table, ``begin`` the number of its first row, ``tensors`` the rows' weights and states.
    """

    first: int
    begin: int
    tables: int
    tensors: list[Tensor]


class PoolRows:
    """The rows of several tables of one dim, by their numbers, in as few pieces as can be moved at once.

    Args:
        tables: their places, ascending.
        begins: by table, the number of its first row; ascending as well.
    """

    def __init__(self, backing: BackingRows, tables: Sequence[int], begins: Sequence[int]) -> None:
        self._backing = backing
        self._runs: list[_Run] = []
        for table in tables:
            mine = backing.of(table)
            last = self._runs[-1] if self._runs else None
            if last is not None and _joins(backing, last, table, begins[table]):
                joined = [_joined(*pair) for pair in zip(last.tensors, mine, strict=True)]
                self._runs[-1] = replace(last, tables=last.tables + 1, tensors=joined)
            else:
                self._runs.append(_Run(table, begins[table], 1, mine))
        inner = [run.begin for run in self._runs[1:]]
        self._inner = torch.tensor(inner, dtype=torch.int64, device=backing.tbe.current_device)

    def take(self, numbers: Tensor) -> list[Tensor]:
        """Current weights and states of rows (int64 ``[n]``, ascending), copies; the rows leave FBGEMM's cache."""
        parts = []
        for run, part in self._by_run(numbers):
            rows = numbers[part] - run.begin
            self._backing.evict(run.first, rows)
            parts.append([tensor.index_select(0, rows) for tensor in run.tensors])
        return parts[0] if len(parts) == 1 else [torch.cat(same) for same in zip(*parts, strict=True)]

    def write(self, numbers: Tensor, values: list[Tensor]) -> None:
        """Write weights and states of rows (int64 ``[n]``, ascending), which FBGEMM's cache does not hold."""
        for run, part in self._by_run(numbers):
            for tensor, value in zip(run.tensors, values, strict=True):
                tensor.index_copy_(0, numbers[part] - run.begin, value[part])

    def _by_run(self, numbers: Tensor) -> list[tuple[_Run, slice]]:
        if len(self._runs) == 1:
            return [(self._runs[0], slice(None))]
        inner = torch.searchsorted(numbers, self._inner).tolist()
        bounds = pairwise([0, *inner, numbers.numel()])
        parts = [(run, slice(a, b)) for run, (a, b) in zip(self._runs, bounds, strict=True) if a < b]
        return parts or [(self._runs[0], slice(0, 0))]


def _joins(backing: BackingRows, last: _Run, table: int, begin: int) -> bool:
    """Whether a table lies behind a run in memory as it does by its numbers, and neither has a cache."""
    return (
        last.begin + last.tensors[0].shape[0] == begin
        and not backing.has_cache(last.first)
        and not backing.has_cache(table)
        and all(map(_follows, last.tensors, backing.of(table)))
    )


def _follows(before: Tensor, after: Tensor) -> bool:
    """Whether the rows of two contiguous tensors lie end to end in one memory."""
    return (
        before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        and before.dtype == after.dtype
        and before.shape[1:] == after.shape[1:]
        and before.is_contiguous()
        and after.is_contiguous()
        and before.storage_offset() + before.numel() == after.storage_offset()
    )


def _joined(before: Tensor, after: Tensor) -> Tensor:
    return before.as_strided((before.shape[0] + after.shape[0], *before.shape[1:]), before.stride())


def _newer(tbe: TBE, values: Tensor, locations: Tensor) -> Tensor:
    """``values`` (``[n, dim]``), but from the cache where it has the row."""
    # A slot is as wide as the widest cached table; a row takes its beginning.
    cached = tbe.lxu_cache_weights.index_select(0, locations.clamp(min=0))[:, : values.shape[1]]
    return torch.where((locations >= 0)[:, None], cached.to(values.dtype), values)
