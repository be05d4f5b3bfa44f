"""Which rows are hot for the classifiers of inputs: from an access profile, a calibration, a placement, or overlays.

The first three are the same on every rank, so nothing is sent. A table that every rank has whole (data parallel) is hot
whole: its look-ups wait for no other memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from torchrec_slipstream.access import AccessProfile, Calibration, TableAccess, least_hot_count
from torchrec_slipstream.errors import ProfileError
from torchrec_slipstream.inputs.rows import RowSets, ShardRows
from torchrec_slipstream.placement import Placement
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.features import ModelTable
from torchrec_slipstream.tbe.overlay import can_hold


def hot_of_profile(tables: Sequence[ModelTable], profile: AccessProfile, budget: int | float | str) -> RowSets:
    """The rows of most look-ups a byte over all tables that fit a budget: FAE's and Slipstream's artefacts (256 MB).

    Args:
        tables: of the model.
        profile: by the tables' names, or their fqns.
        budget: bytes for hot rows with their optimizer state: see :meth:`AccessProfile.budget_bytes`.

    Raises:
        ProfileError: the profile has no counts of a table, or of other rows, or no look-up at all.
    """
    if profile.lookups == 0:
        raise ProfileError("the access profile has no look-ups, so no row is hot; measure more batches, or start later")
    numbers = profile.hot_rows(budget)
    members: dict[str, Tensor | bool] = {}
    for table, access in _counted(tables, profile):
        members[table.fqn] = _mask(table, access.top_rows(numbers[access.name]))
    return RowSets(tables, members | _replicated(tables))


def hot_of_calibration(tables: Sequence[ModelTable], calibration: Calibration, profile: AccessProfile) -> RowSets:
    """FAE's hot rows (arXiv 2103.00686): those with at least t percent of their table's look-ups, and small tables.

    Args:
        tables: of the model.
        calibration: says t, and which tables are hot whole.
        profile: that it was made from.

    Raises:
        ProfileError: the profile has no counts of a table, or of other rows, or the calibration is of others.
    """
    members: dict[str, Tensor | bool] = {}
    for table, access in _counted(tables, profile):
        if access.name not in calibration.tables:
            raise ProfileError(f"table {table.fqn}: the calibration does not know it; calibrate with this profile")
        if calibration.tables[access.name].whole:
            members[table.fqn] = True
            continue
        rows, counts = access.looked_up()
        members[table.fqn] = _mask(table, rows[counts >= least_hot_count(calibration.percent, access.lookups)])
    return RowSets(tables, members | _replicated(tables))


def hot_of_placement(tables: Sequence[ModelTable], placement: Placement) -> RowSets:
    """The rows that a placement has in fast memory. A row of a column-wise sharded table is hot if all its parts are.

    Raises:
        ProfileError: the placement is of other tables.
    """
    by_fqn = {table.fqn: table for table in tables}
    if unknown := sorted({shard.table for shard in placement.shards} - by_fqn.keys()):
        raise ProfileError(f"the placement has table(s) {unknown}, the model {sorted(by_fqn)}; plan for this model")

    def shards() -> Iterable[ShardRows]:
        for one in placement.shards:
            rows = np.full(one.rows, one.whole)
            rows[one.hot_rows] = True
            yield ShardRows(one.table, one.row_offset, one.col_offset, one.columns, rows)

    return RowSets.of_shards(tables, shards(), whole=_replicated(tables))


def hot_of_overlays(
    tables: Sequence[ModelTable], filters: Iterable[UpdateFilter], placement: Placement | None, ranks: Ranks
) -> RowSets:
    """The rows that are in fast memory now: a collective call. Right after a session was attached with a placement,
    those of :func:`hot_of_placement`; tables that the session is not attached to have none.

    Args:
        tables: of the model.
        filters: of this rank.
        placement: that the session was attached with.
        ranks: who share the model.
    """
    planned_whole = {(s.table, s.row_offset, s.col_offset) for s in (placement.shards if placement else ()) if s.whole}
    mine = []
    for one in filters:
        hot = one.overlay.hot_rows_by_shard() if one.overlay is not None else {}
        for place, shard in enumerate(one.shards):
            is_whole = (
                not can_hold(one.found, place) or (shard.fqn, shard.row_offset, shard.col_offset) in planned_whole
            )
            rows = np.full(shard.rows, is_whole)
            if place in hot:
                rows[hot[place].cpu().numpy()] = True
            mine.append(ShardRows.of(shard, rows))
    return RowSets.gathered(tables, mine, ranks, whole=_replicated(tables))


def _counted(tables: Sequence[ModelTable], profile: AccessProfile) -> list[tuple[ModelTable, TableAccess]]:
    """The tables whose rows are hot one by one, with their counts."""
    names = Counter(table.name for table in tables)
    found = []
    for table in tables:
        if table.replicated:
            continue
        name = table.fqn if table.fqn in profile else table.name
        if name not in profile or (name == table.name != table.fqn and names[name] > 1):
            raise ProfileError(
                f"table {table.fqn}: the access profile has no counts of it, so no sample that looks it up could be "
                f"hot; it has {sorted(profile.tables)[:5]}. Measure the profile with this model"
            )
        if profile[name].rows != table.rows:
            raise ProfileError(
                f"table {table.fqn}: it has {table.rows} rows, in the access profile {profile[name].rows}; measure the "
                "profile with this model"
            )
        found.append((table, profile[name]))
    return found


def _replicated(tables: Iterable[ModelTable]) -> dict[str, Tensor | bool]:
    return {table.fqn: True for table in tables if table.replicated}


def _mask(table: ModelTable, rows: np.ndarray) -> Tensor:
    mask = torch.zeros(table.rows, dtype=torch.bool)
    mask[torch.from_numpy(rows)] = True
    return mask
