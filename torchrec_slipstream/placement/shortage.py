"""Why there is no plan: what is short, by how much, and what would fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchrec.distributed.planner.types import Enumerator, ShardingOption, Topology

from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.placement.estimators import key_of, storage_of
from torchrec_slipstream.placement.layout import Layout


def explain_shortage(topology: Topology, layout: Layout, enumerator: Enumerator, upstream: str) -> str:
    """The message for tables that do not fit, whatever is hot.

    Args:
        topology: the devices, before the storage reservation.
        upstream: what TorchRec's planner said last.
    """
    # With nothing hot a table needs the least HBM; the least that any of its options needs bounds the total.
    layout.choose(layout.options, 0.0)
    enumerator.populate_estimates(layout.options)
    least = _least(layout)
    devices = topology.world_size
    lines = [_head(topology, len(least))]
    remedies: list[str] = []
    for memory in ("hbm", "ddr"):
        needed = sum(getattr(storage, memory) for storage, _ in least.values())
        had = sum(getattr(device.storage, memory) for device in layout.capacity.devices)
        total = sum(getattr(device.storage, memory) for device in topology.devices)
        what = "HBM" if memory == "hbm" else "host memory"
        if memory == "hbm" and not layout.has_hbm:
            continue
        if needed > had:
            reserved = f" ({format_bytes(total)} less the reservation)" if total > had else ""
            lines.append(
                f"{what}: at least {format_bytes(needed)} are needed, {format_bytes(had)} are there{reserved}: "
                f"{format_bytes(needed - had)} too little."
            )
            more = _devices_needed(layout, least, memory, had // devices)
            if more is not None:
                remedies.append(f"{more} such devices instead of {devices}")
            remedies.append(
                f"{format_bytes(math.ceil(needed / devices) + (total - had) // devices)} of {what} a device"
            )
            largest = max(least, key=lambda fqn: getattr(least[fqn][0], memory))
            remedies.append(
                f"a smaller table {largest} (it alone needs {format_bytes(getattr(least[largest][0], memory))})"
            )
    if not remedies:
        lines += _too_large_for_one(layout, least, remedies)
    if not remedies:
        lines.append(f"In total they would fit, but no way was found to lay them out. TorchRec: {_last(upstream)}")
        remedies.append("fewer constraints on sharding types and compute kernels, or smaller batches")
    lines.append("What would fit: " + "; or ".join(remedies) + ".")
    return "\n  ".join(lines)


def _devices_needed(
    layout: Layout, least: dict[str, tuple[_Bytes, ShardingOption]], memory: str, each: int
) -> int | None:
    """How many devices of so many bytes would do; None where inputs and outputs, which grow with their number, are too
    large a part to say."""
    needed = sum(getattr(storage, memory) for storage, _ in least.values())
    io = sum(
        sum(layout.booking.io.get(key_of(option), [0]))
        for _, option in least.values()
        if (memory == "hbm") == layout.has_hbm
    )
    alike = len({getattr(device.storage, memory) for device in layout.capacity.devices}) == 1
    if each <= 0 or io > needed // 20 or not alike:
        return None
    # Room for as much input and output on each new device as on those that there are.
    return math.ceil(needed / max(1, each - 2 * io // layout.capacity.world_size))


@dataclass(frozen=True)
class _Bytes:
    hbm: int
    ddr: int


def _least(layout: Layout) -> dict[str, tuple[_Bytes, ShardingOption]]:
    """By fqn, the least HBM that one of the table's options needs, and that option."""
    least: dict[str, tuple[_Bytes, ShardingOption]] = {}
    for option in layout.options:
        total = option.total_storage
        mine = _Bytes(total.hbm, total.ddr)
        if option.fqn not in least or (mine.hbm, mine.ddr) < (least[option.fqn][0].hbm, least[option.fqn][0].ddr):
            least[option.fqn] = (mine, option)
    return least


def _too_large_for_one(
    layout: Layout, least: dict[str, tuple[_Bytes, ShardingOption]], remedies: list[str]
) -> list[str]:
    """Tables of which every option has a shard that no device can hold."""
    lines = []
    for memory, what in (("hbm", "HBM"), ("ddr", "host memory")):
        most = max(getattr(device.storage, memory) for device in layout.capacity.devices)
        for fqn in least:
            mine = [option for option in layout.options if option.fqn == fqn]
            smallest = min(max(getattr(storage_of(shard), memory) for shard in option.shards) for option in mine)
            if smallest > most:
                types = ", ".join(sorted({option.sharding_type for option in mine}))
                lines.append(
                    f"Table {fqn}: its largest shard needs {format_bytes(smallest)} of {what} with the sharding types "
                    f"it may have ({types}), and a device has {format_bytes(most)}: {format_bytes(smallest - most)} "
                    "too little."
                )
                remedies.append(f"row-wise sharding of {fqn}, or {format_bytes(smallest)} of {what} a device")
    return lines


def _head(topology: Topology, tables: int) -> str:
    def range_of(memory: str) -> str:
        sizes = sorted(getattr(device.storage, memory) for device in topology.devices)
        smallest, largest = format_bytes(sizes[0]), format_bytes(sizes[-1])
        return smallest if smallest == largest else f"{smallest} to {largest}"

    hbm = f"{range_of('hbm')} of HBM and " if any(device.storage.hbm for device in topology.devices) else ""
    return (
        f"there is no plan: {tables} tables do not fit {topology.world_size} {topology.compute_device} device(s) with "
        f"{hbm}{range_of('ddr')} of host memory each, even with nothing hot."
    )


def _last(upstream: str) -> str:
    lines = [line.strip() for line in upstream.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
