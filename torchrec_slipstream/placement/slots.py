"""How many slots each overlay gets, and which rows it begins with: from a placement, or from a budget alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.placement.placement import Placement, ShardPlacement
from torchrec_slipstream.tbe import FoundTbe
from torchrec_slipstream.tbe.memory import SLOT_WORD_BYTES
from torchrec_slipstream.tbe.overlay import can_hold, row_bytes_of


def placed_shards(found: Sequence[FoundTbe], placement: Placement, rank: int) -> list[list[ShardPlacement | None]]:
    """What the placement says of each shard of each TBE of this rank; None of one that it does not know.

    Raises:
        AttachError: the placement is of another model, sharding or backing.
    """
    if placement.backing != "uvm" and any(len(shard.hot_rows) for shard in placement.shards):
        raise AttachError(
            f"this placement was planned with backing={placement.backing!r}: its hot rows are for FBGEMM's own cache, "
            "which the sharding plan sets up. For an overlay, plan with SlipstreamPlanner(..., backing='uvm')"
        )
    planned = {(shard.table, shard.row_offset, shard.col_offset): shard for shard in placement.on(rank)}
    matched = []
    for one in found:
        mine = [planned.pop((shard.fqn, shard.row_offset, shard.col_offset), None) for shard in one.shards]
        for shard, plan in zip(one.shards, mine, strict=True):
            if plan is not None and (plan.rows, plan.columns) != (shard.rows, shard.dim):
                raise AttachError(
                    f"table {shard.table}: the placement has a shard of {plan.rows} x {plan.columns} at row "
                    f"{shard.row_offset}, the model one of {shard.rows} x {shard.dim}; plan again for this model"
                )
            if plan is not None and not plan.has_good_rows:
                raise AttachError(
                    f"table {shard.table}: the hot rows of the placement's shard at row {shard.row_offset} are not "
                    f"ascending rows of its {shard.rows}; plan again, or give ShardPlacement.hot_rows so"
                )
        matched.append(mine)
    if missing := [key for key, shard in planned.items() if len(shard.hot_rows)]:
        table, row, column = missing[0]
        known = sorted({shard.fqn for one in found for shard in one.shards})
        raise AttachError(
            f"table {table!r}: the placement has hot rows of its shard at row {row}, column {column} on rank {rank}, "
            f"but the model has no such shard there (it has tables {known[:5]}). Give the placement that was planned "
            "together with this model's sharding"
        )
    return matched


def may_be_hot(
    found: FoundTbe, placement: Placement | None, planned: Sequence[ShardPlacement | None] | None
) -> list[bool]:
    """For each shard, whether it gets slot words.

    Of a placement, those that it counted them for: of tables with hot rows. Without one those whose rows are counted,
    as the others would never be found hot.
    """
    if placement is None or planned is None:
        return [shard.counted and can_hold(found, place) for place, shard in enumerate(found.shards)]
    return [
        plan is not None and not plan.whole and placement.tables[plan.table].hot_rows > 0 and can_hold(found, place)
        for place, plan in enumerate(planned)
    ]


def slots_of_placement(found: FoundTbe, planned: Sequence[ShardPlacement | None]) -> Counter[int]:
    """Slots by dim for the rows that the placement has hot.

    Raises:
        AttachError: a table's rows cannot be hot.
    """
    slots: Counter[int] = Counter()
    for place, (shard, plan) in enumerate(zip(found.shards, planned, strict=True)):
        hot = 0 if plan is None else len(plan.hot_rows)
        if hot and not can_hold(found, place):
            raise AttachError(
                f"table {shard.table}: the placement has {hot} hot rows of it, but the table is in HBM whole; plan and "
                "shard the model together"
            )
        slots[shard.dim] += hot
    return slots


def first_rows(found: FoundTbe, planned: Sequence[ShardPlacement | None]) -> dict[int, Tensor]:
    """The rows that a placement has hot, by the shard's place: int64 ``[n]``, ascending, local."""
    device = found.tbe.current_device
    return {
        place: torch.from_numpy(plan.hot_rows).to(device)
        for place, plan in enumerate(planned)
        if plan is not None and can_hold(found, place)
    }


def planned_overlay_bytes(placement: Placement) -> int:
    """Bytes of fast memory that the placement's hot rows and slot words take, over all ranks."""
    sharded = [shard for shard in placement.shards if not shard.whole]
    words = sum(shard.rows for shard in sharded if placement.tables[shard.table].hot_rows)
    return sum(shard.placed_bytes for shard in sharded) + SLOT_WORD_BYTES * words


def slots_of_budget(found: Sequence[FoundTbe], budget: int) -> list[Counter[int]]:
    """Slots by dim for each TBE: the budget shared out by the bytes of the tables that can have hot rows.

    Raises:
        AttachError: the budget is too small for a hot row.
    """
    rows: Counter[tuple[int, int]] = Counter()
    size: dict[tuple[int, int], int] = {}
    others = 0
    for i, one in enumerate(found):
        for place, wanted in enumerate(may_be_hot(one, None, None)):
            if not wanted:
                others += 1  # whose rows share a slot word
            else:
                key = i, one.shards[place].dim
                rows[key] += one.shards[place].rows
                size[key] = row_bytes_of(one.tbe, place)
    slots: list[Counter[int]] = [Counter() for _ in found]
    if not rows:
        return slots
    words = SLOT_WORD_BYTES * (others + sum(rows.values()))
    whole = sum(rows[key] * size[key] for key in rows)
    share = min(1.0, max(0, budget - words) / whole)
    for (i, dim), count in rows.items():
        slots[i][dim] = int(count * share)
    if not any(sum(dims.values()) for dims in slots):
        raise AttachError(
            f"hbm_budget={budget} ({format_bytes(budget)}) leaves nothing for hot rows: the slot words of the "
            f"{sum(rows.values()):,} rows that can be hot on this rank take {format_bytes(words)}, and a row takes "
            f"{min(size.values())} bytes or more. Give more than {format_bytes(words + whole // 100)}, for a hundredth "
            "of the rows"
        )
    return slots
