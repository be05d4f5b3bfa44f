"""Moving rows between an overlay and its backing TBE, between two steps, in bounded parts.

Every part copies weights and optimizer state first and changes the slot words last, so whatever fails, every row is
whole in one place or the other; the rows that were to move and did not are where they were. Ranks move their rows on
their own: no collective is needed, under any sharding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.staleness.compaction import positions_of
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
    coming: list[tuple[int, Tensor]] = []
    for place in pool.shards:
        if place in wanted:
            slots = overlay.slots_of(place, wanted[place])
            taken[slots[slots >= 0]] = False  # these stay: what is still marked below, leaves
            coming += [(place, part) for part in wanted[place][slots < 0].split(rows_at_once)]
    leaving = [
        (place, part)
        for place, rows in overlay.by_shard(pool, positions_of(taken))
        if place in wanted
        for part in rows.split(rows_at_once)
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


def _check(overlay: Overlay, wanted: Mapping[int, Tensor]) -> None:
    for place, rows in wanted.items():
        shard = overlay.shards[place]
        if rows.numel() and not overlay.space.own[place]:
            raise PlanError(f"table {shard.table}: {rows.numel()} rows shall be hot, but the overlay leaves it out")
        if rows.numel() and (int(rows[0]) < 0 or int(rows[-1]) >= shard.rows or not bool((rows.diff() > 0).all())):
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
