"""Moving rows between an overlay and its backing TBE, between two steps, in bounded parts.

Every part copies weights and optimizer state first and changes the slot words last, so whatever fails, every row is
whole in one place or the other; the rows that were to move and did not are where they were. Ranks move their rows on
their own: no collective is needed, under any sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.tbe.compaction import positions_of
from torchrec_slipstream.tbe.overlay import Overlay, Pool


@dataclass(frozen=True)
class Moved:
    """What a migration moved: rows that became cold, rows that became hot, and their bytes, each counted once."""

    demoted: int = 0
    promoted: int = 0
    bytes: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.demoted + other.demoted, self.promoted + other.promoted, self.bytes + other.bytes)

    @property
    def rows(self) -> int:
        return self.demoted + self.promoted


def migrate(overlay: Overlay, wanted: Mapping[int, Tensor], chunk_bytes: int) -> Moved:
    """Make the ``wanted`` rows the hot ones.

    Args:
        wanted: by the place of a shard, its hot rows from now on: int64 ``[n]``, ascending, local. Shards without an
            entry keep theirs.
        chunk_bytes: at most so many bytes of rows are copied at a time (at least one row).

    Raises:
        PlanError: rows that a shard does not have, or more than the overlay has slots for. Nothing was moved.
    """
    _check(overlay, wanted)
    overlay.wait_for_prefetch()
    moved = Moved()
    for pool in overlay.pools:
        moved += _migrate_pool(overlay, pool, wanted, chunk_bytes)
    return moved


def _migrate_pool(overlay: Overlay, pool: Pool, wanted: Mapping[int, Tensor], chunk_bytes: int) -> Moved:
    rows_at_once = max(1, chunk_bytes // pool.row_bytes)
    taken = overlay.taken(pool)
    free = positions_of(~taken)
    asked = [(place, wanted[place]) for place in pool.shards if place in wanted]
    slots = _slots_of(overlay, asked)
    taken[slots[slots >= 0]] = False  # these stay: what is still marked below, leaves
    coming = [
        (place, part)
        for (place, rows), cold in zip(asked, (slots < 0).split([rows.numel() for _, rows in asked]), strict=True)
        for part in _parts(rows[cold], rows_at_once)
    ]
    leaving = [
        (place, part)
        for place, rows in overlay.by_shard(pool, positions_of(taken))
        if place in wanted
        for part in _parts(rows, rows_at_once)
    ]
    demoted, promoted = (sum(rows.numel() for _, rows in parts) for parts in (leaving, coming))
    for place, rows in coming:
        while free.numel() < rows.numel():
            free = torch.cat([free, overlay.demote(*leaving.pop())])
        overlay.promote(place, rows, free[: rows.numel()])
        free = free[rows.numel() :]
    for place, rows in leaving:
        overlay.demote(place, rows)
    return Moved(demoted, promoted, (demoted + promoted) * pool.row_bytes)


def _slots_of(overlay: Overlay, asked: Sequence[tuple[int, Tensor]]) -> Tensor:
    """int64, the slots of the rows of all these shards, one after the other, -1 where they are cold: one gather."""
    numbers = [rows + overlay.space.begins[place] for place, rows in asked if overlay.space.own[place]]
    if not numbers:
        return torch.empty(0, dtype=torch.int64, device=overlay.device)
    return overlay.words.index_select(0, torch.cat(numbers)).long()


def _parts(rows: Tensor, rows_at_once: int) -> Sequence[Tensor]:
    """The rows in parts; none of none."""
    return rows.split(rows_at_once) if rows.numel() > rows_at_once else [rows] if rows.numel() else []


def _check(overlay: Overlay, wanted: Mapping[int, Tensor]) -> None:
    named = [(place, rows) for place, rows in wanted.items() if rows.numel()]
    for place, rows in named:
        if not overlay.space.own[place]:
            shard = overlay.shards[place]
            raise PlanError(f"table {shard.table}: {rows.numel()} rows shall be hot, but the overlay leaves it out")
    # All shards' at once: each look at a number on a GPU waits for it.
    for (place, rows), good in zip(named, _are_good(overlay, named), strict=True):
        if not good:
            shard = overlay.shards[place]
            raise PlanError(
                f"table {shard.table}: its hot rows from {int(rows[0])} to {int(rows[-1])} are not ascending rows of "
                f"this shard's {shard.rows}"
            )
    for pool in overlay.pools:
        if not wanted.keys() & set(pool.shards):
            continue
        hot = [wanted[p].numel() if p in wanted else overlay.hot_rows(p).numel() for p in pool.shards]
        if sum(hot) > pool.slots:
            names = ", ".join(sorted({overlay.shards[place].table for place in pool.shards}))
            raise PlanError(
                f"table(s) {names}: {sum(hot)} rows shall be hot, but their overlay has {pool.slots} slots; "
                "give fewer rows, or attach with a greater budget"
            )


def _are_good(overlay: Overlay, named: Sequence[tuple[int, Tensor]]) -> list[bool]:
    """For each shard, whether its rows (int64 ``[n]``, n > 0) ascend and are its own."""
    if not named:
        return []
    lengths = torch.tensor([rows.numel() for _, rows in named], device=overlay.device)
    ends = lengths.cumsum(0)
    rows = torch.cat([rows for _, rows in named])
    first, last = rows[ends - lengths], rows[ends - 1]
    rises = torch.ones_like(rows, dtype=torch.bool)
    torch.gt(rows[1:], rows[:-1], out=rises[1:])
    rises[ends - lengths] = True
    falls = (~rises).cumsum(0)
    own = torch.tensor([overlay.shards[place].rows for place, _ in named], device=overlay.device)
    good = (first >= 0) & (last < own) & (falls[ends - 1] == falls[ends - lengths])
    return good.tolist()
