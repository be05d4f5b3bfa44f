"""From TorchRec's plan and what was booked for it to the placement."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torchrec.distributed.planner.types import ShardingOption

from torchrec_slipstream.access import CountHistogram
from torchrec_slipstream.placement.allocation import TableShare, hot_rows_of
from torchrec_slipstream.placement.estimators import expected_milliseconds
from torchrec_slipstream.placement.filling import Filling
from torchrec_slipstream.placement.layout import Layout
from torchrec_slipstream.placement.placement import Placement, ShardPlacement, TablePlacement
from torchrec_slipstream.placement.settling import bytes_by_device
from torchrec_slipstream.placement.tables import PlannedTable


def placement_of(plan: Sequence[ShardingOption], layout: Layout) -> Placement:
    """The placement that a settled plan and its bookings say."""
    devices = layout.capacity.devices
    hbm, host = bytes_by_device(plan, layout)
    tables: dict[str, TablePlacement] = {}
    shards: list[ShardPlacement] = []
    for option in plan:
        table = layout.booking.placed(option)
        if table is not None:
            parts = [_shard(option, i, table, layout) for i in range(option.num_shards)]
            shards += parts
            tables[option.fqn] = _table(option, table, parts)
    return Placement(
        tables=dict(sorted(tables.items())),
        shards=tuple(sorted(shards, key=lambda one: (one.rank, one.table, one.row_offset, one.col_offset))),
        hbm_budget=max(layout.budgets, default=0) if layout.has_hbm else 0,
        hbm_bytes=tuple(hbm),
        host_bytes=tuple(host),
        hbm_capacity=tuple(device.storage.hbm for device in devices),
        host_capacity=tuple(device.storage.ddr for device in devices),
        expected_ms=expected_milliseconds(plan, len(devices)),
        backing=layout.backing,
    )


def _shard(option: ShardingOption, position: int, table: PlannedTable, layout: Layout) -> ShardPlacement:
    shard = option.shards[position]
    (rows, columns), (row_offset, col_offset) = shard.size, shard.offset
    histogram = table.histogram(row_offset, rows)
    filling = layout.booking.of_shards.get((option.fqn, position))  # None on a CPU, where nothing is hot
    hbm_bytes, host_bytes, misses = layout.booking.rows_bytes(option, position)
    if not layout.has_hbm:
        hbm_bytes, host_bytes = 0, hbm_bytes + host_bytes
    assert shard.rank is not None
    return ShardPlacement(
        table=option.fqn,
        rank=shard.rank,
        row_offset=row_offset,
        col_offset=col_offset,
        rows=rows,
        columns=columns,
        whole=filling is not None and filling.whole,
        hot_rows=_hot_rows(table, row_offset, rows, filling.share)
        if filling is not None and not filling.whole
        else np.zeros(0, dtype=np.int64),
        lookups=round(table.lookups_of(histogram)),
        hot_lookups=_hot_lookups(table, histogram, filling),
        hbm_bytes=hbm_bytes,
        host_bytes=host_bytes,
        placed_bytes=filling.placed if filling is not None else 0,
        misses=misses,
    )


def _hot_lookups(table: PlannedTable, histogram: CountHistogram, filling: Filling | None) -> int:
    """Of as many look-ups as the shard had, those that its hot rows can expect; all where it is whole.

    By what rows of equal counts had later, where the profile knows: past look-ups flatter the rows chosen by them.
    """
    if filling is None:
        return 0
    lookups = table.lookups_of(histogram)
    if filling.whole or filling.share.hot_rows == histogram.total_rows:
        return round(lookups)
    worth = table.access.worth(histogram)
    if worth is None:
        return filling.share.hot_lookups
    share = filling.share
    hot = np.where(histogram.counts > share.least_count, histogram.rows, 0)
    hot[histogram.counts == share.least_count] = share.ties
    expected = float(histogram.rows @ worth)
    return round(lookups * float(hot @ worth) / expected) if expected else 0


def _hot_rows(table: PlannedTable, begin: int, rows: int, share: TableShare) -> npt.NDArray[np.int64]:
    """int64, ascending, counted from the shard's first row."""
    access = table.access
    if access.ids is None:
        return hot_rows_of(access.counts_of(begin, begin + rows), share)
    low, high = np.searchsorted(access.ids, [begin, begin + rows])
    return hot_rows_of(access.counts[low:high], share, access.ids[low:high] - begin)


def _table(option: ShardingOption, table: PlannedTable, parts: Sequence[ShardPlacement]) -> TablePlacement:
    # A column shard holds its part of each row, so shards weigh by their columns.
    lookups = sum(part.lookups * part.columns for part in parts)
    hot = sum(part.hot_lookups * part.columns for part in parts)
    hot_rows = sum((part.rows if part.whole else len(part.hot_rows)) * part.columns for part in parts)
    return TablePlacement(
        fqn=option.fqn,
        name=option.name,
        kernel=option.compute_kernel,
        sharding_type=option.sharding_type,
        rows=table.rows,
        dim=table.dim,
        load_factor=option.cache_load_factor,
        hot_rows=hot_rows // table.dim,
        lookups=table.access.lookups,
        hit_rate=hot / lookups if lookups else float("nan"),
        hbm_bytes=sum(part.hbm_bytes for part in parts),
        host_bytes=sum(part.host_bytes for part in parts),
    )
