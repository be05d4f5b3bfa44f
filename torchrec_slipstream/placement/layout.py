"""One planning run: which options there are, and which rows to book for them before it is known what lies where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torchrec.distributed.planner.types import Enumerator, ShardingOption, Topology
from torchrec.distributed.types import ModuleSharder

from torchrec_slipstream.access import AccessProfile
from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.placement.estimators import Booking
from torchrec_slipstream.placement.filling import ShardDemand, fill, must_bytes
from torchrec_slipstream.placement.proposer import one_kernel_each
from torchrec_slipstream.placement.tables import (
    CACHING,
    FUSED,
    PLACED_KERNELS,
    UVM,
    PlannedTable,
    plan_tables,
    set_pooling,
)


class Layout:
    """Books rows for the options of one planning run.

    Args:
        capacity: the topology with the storage reservation taken off.
        budgets: bytes a device for hot rows and whole tables.
        booking: where the choice is kept, which the estimators read.
        pooling_given: names of tables whose pooling factors the constraints give.
    """

    def __init__(
        self,
        profile: AccessProfile,
        sharders: Sequence[ModuleSharder[nn.Module]],
        capacity: Topology,
        budgets: Sequence[int],
        booking: Booking,
        *,
        backing: str,
        batch_size: int,
        pooling_given: frozenset[str],
    ) -> None:
        self.profile = profile
        self.sharders = sharders
        self.capacity = capacity
        self.budgets = list(budgets)
        self.booking = booking
        self.backing = backing
        self.pooling_given = pooling_given
        self.global_batch = batch_size * capacity.world_size
        self.has_hbm = capacity.compute_device != "cpu"
        self.options: list[ShardingOption] = []

    def prepare(self, search_space: Sequence[ShardingOption], enumerator: Enumerator) -> list[ShardingOption]:
        """The options to lay out: one a table and sharding type; data parallel only where there is nothing else."""
        tables = plan_tables(
            search_space, self.sharders, self.profile, backing=self.backing, global_batch=self.global_batch
        )
        self.booking.tables.update(tables)
        self.booking.enumerating = False
        options = [
            option for option in search_space if option.fqn not in tables or self.booking.placed(option) is not None
        ]
        self.options = one_kernel_each(options, PLACED_KERNELS)
        measured = [option for option in self.options if option.name not in self.pooling_given]
        set_pooling(measured, tables, self.global_batch)
        enumerator.populate_estimates(self.options)
        return self.options

    # ----------------------------------------------------------------------------------- for a proposal

    def choose(self, options: Sequence[ShardingOption], share: float, *, keep_to_budgets: bool = False) -> None:
        """Choose rows for a ``share`` of the budgets of all devices together, and set the options' kernels.

        Args:
            keep_to_budgets: book every byte of a hot row or whole table as so many that what fits the devices' memory
                also fits their budgets: TorchRec's partitioner knows of memory only.
        """
        self.booking.of_shards.clear()
        if not self.has_hbm:
            return
        tables = self.booking.tables
        demands = [
            ShardDemand(fqn, table, table.access.histogram, table.dim, table.may_be_whole)
            for fqn, table in tables.items()
        ]
        memory = sum(device.storage.hbm for device in self.capacity.devices) - self._least_io()
        memory -= self.booking.session_bytes(sum(table.rows for table in tables.values()))
        must = must_bytes(demands)
        _check_must(demands, must, sum(self.budgets))
        budget = must + int(share * max(0, min(sum(self.budgets), memory) - must))
        # Where even nothing hot does not fit, the partitioner finds out, and the planner says why.
        fillings = fill(demands, budget, max(memory, budget)) or fill(demands, must, 2**62)
        assert fillings is not None
        self.booking.fillings.update(fillings)
        fixed = sum(filling.fixed for filling in fillings.values())
        weight = (memory - fixed) / max(1, sum(self.budgets)) if keep_to_budgets else 1.0
        self.booking.placed_weight = max(1.0, weight)
        for option in options:
            if (table := self.booking.placed(option)) is not None:
                filling = self.booking.fillings[option.fqn]
                set_kernel(option, table, filling.whole, filling.share.hot_rows / max(1, table.rows))

    def _least_io(self) -> int:
        least: dict[str, int] = {}
        for (fqn, *_), io in self.booking.io.items():
            least[fqn] = min(sum(io), least.get(fqn, sum(io)))
        return sum(least.values())


def _check_must(demands: Sequence[ShardDemand], needed: int, budget: int) -> None:
    """Raise PlanError where all budgets together do not have what the constraints want in HBM whole."""
    if needed > budget:
        names = ", ".join(sorted({one.table.fqn for one in demands if one.table.must_be_whole})[:5])
        raise PlanError(
            f"table(s) {names}: the constraints want them in HBM whole (compute kernel {FUSED!r} only), which takes "
            f"{format_bytes(needed)}; hbm_budget allows {format_bytes(budget)} on all devices together, "
            f"{format_bytes(needed - budget)} too little. Raise hbm_budget, or allow {CACHING!r} or {UVM!r} as well."
        )


def set_kernel(option: ShardingOption, table: PlannedTable, whole: bool, hot_share: float) -> None:
    """Give the option the compute kernel and load factor that its rows ask for."""
    option.cache_params = None
    if whole:
        option.compute_kernel = FUSED
    elif table.backing == "caching" and CACHING in table.kernels and (hot_share > 0.0 or UVM not in table.kernels):
        option.compute_kernel = CACHING
        # TorchRec wants it strictly between 0 and 1.
        least, most = 1.0 / max(2, table.rows), 1.0 - 1.0 / max(2, table.rows)
        # HACK: TorchRec puts cached tables of all dims in one TBE, whose cache has slots as wide as the widest. Tables
        # that differ in any cache parameter but the load factor get TBEs of their own, so a few bytes of memory that
        # FBGEMM is asked to keep free, one for each column, keep slots as wide as their rows.
        marker = float(max(shard.size[1] for shard in option.shards))
        option.cache_params = replace(
            table.asked,
            load_factor=min(max(hot_share, least), most),
            reserved_memory=(table.asked.reserved_memory or 0.0) + marker,
        )
    else:
        option.compute_kernel = UVM
