"""What a sharding option takes of memory and time, from TorchRec's estimates and what the rows are known to need.

TorchRec's own estimators give the inputs, outputs and communication. What differs is the tables: every byte that
FBGEMM allocates is counted (see ``tbe/memory.py``), and a table in host memory costs what it costs in HBM, plus the
measured misses at the bandwidth of the bus, instead of a fixed part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Perf,
    Shard,
    ShardEstimator,
    ShardingOption,
    Storage,
    Topology,
)

from torchrec_slipstream.placement.filling import Filling
from torchrec_slipstream.placement.tables import FUSED, UVM, PlannedTable, is_placed
from torchrec_slipstream.tbe.memory import SESSION_BYTES

# A table's fqn, how it is sharded, and where its last shard begins.
OptionKey: TypeAlias = tuple[str, str, tuple[int, ...]]


@dataclass
class Booking:
    """What is decided so far about each table's rows; the estimators read it.

    Attributes:
        tables: those whose rows can be placed, by fqn.
        fillings: of whole tables, by fqn: the proposal's, before it is known which device holds what.
        of_shards: of single shards, by fqn and position: the plan's.
        io: bytes of inputs and outputs of an option's shards; they do not depend on the rows.
        in_hbm: times of an option's shards by size, were the table in HBM.
        placed_weight: bytes that a byte of a proposal's hot rows and whole tables is booked as. TorchRec's partitioner
            knows the devices' memory, but no budget: weighed so, what fits the memory also keeps to the budget.
        bus: bytes a millisecond between HBM and host memory.
        tracked: whether the bytes that an attached session keeps a row are counted.
        on_cpu: whether the devices have no HBM.
        enumerating: TorchRec lists all options, of which few are kept: nothing needs to be estimated yet.
    """

    bus: float
    tracked: bool = True
    on_cpu: bool = False
    enumerating: bool = True
    placed_weight: float = 1.0
    tables: dict[str, PlannedTable] = field(default_factory=dict)
    fillings: dict[str, Filling] = field(default_factory=dict)
    of_shards: dict[tuple[str, int], Filling] = field(default_factory=dict)
    io: dict[OptionKey, list[int]] = field(default_factory=dict)
    in_hbm: dict[OptionKey, dict[tuple[int, ...], Perf]] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget the last planning run."""
        self.enumerating = True
        self.placed_weight = 1.0
        for known in (self.tables, self.fillings, self.of_shards, self.io, self.in_hbm):
            known.clear()

    def split(
        self, options: list[ShardingOption], estimate: Callable[[list[ShardingOption]], None]
    ) -> list[ShardingOption]:
        """The options whose rows can be placed; the ``others`` are estimated as TorchRec does."""
        estimate([option for option in options if self.placed(option) is None])
        return [option for option in options if self.placed(option) is not None]

    def placed(self, option: ShardingOption) -> PlannedTable | None:
        return self.tables.get(option.fqn) if is_placed(option) else None

    def session_bytes(self, rows: int) -> int:
        """What an attached session keeps on the device for so many rows."""
        return rows * SESSION_BYTES if self.tracked else 0

    def rows_bytes(self, option: ShardingOption, position: int) -> tuple[int, int, float]:
        """HBM bytes, host bytes and misses a step of one shard's rows."""
        table, (rows, columns) = self.tables[option.fqn], option.shards[position].size
        a_row = table.bytes_of(columns)
        session = self.session_bytes(rows)
        if self.on_cpu:
            return session, rows * a_row.whole, 0.0
        known = self.of_shards.get((option.fqn, position))
        if known is not None:
            host = 0 if known.whole else rows * a_row.host
            return known.placed + known.fixed + session, host, known.misses
        filling = self.fillings.get(option.fqn)
        if filling is None:  # before rows are chosen: nothing is hot
            return rows * a_row.cold + session, rows * a_row.host, 0.0
        if filling.whole:
            return int(rows * a_row.whole * self.placed_weight) + session, 0, 0.0
        part = rows / table.rows
        placed = int(filling.share.hot_rows * part * a_row.hot * self.placed_weight)
        return placed + int(filling.fixed * part) + session, rows * a_row.host, filling.misses * part


class RowStorageEstimator(ShardEstimator):
    """Bytes of HBM and host memory a shard."""

    def __init__(
        self, topology: Topology, constraints: Mapping[str, ParameterConstraints] | None, booking: Booking
    ) -> None:
        self._stock = EmbeddingStorageEstimator(topology=topology, constraints=dict(constraints or {}))
        self._booking = booking
        self._on_cpu = topology.compute_device == "cpu"

    def estimate(self, sharding_options: list[ShardingOption], *sharders: Any, **named_sharders: Any) -> None:
        """Set ``shard.storage``. The sharders' argument differs between TorchRec's releases and is handed on."""
        booking = self._booking
        if booking.enumerating:
            nothing = Storage(0, 0)  # one for all, as TorchRec copies what it has listed
            for shard in (shard for option in sharding_options for shard in option.shards):
                shard.storage = nothing
            return
        ours = booking.split(sharding_options, lambda others: self._stock.estimate(others, *sharders, **named_sharders))
        new = [option for option in ours if key_of(option) not in booking.io]
        # A table in host memory without an optimizer: what it takes besides its weights are inputs and outputs.
        plain = [copy_of(option, FUSED if self._on_cpu else UVM, option.shards) for option in new]
        self._stock.estimate(plain, *sharders, **named_sharders)
        for option in plain:
            storages = [storage_of(shard) for shard in option.shards]
            if self._on_cpu:
                weights = booking.tables[option.fqn].element_size
                sizes = [math.prod(shard.size) * weights for shard in option.shards]
                booking.io[key_of(option)] = [one.ddr - size for one, size in zip(storages, sizes, strict=True)]
            else:
                booking.io[key_of(option)] = [one.hbm for one in storages]
        for option in ours:
            for position, shard in enumerate(option.shards):
                io = booking.io[key_of(option)][position]
                hbm, host, _ = booking.rows_bytes(option, position)
                shard.storage = Storage(0, io + hbm + host) if self._on_cpu else Storage(io + hbm, host)


class RowPerfEstimator(ShardEstimator):
    """Milliseconds of a step a shard."""

    def __init__(
        self, topology: Topology, constraints: Mapping[str, ParameterConstraints] | None, booking: Booking
    ) -> None:
        self._stock = EmbeddingPerfEstimator(topology=topology, constraints=dict(constraints or {}))
        self._booking = booking

    def estimate(self, sharding_options: list[ShardingOption], *sharders: Any, **named_sharders: Any) -> None:
        """Set ``shard.perf``: the time in HBM, plus what each distinct cold row of a batch takes on the bus.

        It is read once in the forward, and once written in the backward, with its state where that is not in HBM.
        """
        booking = self._booking
        if booking.enumerating:
            nothing = Perf(0.0, 0.0, 0.0, 0.0)
            for shard in (shard for option in sharding_options for shard in option.shards):
                shard.perf = nothing
            return
        ours = booking.split(sharding_options, lambda others: self._stock.estimate(others, *sharders, **named_sharders))
        # One shard of each size stands for all: TorchRec estimates 128 equal ones one by one otherwise.
        new = [option for option in ours if key_of(option) not in booking.in_hbm]
        fused = []
        for option in new:
            by_size = {tuple(shard.size): shard for shard in option.shards}
            fused.append(copy_of(option, FUSED, list(by_size.values())))
        self._stock.estimate(fused, *sharders, **named_sharders)
        for option, one in zip(new, fused, strict=True):
            booking.in_hbm[key_of(option)] = {tuple(shard.size): perf_of(shard) for shard in one.shards}
        for option in ours:
            table = booking.tables[option.fqn]
            for position, shard in enumerate(option.shards):
                base = booking.in_hbm[key_of(option)][tuple(shard.size)]
                _, _, misses = booking.rows_bytes(option, position)
                shard.perf = perf_with_misses(base, table, shard.size[1], misses, booking.bus)


def perf_with_misses(base: Perf, table: PlannedTable, columns: int, misses: float, bus: float) -> Perf:
    """The times of a shard: those in HBM, and those of its misses on a bus of so many bytes a millisecond."""
    weights = columns * table.element_size
    written = weights + table.bytes_of(columns).state_moved
    return Perf(
        fwd_compute=base.fwd_compute + misses * weights / bus,
        fwd_comms=base.fwd_comms,
        bwd_compute=base.bwd_compute + misses * written / bus,
        bwd_comms=base.bwd_comms,
        input_dist_comms=base.input_dist_comms,
    )


def key_of(option: ShardingOption) -> OptionKey:
    """Names an option among those that differ in more than the kernel."""
    return option.fqn, option.sharding_type, tuple(option.shards[-1].offset)


def copy_of(option: ShardingOption, kernel: str, shards: Sequence[Shard]) -> ShardingOption:
    """The same option with another kernel, no cache, weights that have no optimizer, and copies of some shards."""
    return ShardingOption(
        name=option.name,
        tensor=torch.empty(option.tensor.shape, dtype=option.tensor.dtype, device="meta"),
        module=option.module,
        input_lengths=option.input_lengths,
        batch_size=option.batch_size,
        sharding_type=option.sharding_type,
        partition_by=option.partition_by,
        compute_kernel=kernel,
        shards=[Shard(size=shard.size, offset=shard.offset) for shard in shards],
        is_pooled=option.is_pooled,
        feature_names=option.feature_names,
        output_dtype=option.output_dtype,
        num_poolings=option.num_poolings,
    )


def storage_of(shard: Shard) -> Storage:
    """The shard's storage, which an estimator has set."""
    assert shard.storage is not None
    return shard.storage


def perf_of(shard: Shard) -> Perf:
    """The shard's times, which an estimator has set."""
    assert shard.perf is not None
    return shard.perf


def expected_milliseconds(options: Sequence[ShardingOption], devices: int) -> float:
    """Of a step's embedding part: of the slowest device, as TorchRec's own ``NoopPerfModel`` rates a plan."""
    times = [0.0] * devices
    for option in options:
        for shard in option.shards:
            assert shard.rank is not None
            times[shard.rank] += perf_of(shard).total
    return max(times, default=0.0)
