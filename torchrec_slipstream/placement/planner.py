"""The planner: TorchRec's, with the rows of each table placed by how often they are looked up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation
from torchrec.distributed.planner.types import (
    ParameterConstraints,
    Partitioner,
    PerfModel,
    PlannerError,
    ShardingOption,
    Stats,
    StorageReservation,
    Topology,
)
from torchrec.distributed.sharding_plan import get_default_sharders
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from torchrec_slipstream.access import AccessProfile
from torchrec_slipstream.budget import parse_bytes
from torchrec_slipstream.errors import ConfigError, PlanError, SlipstreamError
from torchrec_slipstream.placement.estimators import Booking, RowPerfEstimator, RowStorageEstimator
from torchrec_slipstream.placement.layout import Layout
from torchrec_slipstream.placement.machine import check_size, this_topology
from torchrec_slipstream.placement.placement import Placement
from torchrec_slipstream.placement.proposer import HotRowProposer
from torchrec_slipstream.placement.settling import SettledPerfModel, settle
from torchrec_slipstream.placement.shortage import explain_shortage
from torchrec_slipstream.placement.stats import SlipstreamStats
from torchrec_slipstream.placement.summary import placement_of
from torchrec_slipstream.placement.tables import (
    check_names,
    checked_constraints,
    gives_pooling,
    with_measured_pooling,
)
from torchrec_slipstream.placement.upstream import check_planner

BACKINGS = ("caching", "uvm")
Callback = Callable[[list[ShardingOption]], list[ShardingOption]]


class SlipstreamPlanner(EmbeddingShardingPlanner):
    """Plans which tables are in HBM whole, which rows of the others are hot, and how all are sharded.

    The sharding plan is a stock one: a table that fits whole is FUSED; one with hot rows is FUSED_UVM_CACHING with the
    load factor that holds them (``backing="caching"``), or FUSED_UVM with room left for its overlay
    (``backing="uvm"``). It trains under stock TorchRec with no session attached. Data parallel tables, and those in
    key-value stores, are planned as TorchRec plans them.

    Rows are taken by access count a byte over all tables, which is the best choice for rows that stay. First for all
    devices together, so that TorchRec can search how to shard; then for each device with what it was given.

    Args:
        profile: the measured access counts of every table.
        topology: the devices; default: of the process group and the memory that this machine has.
        hbm_budget: what hot rows and whole tables may take of every device's HBM, their optimizer state included:
            bytes, a string such as ``"8GiB"``, or a share of the device's HBM (a float in ``[0, 1]``). Default: all
            that inputs, outputs, the dense part and the storage reservation leave. FBGEMM rounds a cache up to sets of
            32 rows; room for that is kept beside the budget.
        batch_size: samples a device and step; TorchRec's default (512) if not given.
        constraints: TorchRec's, by table. Their compute kernels, sharding types and cache parameters are obeyed, but
            for the load factor, which is what is planned; pooling factors that are not given are those measured.
        backing: what is to hold hot rows of tables in host memory, see above.
        session: whether the 5 bytes a row that an attached :class:`~torchrec_slipstream.Slipstream` keeps on the device
            are counted. Its pool of at most ``StalenessConfig.memory_bytes`` a rank, and the 4 bytes a row of a half
            life, are left to the storage reservation.
        performance_model: rates proposals; default: by what they take when their rows are settled.
        storage_reservation, partitioner, stats, debug, callbacks, timeout_seconds: as ``EmbeddingShardingPlanner`` has
            them.

    Attributes:
        placement: what was decided by the last :meth:`plan` or :meth:`collective_plan`; None before.

    Raises:
        ConfigError: an argument is out of its range.
        PlanError: the installed TorchRec lacks something that planning relies on; the message says what.

    Example::

        planner = SlipstreamPlanner(profile=AccessProfile.load("profile.npz"), hbm_budget="8GiB", batch_size=2048)
        plan = planner.collective_plan(model, sharders)
        model = DistributedModelParallel(model, plan=plan, sharders=sharders)
    """

    def __init__(
        self,
        *,
        profile: AccessProfile,
        topology: Topology | None = None,
        hbm_budget: int | float | str | None = None,
        batch_size: int | None = None,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        backing: str = "caching",
        session: bool = True,
        storage_reservation: StorageReservation | None = None,
        partitioner: Partitioner | None = None,
        performance_model: PerfModel | None = None,
        stats: Stats | list[Stats] | None = None,
        debug: bool = True,
        callbacks: list[Callback] | None = None,
        timeout_seconds: int | None = None,
    ) -> None:
        if not isinstance(profile, AccessProfile):
            raise ConfigError(f"profile must be an AccessProfile, not {type(profile).__name__}")
        if batch_size is None:
            batch_size = BATCH_SIZE
        if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}; give at least one sample a device and step, a whole number")
        if backing not in BACKINGS:
            raise ConfigError(f"backing={backing!r} must be one of {', '.join(map(repr, BACKINGS))}")
        check_planner()
        self.profile = profile
        self.backing = backing
        self.topology = topology if topology is not None else this_topology()
        self.budgets = [budget_of(hbm_budget, device.storage.hbm) for device in self.topology.devices]
        self.placement: Placement | None = None
        self._slip_batch_size = int(batch_size)
        self._slip_given = given = checked_constraints(constraints)
        self._slip_pooling_given = frozenset(name for name, one in given.items() if gives_pooling(one))
        self._slip_constraints = with_measured_pooling(given, profile)
        self._slip_reservation = storage_reservation or _default_reservation()
        self._slip_booking = Booking(
            bus=self.topology.hbm_to_ddr_mem_bw, tracked=session, on_cpu=self.topology.compute_device == "cpu"
        )
        self._slip_layout: Layout | None = None
        self._slip_enumerator = EmbeddingEnumerator(
            topology=self.topology,
            batch_size=self._slip_batch_size,
            constraints=self._slip_constraints,
            estimator=[
                RowPerfEstimator(self.topology, self._slip_constraints, self._slip_booking),
                RowStorageEstimator(self.topology, self._slip_constraints, self._slip_booking),
            ],
        )
        super().__init__(
            topology=self.topology,
            batch_size=self._slip_batch_size,
            enumerator=self._slip_enumerator,
            storage_reservation=self._slip_reservation,
            proposer=HotRowProposer(self._prepare, self._choose),
            partitioner=partitioner,
            performance_model=performance_model or SettledPerfModel(self._layout),
            stats=stats if stats is not None else SlipstreamStats(lambda: self.placement),
            constraints=self._slip_constraints,
            debug=debug,
            callbacks=[self._settle, *(callbacks or [])],
            timeout_seconds=timeout_seconds,
        )

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """Plan for ``module``, in this process alone. Sets :attr:`placement`.

        Raises:
            PlanError: there is no plan that fits the devices' memory; the message says by how much, and what would. Or
                constraints are of a table that the model does not have.
            ProfileError: a table of the model is not in the profile, or has another size there.
        """
        self.placement, self._slip_layout = None, None
        self._slip_booking.reset()
        try:
            capacity = self._slip_reservation.reserve(
                topology=self.topology,
                batch_size=self._slip_batch_size,
                module=module,
                sharders=sharders,
                constraints=self._slip_constraints,
            )
            self._slip_layout = Layout(
                self.profile,
                sharders,
                capacity,
                self.budgets,
                self._slip_booking,
                backing=self.backing,
                batch_size=self._slip_batch_size,
                pooling_given=self._slip_pooling_given,
            )
            return super().plan(module, sharders)
        except PlannerError as error:
            self.placement = None
            if self._slip_layout is None or not self._slip_layout.options:
                raise PlanError(
                    f"there is no plan: the storage reservation leaves no memory for the tables. TorchRec says: {error}"
                ) from error
            raise PlanError(
                explain_shortage(self.topology, self._slip_layout, self._slip_enumerator, str(error))
            ) from error

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """Plan on rank 0 and give the plan and the :attr:`placement` to all ranks of ``pg`` (default: of all).

        Raises:
            PlanError: the group is of another size than :attr:`topology`.
            PlanError, ProfileError: as :meth:`plan`. All of them on every rank.
        """
        group = pg if pg is not None else dist.group.WORLD
        if group is None:
            raise PlanError(
                "collective_plan needs a process group: call torch.distributed.init_process_group() first, or plan() "
                "for a single process"
            )
        sharders = sharders if sharders is not None else get_default_sharders()
        result: list[Any] = [None]
        failure: Exception | None = None
        if group.rank() == 0:
            try:
                check_size(self.topology, group.size())
                result = [(self.plan(module, sharders), self.placement)]
            except Exception as error:
                # The others wait for a plan: they must hear of it too.
                failure = error
                mine = isinstance(error, SlipstreamError)
                result = [error if mine else PlanError(f"rank 0 could not plan: {type(error).__name__}: {error}")]
        if group.size() > 1:
            dist.broadcast_object_list(result, dist.get_global_rank(group, 0), group=group)
        if failure is not None:
            raise failure
        if isinstance(result[0], SlipstreamError):
            raise result[0]
        plan, self.placement = result[0]
        return plan

    # ------------------------------------------------------------------------------- TorchRec's seams

    def _layout(self) -> Layout:
        assert self._slip_layout is not None
        return self._slip_layout

    def _prepare(self, options: list[ShardingOption]) -> list[ShardingOption]:
        check_names(self._slip_given, options)
        return self._layout().prepare(options, self._slip_enumerator)

    def _choose(self, options: list[ShardingOption], share: float, keep_to_budgets: bool) -> None:
        self._layout().choose(options, share, keep_to_budgets=keep_to_budgets)

    def _settle(self, plan: list[ShardingOption]) -> list[ShardingOption]:
        settle(plan, self._layout(), self._slip_enumerator)
        self.placement = placement_of(plan, self._layout())
        return plan


def budget_of(hbm_budget: int | float | str | None, hbm: int) -> int:
    """Bytes of one device's ``hbm`` bytes that a budget allows.

    Raises:
        ConfigError: it is neither bytes, nor a string that says so, nor a share in ``[0, 1]``.
    """
    if hbm_budget is None:
        return hbm
    if isinstance(hbm_budget, float):
        if not 0.0 <= hbm_budget <= 1.0:
            raise ConfigError(
                f"hbm_budget={hbm_budget!r}: a float is a share of the device's HBM in [0, 1]; give bytes as a whole "
                "number or a string such as '8GiB'"
            )
        return int(hbm_budget * hbm)
    return min(parse_bytes(hbm_budget), hbm)


def _default_reservation() -> StorageReservation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchRec's default, which warns of itself
        return HeuristicalStorageReservation(percentage=0.15)
