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
    asked = _check(overlay, wanted)
    overlay.wait_for_prefetch()
    moved = Moved()
    for pool, numbers in asked:
        moved += _migrate_pool(overlay, pool, wanted, numbers, chunk_bytes)
    return moved


def _migrate_pool(overlay: Overlay, pool: Pool, wanted: Mapping[int, Tensor], asked: Tensor, chunk_bytes: int) -> Moved:
    """``asked``: int64 ``[n]``, ascending, the numbers of the pool's wanted rows."""
    rows_at_once = max(1, chunk_bytes // pool.row_bytes)
    taken = overlay.taken(pool)
    free = positions_of(~taken)
    if not wanted.keys() >= set(pool.shards):
        for place, rows in overlay.by_shard(pool, positions_of(taken)):
            if place not in wanted:
                taken[overlay.slots_of(place, rows)] = False
    slots = overlay.words.index_select(0, asked)
    cold = positions_of(slots < 0)
    taken[slots[positions_of(slots >= 0)].long()] = False  # these stay: what is still marked now, leaves
    coming = asked.index_select(0, cold)
    leaving = pool.owner.index_select(0, positions_of(taken)).sort().values
    demoted, promoted = leaving.numel(), coming.numel()
    leave = list(leaving.split(rows_at_once)) if demoted else []
    for numbers in coming.split(rows_at_once) if promoted else ():
        while free.numel() < numbers.numel():
            free = torch.cat([free, overlay.demote(pool, leave.pop())])
        overlay.promote(pool, numbers, free[: numbers.numel()])
        free = free[numbers.numel() :]
    for numbers in leave:
        overlay.demote(pool, numbers)
    return Moved(demoted, promoted, (demoted + promoted) * pool.row_bytes)


def _check(overlay: Overlay, wanted: Mapping[int, Tensor]) -> list[tuple[Pool, Tensor]]:
    """The pools with something to do, each with the numbers of its wanted rows, which are good."""
    for place, rows in wanted.items():
        if rows.numel() and not overlay.space.own[place]:
            name = overlay.shards[place].table
            raise PlanError(f"table {name}: {rows.numel()} rows shall be hot, but the overlay leaves it out")
    asked = []
    for pool in overlay.pools:
        places = [place for place in pool.shards if place in wanted]
        if not places:
            continue
        numbers, good = _numbers(overlay, places, [wanted[place] for place in places])
        if not good:
            raise PlanError(_what_is_bad(overlay, {place: wanted[place] for place in places}))
        asked.append((pool, numbers))
        hot = numbers.numel() + sum(overlay.hot_rows(place).numel() for place in pool.shards if place not in wanted)
        if hot > pool.slots:
            names = ", ".join(sorted({overlay.shards[place].table for place in pool.shards}))
            raise PlanError(
                f"table(s) {names}: {hot} rows shall be hot, but their overlay has {pool.slots} slots; "
                "give fewer rows, or attach with a greater budget"
            )
    return asked


def _numbers(overlay: Overlay, places: list[int], rows: list[Tensor]) -> tuple[Tensor, bool]:
    """The numbers of the shards' rows, all at once (each look at one on a GPU waits for it), and whether all are good.

    Shards have their numbers one after the other, so what ascends in each of them ascends in all.
    """
    device = overlay.device
    of_shard = [
        (len(some), overlay.space.begins[place], overlay.shards[place].rows)
        for place, some in zip(places, rows, strict=True)
    ]
    lengths, begins, sizes = torch.tensor(of_shard, dtype=torch.int64).T.to(device)
    local = torch.cat(rows)
    shard = torch.arange(len(places), device=device).repeat_interleave(lengths, output_size=local.numel())
    numbers = local + begins.index_select(0, shard)
    good = ((local >= 0) & (local < sizes.index_select(0, shard))).all() & (numbers[1:] > numbers[:-1]).all()
    return numbers, bool(good)


def _what_is_bad(overlay: Overlay, wanted: Mapping[int, Tensor]) -> str:
    for place, rows in wanted.items():
        shard = overlay.shards[place]
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= shard.rows or not bool((rows.diff() > 0).all())):
            return (
                f"table {shard.table}: its hot rows from {int(rows[0])} to {int(rows[-1])} are not ascending rows of "
                f"this shard's {shard.rows}"
            )
    raise AssertionError("all rows are good")
