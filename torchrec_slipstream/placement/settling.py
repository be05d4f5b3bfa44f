"""Once it is known which device holds what: choose the rows of every device, and say what the plan will take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torchrec.distributed.planner.types import Enumerator, PerfModel, PlannerError, ShardingOption

from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.placement.estimators import (
    expected_milliseconds,
    key_of,
    perf_of,
    perf_with_misses,
    storage_of,
)
from torchrec_slipstream.placement.filling import Filling, ShardDemand, fill, filling_of, must_bytes
from torchrec_slipstream.placement.layout import Layout, set_kernel
from torchrec_slipstream.placement.tables import CACHING
from torchrec_slipstream.tbe.memory import CACHE_SET_SLOTS

# A table's fqn, and the position of one of its shards.
ShardKey: TypeAlias = tuple[str, int]


def settle(plan: Sequence[ShardingOption], layout: Layout, enumerator: Enumerator) -> None:
    """Choose the rows of every device for what it was given, book them, and set the plan's kernels.

    Raises:
        PlannerError: a device's memory does not hold what came of it.
    """
    ours = [option for option in plan if layout.booking.placed(option) is not None]
    if layout.has_hbm and ours:
        fillings = settled(plan, layout)
        layout.booking.of_shards.update(fillings)
        for option in ours:
            parts = [fillings[option.fqn, i] for i in range(option.num_shards)]
            hot = sum(part.share.hot_rows for part in parts) / max(1, sum(shard.size[0] for shard in option.shards))
            set_kernel(option, layout.booking.tables[option.fqn], all(part.whole for part in parts), hot)
        enumerator.populate_estimates(ours)
    for device, hbm, ddr in zip(layout.capacity.devices, *bytes_by_device(plan, layout), strict=True):
        for memory, used, has in (("hbm", hbm, device.storage.hbm), ("ddr", ddr, device.storage.ddr)):
            if used > has:
                raise PlannerError(f"device {device.rank} would need {format_bytes(used)} of {memory}")


def bytes_by_device(plan: Sequence[ShardingOption], layout: Layout) -> tuple[list[int], list[int]]:
    """HBM and host memory of a settled plan on each device, with what FBGEMM may round its caches up by."""
    devices = layout.capacity.world_size
    rounding = cache_rounding(plan, layout, frozenset({CACHING}))
    hbm, host = [rounding.get(rank, 0) for rank in range(devices)], [0] * devices
    for option in plan:
        for shard in option.shards:
            assert shard.rank is not None
            hbm[shard.rank] += storage_of(shard).hbm
            host[shard.rank] += storage_of(shard).ddr
    return hbm, host


def settled(plan: Sequence[ShardingOption], layout: Layout) -> dict[ShardKey, Filling]:
    """The rows of every device for what the plan gives it; changes nothing.

    The choice is by device exact: no row of a device is left out for one worth less a byte. A table has one kernel, so
    it is whole either on all its devices or on none.

    Raises:
        PlannerError: a device has not the memory for what every row needs.
    """
    tables = layout.booking.tables
    ours = [option for option in plan if layout.booking.placed(option) is not None]
    whole = {option.fqn for option in ours if tables[option.fqn].may_be_whole}
    rooms, rounding = _rooms(plan, layout), cache_rounding(plan, layout)
    while True:
        fillings = _fill_devices(ours, layout, rooms, rounding, whole)
        split = {
            option.fqn
            for option in ours
            if option.fqn in whole
            and 0 < sum(fillings[option.fqn, i].whole for i in range(option.num_shards)) < option.num_shards
        }
        if not split:
            break
        whole -= split
    _even_out(ours, layout, fillings)
    for option in ours:
        _keep_for_every_row(option, layout, fillings)
    return fillings


class SettledPerfModel(PerfModel):
    """Rates a plan by what it will take when its rows are settled: milliseconds of the slowest device.

    TorchRec's search compares plans by their estimates; those do not know yet which device has room for whose rows.
    """

    def __init__(self, layout: Callable[[], Layout]) -> None:
        self._layout = layout

    def rate(self, plan: list[ShardingOption]) -> float:
        """Raises PlannerError for a plan that does not fit when it is settled."""
        layout = self._layout()
        devices = layout.capacity.world_size
        if not layout.has_hbm:
            return expected_milliseconds(plan, devices)
        booking, fillings = layout.booking, settled(plan, layout)
        times = [0.0] * devices
        for option in plan:
            table = booking.placed(option)
            for i, shard in enumerate(option.shards):
                assert shard.rank is not None
                if table is None:
                    times[shard.rank] += perf_of(shard).total
                    continue
                base = booking.in_hbm[key_of(option)][tuple(shard.size)]
                misses = fillings[option.fqn, i].misses
                times[shard.rank] += perf_with_misses(base, table, shard.size[1], misses, booking.bus).total
        return max(times)


def _fill_devices(
    ours: Sequence[ShardingOption], layout: Layout, rooms: Sequence[int], rounding: Mapping[int, int], whole: set[str]
) -> dict[ShardKey, Filling]:
    demands: list[dict[ShardKey, ShardDemand]] = [{} for _ in rooms]
    for option in ours:
        for i, shard in enumerate(option.shards):
            assert shard.rank is not None
            demands[shard.rank][option.fqn, i] = _demand(option, i, layout, option.fqn in whole)
    fillings: dict[ShardKey, Filling] = {}
    for rank, mine in enumerate(demands):
        wanting, budget = list(mine.values()), layout.budgets[rank]
        filled = fill(wanting, budget, rooms[rank] - rounding.get(rank, 0))
        if filled is None:  # nothing hot, then, and no cache that would be rounded up
            must = must_bytes(wanting)
            filled = fill(wanting, must, rooms[rank]) if must <= budget else None
        if filled is None:
            has = min(layout.budgets[rank], rooms[rank])
            raise PlannerError(f"device {rank} has {format_bytes(has)} of HBM for its rows, which is too little")
        fillings.update({key: filled[demand.key] for key, demand in mine.items()})
    return fillings


def _rooms(plan: Sequence[ShardingOption], layout: Layout) -> list[int]:
    """HBM of each device for rows: what the inputs, the outputs, the session and other tables leave of it."""
    rooms = [device.storage.hbm for device in layout.capacity.devices]
    for option in plan:
        io = layout.booking.io[key_of(option)] if layout.booking.placed(option) is not None else None
        for i, shard in enumerate(option.shards):
            assert shard.rank is not None
            session = layout.booking.session_bytes(shard.size[0])
            rooms[shard.rank] -= storage_of(shard).hbm if io is None else io[i] + session
    return rooms


def cache_rounding(
    plan: Sequence[ShardingOption], layout: Layout, kernels: frozenset[str] | None = None
) -> dict[int, int]:
    """HBM by device that FBGEMM's caches may take beyond their slots: each TBE's is rounded up to whole sets.

    Args:
        kernels: count tables of these compute kernels only; default: all that may get a cache.
    """
    slots: dict[tuple[Any, ...], int] = {}
    for option in plan:
        table = layout.booking.placed(option)
        if table is None or table.backing != "caching" or not table.holds_hot_rows:
            continue
        if kernels is not None and option.compute_kernel not in kernels:
            continue
        for shard in option.shards:
            assert shard.rank is not None
            # TorchRec makes one TBE of what is alike in these.
            alike = (option.path, option.sharding_type, option.tensor.dtype, table.pooling, shard.size[1])
            slots[shard.rank, *alike] = table.bytes_of(shard.size[1]).hot
    rounding: dict[int, int] = {}
    for (rank, *_), hot in slots.items():
        rounding[rank] = rounding.get(rank, 0) + (CACHE_SET_SLOTS - 1) * hot
    return rounding


def _keep_for_every_row(option: ShardingOption, layout: Layout, fillings: dict[ShardKey, Filling]) -> None:
    """A table with hot rows on one device has a cache, or an overlay, on all of them."""
    parts = [fillings[option.fqn, i] for i in range(option.num_shards)]
    if any(part.share.hot_rows for part in parts) and not all(part.whole for part in parts):
        for i, (shard, part) in enumerate(zip(option.shards, parts, strict=True)):
            fixed = shard.size[0] * layout.booking.tables[option.fqn].bytes_of(shard.size[1]).fixed
            fillings[option.fqn, i] = replace(part, fixed=fixed)


def _demand(option: ShardingOption, position: int, layout: Layout, may_be_whole: bool) -> ShardDemand:
    shard, table = option.shards[position], layout.booking.tables[option.fqn]
    histogram = table.histogram(shard.offset[0], shard.size[0])
    return ShardDemand(f"{option.fqn}@{position:04}", table, histogram, shard.size[1], may_be_whole)


def _even_out(ours: Sequence[ShardingOption], layout: Layout, fillings: dict[ShardKey, Filling]) -> None:
    """TorchRec's cache has one load factor a table: give all its shards that, without taking more on any device."""
    mean: dict[str, float] = {}
    wanted: dict[int, float] = {}
    given: dict[int, float] = {}
    for option in ours:
        parts = [fillings[option.fqn, i] for i in range(option.num_shards)]
        cached = layout.booking.tables[option.fqn].backing == "caching"
        if not cached or option.num_shards == 1 or all(part.whole for part in parts):
            continue
        rows = sum(shard.size[0] for shard in option.shards)
        mean[option.fqn] = sum(part.share.hot_rows for part in parts) / max(1, rows)
        for shard, part in zip(option.shards, parts, strict=True):
            assert shard.rank is not None
            hot_bytes = layout.booking.tables[option.fqn].bytes_of(shard.size[1]).hot
            given[shard.rank] = given.get(shard.rank, 0.0) + part.share.hot_rows * hot_bytes
            wanted[shard.rank] = wanted.get(shard.rank, 0.0) + mean[option.fqn] * shard.size[0] * hot_bytes
    for option in ours:
        if option.fqn not in mean:
            continue
        ranks = [shard.rank for shard in option.shards if shard.rank is not None]
        mean[option.fqn] *= min(given[rank] / max(wanted[rank], given[rank], 1e-9) for rank in ranks)
        for i, shard in enumerate(option.shards):
            rows = int(mean[option.fqn] * shard.size[0] + 1e-6)
            if rows != fillings[option.fqn, i].share.hot_rows:
                fillings[option.fqn, i] = filling_of(_demand(option, i, layout, False), rows)
