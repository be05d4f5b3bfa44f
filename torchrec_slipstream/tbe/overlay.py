"""The overlay: a small TBE in fast memory that holds copies of a backing TBE's hot rows, with their optimizer state.

The backing TBE keeps the whole logical table, every row at its own index. An int32 *slot word* a row says where the
row's truth is: -1, in the backing TBE; else in that slot of the overlay. Moving a row copies first and changes the word
last, so that whatever fails in between leaves every row with one whole truth.

Slots are shared by all tables of equal dim (a :class:`Pool`), by giving the overlay TBE one physical table a dim, which
all features of that dim look up in.

``state_dict`` and the fused optimizer's state are views of the backing TBE. Before anybody reads them the overlay is
*released*: its rows are written back, and the backing TBE has the truth until the next forward, which reads the hot
rows anew. So what is loaded into those views meanwhile, by whatever way, is what trains on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import Tensor

from torchrec_slipstream.errors import StateError
from torchrec_slipstream.tbe.backing import BackingRows, PoolRows
from torchrec_slipstream.tbe.compaction import positions_of
from torchrec_slipstream.tbe.finding import TBE, FoundTbe
from torchrec_slipstream.tbe.overlay_tbe import check_can_have_overlay, overlay_tbe
from torchrec_slipstream.tbe.row_space import RowSpace

# Bytes of rows that a release or a reload copies at a time: bounds the memory besides.
_CHUNK_BYTES = 64 * 2**20


@dataclass(eq=False)
class Pool:
    """The slots that the tables of one dim share.

    Attributes:
        slots: how many.
        row_bytes: of a slot: weights and optimizer state.
        shards: places of the shards whose rows may take them.
        owner: int64 ``[slots]``, the row (number in the overlay's ``space``) that took the slot last; -1 none. It has
            the slot while its word says so.
        tensors: the slots' weights and optimizer state, ``[slots, ...]`` each.
        places: where the rows are that have no slot.
    """

    dim: int
    slots: int
    row_bytes: int
    shards: tuple[int, ...]
    owner: Tensor
    tensors: list[Tensor] = field(repr=False)
    places: PoolRows = field(repr=False)


def can_hold(found: FoundTbe, place: int) -> bool:
    """Whether the shard's rows can be hot: it has any, and they are not in fast memory anyway."""
    return found.tbe.embedding_specs[place][2] != EmbeddingLocation.DEVICE and found.shards[place].rows > 0


def row_bytes_of(tbe: TBE, table: int) -> int:
    """Bytes of one row of a TBE's table, with its optimizer state."""
    return sum(tensor[:1].numel() * tensor.element_size() for tensor in BackingRows(tbe).of(table))


class Overlay:
    """The overlay of one backing TBE. All rows are cold at first.

    Args:
        found: the backing TBE with its shards. It is not changed until rows are moved back.
        slots: by dim, rows that can be hot.
        wanted: for each shard, whether its rows may be hot; of those only that :func:`can_hold` finds able. None: all.

    Raises:
        AttachError: the TBE is of a kind that an overlay would not be exact for (``overlay_tbe.py``).

    Attributes:
        tbe: the overlay TBE: the backing's features in their order, one physical table a dim.
        space: numbers the rows that may be hot.
        words: int32 ``[space.size]``, the slot words.
        hits: int64 ``[features]``, look-ups of training steps that the overlay served.
        dirty: whether slots may differ from their rows' places in the backing TBE.
        released: whether the backing TBE has the truth of all rows.
    """

    def __init__(self, found: FoundTbe, slots: Mapping[int, int], wanted: Sequence[bool] | None = None) -> None:
        check_can_have_overlay(found)
        backing = found.tbe
        self.backing = BackingRows(backing)
        self.shards = found.shards
        self.device = backing.current_device
        feature_table = list(backing.feature_table_map)
        may_be_hot = [can_hold(found, place) and (not wanted or wanted[place]) for place in range(len(found.shards))]
        self.space = RowSpace([shard.rows for shard in found.shards], may_be_hot, feature_table, self.device)
        self.words = torch.full((self.space.size,), -1, dtype=torch.int32, device=self.device)
        dims = sorted({found.shards[table].dim for table in feature_table})
        sizes = {dim: slots.get(dim, 0) for dim in dims}
        self.tbe = overlay_tbe(backing, [(max(1, sizes[dim]), dim) for dim in dims], found.shards)
        self.pools = []
        tables = BackingRows(self.tbe)
        for table, dim in enumerate(dims):
            tensors = [tensor[: sizes[dim]] for tensor in tables.of(table)]
            shards = tuple(i for i, shard in enumerate(found.shards) if shard.dim == dim and may_be_hot[i])
            owner = torch.full((sizes[dim],), -1, dtype=torch.int64, device=self.device)
            places = PoolRows(self.backing, shards, self.space.begins)
            self.pools.append(Pool(dim, sizes[dim], row_bytes_of(self.tbe, table), shards, owner, tensors, places))
        self.pool_of = {place: pool for pool in self.pools for place in pool.shards}
        self.hits = torch.zeros(len(feature_table), dtype=torch.int64, device=self.device)
        self.dirty = False
        self.released = False
        self._moves = 0
        self._arguments: Any = None
        self._watched = _one_view_a_memory(backing, self.backing.of(0))
        self._versions = self._versions_now()

    @property
    def hbm_bytes(self) -> int:
        """Bytes of fast memory taken: slots with their state, and the slot words."""
        held = sum(tensor.numel() * tensor.element_size() for pool in self.pools for tensor in pool.tensors)
        return held + self.words.numel() * self.words.element_size()

    # --------------------------------------------------------------------------------------- which rows are hot

    def hot_rows(self, place: int) -> Tensor:
        """int64 ``[n]``, ascending, the shard's hot rows counted from its first."""
        if (pool := self.pool_of.get(place)) is None:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        return dict(self.by_shard(pool, positions_of(self.taken(pool))))[place]

    def hot_rows_by_shard(self) -> dict[int, Tensor]:
        """:meth:`hot_rows` of all shards at once, by place."""
        hot = {place: torch.empty(0, dtype=torch.int64, device=self.device) for place in range(len(self.shards))}
        for pool in self.pools:
            hot |= dict(self.by_shard(pool, positions_of(self.taken(pool))))
        return hot

    def taken(self, pool: Pool) -> Tensor:
        """bool ``[slots]``, which slots of the pool a row has."""
        has = self.words[pool.owner.clamp(min=0)] == torch.arange(pool.slots, device=self.device)
        return has.logical_and_(pool.owner >= 0)

    def by_shard(self, pool: Pool, slots: Tensor) -> list[tuple[int, Tensor]]:
        """The rows (int64, local, ascending) that have the taken ``slots`` of a pool, for each of its shards."""
        if not pool.shards:  # all of this dim are left out
            return []
        numbers = pool.owner[slots].sort().values
        begins = [self.space.begins[place] for place in pool.shards]
        ends = torch.searchsorted(numbers, torch.tensor(begins[1:], device=self.device)).tolist()
        parts = numbers.tensor_split(ends)
        return [(place, part - begin) for place, begin, part in zip(pool.shards, begins, parts, strict=True)]

    def slots_of(self, place: int, rows: Tensor) -> Tensor:
        """int64 ``[n]``, the slots of a shard's ``rows`` (int64 ``[n]``), -1 where they are cold."""
        if not self.space.own[place]:
            return torch.full_like(rows, -1)
        return self._words_of(place).index_select(0, rows).long()

    # --------------------------------------------------------------------------------------- moving rows

    def wait_for_prefetch(self) -> None:
        """Let a prefetch of coming batches that runs beside end first. Call before rows are moved."""
        stream = self.backing.tbe.prefetch_stream
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)

    def before_backward(self) -> Callable[[Tensor], Tensor]:
        """What has to run before the backward of a forward made now, on the gradient, which it returns."""
        moves = self._moves

        def ready(gradient: Tensor) -> Tensor:
            if self._moves != moves:
                raise RuntimeError(
                    "rows of a table with an overlay were moved between a forward and its backward, which would update "
                    "them where they no longer are. Nothing was updated. Call step() after the backward of every "
                    "forward, and detach() after the last"
                )
            self.hold()  # a checkpoint may have been taken since
            self.dirty = True
            return gradient

        return ready

    def _versions_now(self) -> list[int]:
        return [tensor._version for tensor in self._watched]

    def notice_writes(self) -> None:
        """Find what others have written into the backing TBE's memory while the overlay had the truth.

        Torch counts the writes into a memory; neither FBGEMM's updates nor our own moves take part in that count.

        Raises:
            StateError: hot rows have trained since, so that either the write or the training would be lost.
        """
        if self.released or (versions := self._versions_now()) == self._versions:
            return
        self._versions = versions
        if self.dirty:
            names = ", ".join(sorted({shard.table for shard in self.shards}))
            raise StateError(
                f"table(s) {names}: weights or optimizer state were written into tensors that were taken before the "
                "last training step (an old state_dict, parameters), where the hot rows' values were not any more. "
                "Those of hot rows are not taken over. Take a new state_dict(), or call flush() on the TBEs, and write "
                "again before the next step (each TBE says so once)"
            )
        self.released = True  # the slots have nothing that was not there as well

    def demote(self, pool: Pool, numbers: Tensor) -> Tensor:
        """Bring hot rows back to the backing TBE, weights and state together.

        Args:
            numbers: int64 ``[n]``, ascending, in ``space``: rows of any of the pool's shards.

        Returns:
            int64 ``[n]``, the slots that are free now.
        """
        self.notice_writes()
        slots = self.words.index_select(0, numbers).long()
        self._moves += 1
        if not self.released:
            pool.places.write(numbers, [tensor.index_select(0, slots) for tensor in pool.tensors])
        self.words.index_fill_(0, numbers, -1)  # from here on the backing TBE has their truth
        pool.owner.index_fill_(0, slots, -1)
        return slots

    def promote(self, pool: Pool, numbers: Tensor, slots: Tensor) -> None:
        """Give cold rows (``numbers`` as of :meth:`demote`) free ``slots`` of their pool (int64 ``[n]``)."""
        self.notice_writes()
        self._moves += 1
        if not self.released:
            _fill(pool, slots, pool.places.take(numbers))
        pool.owner.index_copy_(0, slots, numbers)
        self.words.index_copy_(0, numbers, slots.int())  # from here on the overlay has their truth

    def release(self, *, for_good: bool = False) -> None:
        """Let the backing TBE have the truth of every row, until :meth:`hold`.

        ``for_good``: backwards that are still to come are refused, since nobody would hold the rows again after them.
        """
        self.notice_writes()
        self._moves += for_good
        if self.released:
            return
        if self.dirty:
            for pool, numbers, slots in self._chunks():
                pool.places.write(numbers, [tensor.index_select(0, slots) for tensor in pool.tensors])
        self.dirty, self.released = False, True

    def hold(self) -> None:
        """Let the overlay have the truth of the hot rows again, read from the backing TBE as they are there now."""
        self.notice_writes()
        if not self.released:
            return
        for pool, numbers, slots in self._chunks():
            _fill(pool, slots, pool.places.take(numbers))
        self._versions, self.released = self._versions_now(), False

    def _chunks(self) -> Iterator[tuple[Pool, Tensor, Tensor]]:
        """All hot rows in bounded parts: their pool, numbers (ascending) and slots."""
        for pool in self.pools:
            hot = pool.owner[positions_of(self.taken(pool))].sort().values
            for numbers in hot.split(max(1, _CHUNK_BYTES // pool.row_bytes)) if hot.numel() else ():
                yield pool, numbers, self.words.index_select(0, numbers).long()

    def _words_of(self, place: int) -> Tensor:
        begin = self.space.begins[place]
        return self.words[begin : begin + self.shards[place].rows]

    # --------------------------------------------------------------------------------------- reading rows

    def look(self, place: int, rows: Tensor, which: int) -> Tensor:
        """``[n, ...]``, current weights (``which`` 0) or a state of a shard's ``rows`` (int64 ``[n]``): a copy."""
        values = self.backing.look(place, rows, which)
        if self.released:
            return values
        slots = self.slots_of(place, rows)
        hot = positions_of(slots >= 0)
        values[hot] = self.pool_of[place].tensors[which].index_select(0, slots[hot])
        return values

    # --------------------------------------------------------------------------------------- one forward

    def follow(self) -> None:
        """Take over what the backing TBE was told since: learning rate, hyper-parameters, step, mode.

        Call after the backing TBE's own forward, which counts the step.
        """
        backing, mine = self.backing.tbe, self.tbe
        mine.learning_rate_tensor = backing.learning_rate_tensor
        if backing.optimizer_args is not self._arguments:  # a new tuple with every change
            self._arguments = backing.optimizer_args
            mine.optimizer_args = backing.optimizer_args._replace(total_hash_size=mine.total_hash_size)
        mine.training = backing.training
        if hasattr(backing, "iter_cpu"):
            # Its own forward adds one; where that starts from 0, FBGEMM asks `iter` whether it was loaded.
            mine.iter_cpu = backing.iter_cpu.cpu() - 1
            if int(mine.iter_cpu) == 0:
                mine.iter.zero_()


def _one_view_a_memory(tbe: TBE, row: list[Tensor]) -> list[Tensor]:
    """The tensors by whose versions writes into the TBE's weights and states (``row``: of a table) can be told."""
    tensors = tbe.split_embedding_weights()
    if len(row) > 1:
        tensors = tensors + [state for table in tbe.split_optimizer_states() for state in table]
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())


def _fill(pool: Pool, slots: Tensor, values: list[Tensor]) -> None:
    for mine, theirs in zip(pool.tensors, values, strict=True):
        mine.index_copy_(0, slots, theirs)
