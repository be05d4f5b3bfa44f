"""Proposes how each table is sharded, with the rows already chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchrec.distributed.planner.proposers import GreedyProposer, UniformProposer
from torchrec.distributed.planner.types import Enumerator, Proposer, ShardingOption, Topology
from torchrec.distributed.types import ShardingType

# What to try, one after the other: a share of the HBM budgets to choose rows for, and whether the layout has to keep to
# the budgets of the single devices. The first two always; the others until the tables can be laid on the devices at
# all, since a large table's hot rows may not fit the one device that it is on. What a layout leaves free is filled when
# it is known which device holds what.
ATTEMPTS = ((1.0, True), (1.0, False), (0.75, False), (0.5, False), (0.25, False), (0.0, False))
ALWAYS = 2
# Proposals of an attempt: TorchRec's greedy search moves one table at a time and would go on for thousands. The last
# attempt may, as long as there is no plan.
MAX_PROPOSALS = 32
# It also ends after so many plans that are no better than the best.
PATIENCE = 6
_SIMPLEST = (
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.COLUMN_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.TABLE_COLUMN_WISE.value,
)

Prepare = Callable[[list[ShardingOption]], list[ShardingOption]]
Choose = Callable[[list[ShardingOption], float, bool], None]


class HotRowProposer(Proposer):
    """One option a table and sharding type, its rows chosen for a share of the budget; TorchRec's proposers on top.

    Args:
        prepare: picks, of TorchRec's search space, the options to lay out.
        choose: sets the kernels and books the rows of the options for one of ``ATTEMPTS``, in place.
    """

    def __init__(self, prepare: Prepare, choose: Choose) -> None:
        self._prepare = prepare
        self._choose = choose
        self._options: list[ShardingOption] = []
        self._enumerator: Enumerator | None = None
        self._inner: list[Proposer] = []
        self._attempt = 0
        self._proposals = 0
        self._planned = False

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Take TorchRec's search space, of which all else follows."""
        self._options = self._prepare(search_space)
        self._enumerator = enumerator
        self._planned = False
        self._attempt = 0
        self._begin()

    def propose(self) -> list[ShardingOption] | None:
        """The next proposal, or None at the end."""
        while True:
            last = self._attempt == len(ATTEMPTS) - 1 and not self._planned
            while self._inner and (last or self._proposals < MAX_PROPOSALS):
                proposal = self._inner[0].propose()
                if proposal is not None:
                    self._proposals += 1
                    return proposal
                self._inner.pop(0)
            self._attempt += 1
            if self._attempt == len(ATTEMPTS) or (self._planned and self._attempt >= ALWAYS):
                return None
            self._begin()

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Learn what became of the last proposal."""
        self._planned |= partitionable
        if self._inner:
            self._inner[0].feedback(partitionable, plan, perf_rating, storage_constraint)

    def _begin(self) -> None:
        """Choose rows for the next attempt."""
        share, keep_to_budgets = ATTEMPTS[self._attempt]
        self._choose(self._options, share, keep_to_budgets)
        assert self._enumerator is not None
        self._enumerator.populate_estimates(self._options)
        self._inner = [UniformProposer(), _LeanProposer(), GreedyProposer(use_depth=True, threshold=PATIENCE)]
        for proposer in self._inner:
            proposer.load(self._options, self._enumerator)
        self._proposals = 0


class _LeanProposer(Proposer):
    """Proposes once, for each table, the option whose largest shard takes the least memory."""

    def __init__(self) -> None:
        self._proposal: list[ShardingOption] | None = None

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        leanest: dict[str, tuple[tuple[int, int], ShardingOption]] = {}
        for option in search_space:
            largest = [(shard.storage.hbm, shard.storage.ddr) for shard in option.shards if shard.storage is not None]
            if option.fqn not in leanest or max(largest) < leanest[option.fqn][0]:
                leanest[option.fqn] = max(largest), option
        self._proposal = [option for _, option in leanest.values()]

    def propose(self) -> list[ShardingOption] | None:
        return self._proposal

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        self._proposal = None


def one_kernel_each(options: Sequence[ShardingOption], order: Sequence[str]) -> list[ShardingOption]:
    """Of the options that differ in the compute kernel only, the one whose kernel comes first in ``order``.

    TorchRec lists sharding types in the order of a set, which differs from process to process; here the simplest come
    first, so that of two that cost the same the same is taken each time.
    """
    best: dict[tuple[str, str, int], ShardingOption] = {}
    rank = {kernel: position for position, kernel in enumerate(order)}
    for option in options:
        key = (option.fqn, option.sharding_type, len(option.shards))
        known = best.get(key)
        if known is None or rank.get(option.compute_kernel, len(rank)) < rank.get(known.compute_kernel, len(rank)):
            best[key] = option
    simplest = {sharding_type: position for position, sharding_type in enumerate(_SIMPLEST)}
    return sorted(best.values(), key=lambda option: simplest.get(option.sharding_type, len(simplest)))
