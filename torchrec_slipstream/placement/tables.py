"""The tables of a model as the planner sees them: their rows' bytes, their access counts, and what they may become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingType

from torchrec_slipstream.access import AccessProfile, CountHistogram, TableAccess, expected_distinct
from torchrec_slipstream.errors import ConfigError, PlanError, ProfileError
from torchrec_slipstream.tbe.memory import Cache, OptimizerState, RowBytes, cache_of, optimizer_of, row_bytes

FUSED = EmbeddingComputeKernel.FUSED.value
UVM = EmbeddingComputeKernel.FUSED_UVM.value
CACHING = EmbeddingComputeKernel.FUSED_UVM_CACHING.value
# The kernels that rows can be placed with, the best template for an estimate first.
PLACED_KERNELS = (FUSED, CACHING, UVM)


@dataclass(frozen=True, eq=False)
class PlannedTable:
    """One table of the model, with what its rows cost and how often each is looked up.

    Attributes:
        fqn: path of its collection and its name, unique in the model.
        lookups_a_step: look-ups of it in one global batch.
        kernels: of ``PLACED_KERNELS``, those that the sharder and the constraints allow.
        backing: what holds its hot rows where it is in host memory, ``"uvm"`` or ``"caching"``.
        features: how many features look rows up in it.
        pooling: how they are pooled; TorchRec makes TBEs of tables that are alike in it.
        asked: cache parameters of the constraints.
        cache: what its cache will be.
    """

    fqn: str
    name: str
    rows: int
    dim: int
    element_size: int
    state: OptimizerState
    access: TableAccess
    lookups_a_step: float
    kernels: frozenset[str]
    backing: str
    features: int
    pooling: str
    asked: CacheParams
    cache: Cache
    _histograms: dict[tuple[int, int], CountHistogram] = field(default_factory=dict, repr=False)

    @property
    def may_be_whole(self) -> bool:
        return FUSED in self.kernels

    @property
    def must_be_whole(self) -> bool:
        return self.kernels <= {FUSED}

    @property
    def holds_hot_rows(self) -> bool:
        """Whether rows can be hot without the whole table being in HBM."""
        return CACHING in self.kernels if self.backing == "caching" else UVM in self.kernels

    def bytes_of(self, columns: int) -> RowBytes:
        """Of the part of a row that a shard of so many columns holds."""
        return row_bytes(columns, self.element_size, self.state, self.backing, self.cache)

    def histogram(self, begin: int, rows: int) -> CountHistogram:
        """Of the rows ``[begin, begin + rows)``; made once."""
        if (begin, rows) == (0, self.rows):
            return self.access.histogram
        key = (begin, rows)
        if key not in self._histograms:
            self._histograms[key] = CountHistogram.of(self.access.counts_of(begin, begin + rows))
        return self._histograms[key]

    def misses(self, histogram: CountHistogram, cold_rows: np.ndarray[Any, Any]) -> float:
        """Distinct cold rows of one global batch, expected (SCARS): they cross the bus once each way.

        Look-ups that a sketch could not attribute are spread evenly over the table's rows without a count.

        Args:
            histogram: of the rows in question.
            cold_rows: how many rows of each of its classes are cold, ``[m]``.
        """
        if self.access.lookups == 0:
            return 0.0
        lookups = histogram.counts.astype(np.float64)
        lookups[histogram.counts == 0] = self.unattributed_a_row
        return expected_distinct(lookups / self.access.lookups, cold_rows, self.lookups_a_step)

    @cached_property
    def unattributed_a_row(self) -> float:
        """Look-ups of each row without a count, on average: those that the profile could not attribute."""
        whole = self.access.histogram
        uncounted = int(whole.rows[whole.counts == 0].sum())
        return (self.access.lookups - whole.lookups) / uncounted if uncounted else 0.0

    def lookups_of(self, histogram: CountHistogram) -> float:
        """Look-ups of some rows, those that the profile could not attribute included."""
        return histogram.lookups + float(histogram.rows[histogram.counts == 0].sum()) * self.unattributed_a_row


def plan_tables(
    options: Sequence[ShardingOption],
    sharders: Sequence[ModuleSharder[nn.Module]],
    profile: AccessProfile,
    *,
    backing: str,
    global_batch: int,
) -> dict[str, PlannedTable]:
    """The tables among the enumerated sharding ``options`` whose rows can be placed, by fqn.

    A table that is data parallel only, or in a key-value store, is left to TorchRec.

    Raises:
        ProfileError: a table is not in the profile, or has another number of rows there.
        PlanError: a table's constraints ask for what cannot be placed.
    """
    fused_params: dict[type, Mapping[str, Any]] = {
        one.module_type: getattr(one, "fused_params", None) or {} for one in sharders
    }
    kernels: dict[str, set[str]] = {}
    first: dict[str, ShardingOption] = {}
    for option in options:
        if is_placed(option):
            kernels.setdefault(option.fqn, set()).add(option.compute_kernel)
            first.setdefault(option.fqn, option)
    tables = {}
    problems = []
    for fqn, option in first.items():
        access = access_of(profile, option)
        rows, dim = option.tensor.shape
        if access is None:
            problems.append(f"table {fqn} is not in the access profile")
        elif access.rows != rows:
            problems.append(f"table {fqn} has {rows} rows, but {access.rows} in the access profile")
        else:
            module, asked = option.module[1], option.cache_params or CacheParams()
            params = fused_params.get(type(module), {})
            allowed = frozenset(kernels[fqn])
            enforced = option.enforce_hbm if option.enforce_hbm is not None else params.get("enforce_hbm")
            if enforced and allowed != {FUSED}:
                raise PlanError(
                    f"table {fqn}: enforce_hbm=True would put all its rows in HBM whatever the plan says; drop it, or "
                    "constrain the table to the compute kernel 'fused'"
                )
            reserved, config = params.get("cache_reserved_memory"), _config(module, option.name)
            tables[fqn] = PlannedTable(
                fqn=fqn,
                name=option.name,
                rows=rows,
                dim=dim,
                element_size=option.tensor.element_size(),
                state=optimizer_of(module, option.tensor, params),
                access=access,
                lookups_a_step=profile.pooling_factor(access.name) * global_batch,
                kernels=allowed,
                backing="caching" if UVM not in allowed else backing,
                features=len(config.feature_names) if config is not None else 1,
                pooling=str(getattr(config, "pooling", "none")),
                asked=asked if asked.reserved_memory is not None else replace(asked, reserved_memory=reserved),
                cache=cache_of(asked, params),
            )
    if problems:
        known = ", ".join(sorted(profile.tables)[:8])
        raise ProfileError(
            "the access profile does not fit this model:\n  "
            + "\n  ".join(problems[:20])
            + f"\nIt has {known}{', ...' if len(profile.tables) > 8 else ''}. Measure it anew with the model's own "
            "tables: AccessProfile.measure(batches, model)."
        )
    return tables


def is_placed(option: ShardingOption) -> bool:
    """Whether rows can be placed under this option."""
    return option.compute_kernel in PLACED_KERNELS and option.sharding_type != ShardingType.DATA_PARALLEL.value


def access_of(profile: AccessProfile, option: ShardingOption) -> TableAccess | None:
    """The table's counts: under its fqn where two collections have a table of the name, else under its name."""
    for name in (option.fqn, option.name):
        if name in profile.tables:
            return profile.tables[name]
    return None


def checked_constraints(constraints: object) -> dict[str, ParameterConstraints]:
    """The user's constraints by table, of which there may be none (None).

    Raises:
        ConfigError: they are no mapping, or one of them is no ``ParameterConstraints``.
    """
    if constraints is None:
        return {}
    if not isinstance(constraints, Mapping):
        raise ConfigError(f"constraints={constraints!r}; give a mapping of table names to ParameterConstraints")
    for name, one in constraints.items():
        if not isinstance(one, ParameterConstraints):
            raise ConfigError(f"constraints: table {name!r} has {one!r}; give TorchRec's ParameterConstraints")
    return dict(constraints)


def check_names(constrained: Iterable[str], options: Iterable[ShardingOption]) -> None:
    """Of the user's constraints, against the tables that the planner has enumerated sharding options of.

    Raises:
        PlanError: some are of no table: TorchRec passes them over.
    """
    known = dict.fromkeys(option.name for option in options)
    if unknown := [name for name in constrained if name not in known]:
        raise PlanError(
            f"constraints name {', '.join(map(repr, unknown))}, which the model does not have; its tables are "
            f"{', '.join(list(known)[:20])}{', ...' if len(known) > 20 else ''}: give constraints by these names"
        )


def with_measured_pooling(
    constraints: Mapping[str, ParameterConstraints], profile: AccessProfile
) -> dict[str, ParameterConstraints]:
    """The user's constraints, with measured look-ups a sample where he gave no pooling factors.

    TorchRec's storage reservation counts inputs by them.
    """
    merged = dict(constraints)
    for name in profile.tables:
        known = merged.get(name, ParameterConstraints())
        if not gives_pooling(known):
            copied = ParameterConstraints(**vars(known))
            copied.pooling_factors = [max(profile.pooling_factor(name), 1.0)]
            merged[name] = copied
    return merged


def gives_pooling(constraints: ParameterConstraints | None) -> bool:
    """Whether pooling factors are given other than TorchRec's default, one look-up a sample."""
    return constraints is not None and constraints.pooling_factors != ParameterConstraints().pooling_factors


def set_pooling(options: Sequence[ShardingOption], tables: Mapping[str, PlannedTable], global_batch: int) -> None:
    """Give the options measured look-ups a sample, by feature.

    Where they are pooled at least one: TorchRec scales the output by it, but FBGEMM's has a row a sample, looked up or
    not.
    """
    for option in options:
        table = tables.get(option.fqn)
        if table is not None:
            a_feature = table.lookups_a_step / max(1, global_batch * table.features)
            option.input_lengths = [max(1.0 if option.is_pooled else 1e-6, a_feature)] * table.features


def _config(module: nn.Module, table: str) -> Any:
    """The configuration of a table of an embedding collection; None for a module of another kind."""
    for name in ("embedding_bag_configs", "embedding_configs"):
        if callable(configs := getattr(module, name, None)):
            return next((config for config in configs() if config.name == table), None)
    return None
