"""The staleness tracker: decides once an interval which updates are left out until the next.

Between two decisions a step costs one gather (in the update filter) and, where it is counted, one scatter of counts.
At a decision, every rank looks at its own rows and agrees with the others on one number, the scale of the duties or
the threshold, through sums over the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from torchrec_slipstream.config import StalenessConfig
from torchrec_slipstream.errors import AttachError, StateError
from torchrec_slipstream.staleness import selection
from torchrec_slipstream.staleness.compaction import positions_of
from torchrec_slipstream.staleness.pool import RowPool
from torchrec_slipstream.staleness.signals import SIGNALS, RowView, Signal
from torchrec_slipstream.tbe import UpdateFilter

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
# How strongly the share left out is pulled back to its target: half of what is owed, in the coming interval.
_FEEDBACK = 0.5
_TOUCHES_LIMIT = 2**30


@dataclass
class Decision:
    """What one decision found and did, over all ranks where not said otherwise."""

    step: int
    pool_rows: int
    stale_rows: int
    thawed_rows: int
    refrozen_rows: int
    measured_share: float
    expected_share: float
    seconds: float


class StalenessTracker:
    """Follows the rows behind a number of update filters and sets which are stale.

    Args:
        filters: one a TBE of this rank.
        config: the knobs.
        total: sums a float64 tensor over the ranks in place and returns it; the identity on one rank.

    Raises:
        AttachError: the configured signal needs optimizer state that a table's optimizer does not keep.
    """

    def __init__(self, filters: Sequence[UpdateFilter], config: StalenessConfig, total: selection.Total) -> None:
        self.config = config
        self.filters = list(filters)
        self._total = total
        self.steps = 0
        self.seconds = 0.0
        self.decisions: list[Decision] = []
        self._intervals = 0
        self._baseline: tuple[int, int] | None = None
        self._thawed_before = 0
        self._tbes = [_TrackedTbe(one, config) for one in self.filters]
        rows = sum(one.patterns.numel() for one in self.filters)
        for tbe in self._tbes:
            tbe.capacity = config.memory_bytes * tbe.filter.patterns.numel() // max(1, rows) // tbe.row_bytes
        self._prepare_step()

    def step(self) -> None:
        """Call after every training step. At the end of an interval it decides."""
        began = time.perf_counter()
        self.steps += 1
        if self.steps % self.config.interval == 0:
            self._decide()
            self.seconds += time.perf_counter() - began
        self._prepare_step()

    def _prepare_step(self) -> None:
        for one in self.filters:
            one.phase = self.steps % selection.PHASES
            one.counting = self.steps % self.config.count_every == 0

    # ------------------------------------------------------------------------------------------- a decision

    @torch.no_grad()
    def _decide(self) -> None:
        began = time.perf_counter()
        self._intervals += 1
        for tbe in self._tbes:
            tbe.observe(self._intervals)
        if self.steps < self.config.warmup_steps or self.config.target_share == 0.0:
            return
        sums = self._global_sums()
        table_rate, seen, skipped = (float(value) for value in sums[:3])
        if self._baseline is None:
            self._baseline = (int(seen), int(skipped))
        seen, skipped = seen - self._baseline[0], skipped - self._baseline[1]
        owed = self.config.target_share * seen - skipped
        share = self.config.target_share + _FEEDBACK * owed / max(table_rate, 1.0)
        wanted = torch.tensor(min(max(share, 0.0), 0.99) * table_rate, dtype=torch.float64)
        duties = self._choose_duties(wanted, table_rate)
        counts = torch.zeros(5, dtype=torch.float64)
        for tbe, duty in zip(self._tbes, duties, strict=True):
            counts += tbe.apply(duty, self._intervals)
        pool, stale, thawed, refrozen, left_out = self._total(counts.to(self._device)).tolist()
        self.decisions.append(
            Decision(
                step=self.steps,
                pool_rows=int(pool),
                stale_rows=int(stale),
                thawed_rows=int(thawed),
                refrozen_rows=int(refrozen),
                measured_share=skipped / max(seen, 1),
                expected_share=left_out / max(table_rate, 1.0),
                seconds=time.perf_counter() - began,
            )
        )

    @property
    def _device(self) -> torch.device:
        return self.filters[0].device if self.filters else torch.device("cpu")

    def _global_sums(self) -> Tensor:
        """float64 ``[3]`` over all ranks: look-ups an interval, look-ups seen, look-ups left out."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for tbe in self._tbes:
            sums[0] += tbe.table_rate.sum()
            sums[1] += tbe.filter.lookups.sum()
            sums[2] += tbe.filter.skipped.sum()
        return self._total(sums)

    def _choose_duties(self, wanted: Tensor, table_rate: float) -> list[Tensor]:
        """Duty of every pool row of every TBE, before the cap a table."""
        config = self.config
        none = torch.empty(0, device=self._device)
        score = torch.cat([none, *(tbe.comparable_score() for tbe in self._tbes)])
        rate = torch.cat([none, *(tbe.pool.rate for tbe in self._tbes)])
        sizes = [tbe.pool.rows.numel() for tbe in self._tbes]
        if config.selection == "duty":
            duty = selection.duty_cycles(score, rate, wanted, config.min_duty, self._total)
            return list(duty.split(sizes))
        turn = torch.cat([none.bool(), *(tbe.thaw_turn(self._intervals) for tbe in self._tbes)])
        score = torch.where(turn, torch.nan, score)
        if config.search == "quantile":
            threshold = selection.quantile_threshold(score, rate, wanted, self._total)
        else:
            window = torch.tensor(config.search_window * table_rate, dtype=torch.float64)
            threshold = selection.bisect_threshold(score, rate, wanted, window, self._total)
        return list(torch.where(score < threshold, 0.0, 1.0).split(sizes))

    # ------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> dict[str, object]:
        """Everything that the next decisions depend on. Tensors are keyed by shard, hence unique over ranks."""
        shards: dict[str, dict[str, Tensor]] = {}
        for tbe in self._tbes:
            shards.update(tbe.state())
        return {
            "config": asdict(self.config),
            "steps": self.steps,
            "intervals": self._intervals,
            "baseline": self._baseline,
            "decisions": [asdict(decision) for decision in self.decisions],
            "shards": shards,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore what :meth:`state_dict` gave. Checks everything first.

        Raises:
            StateError: other tables or shards, other sizes, or another configuration.
        """
        ours = {shard.key: shard.rows for one in self.filters for shard in one.shards}
        shards = state["shards"]
        assert isinstance(shards, dict)
        if missing := sorted(ours.keys() - shards.keys()):
            raise StateError(
                f"the saved state lacks shard(s) {missing[:3]} of this model; it has {sorted(shards)[:3]}. "
                "Staleness state follows the sharding: load it with the plan and the rank it was saved with, "
                "or start without it (rows are then tracked afresh)."
            )
        for key, rows in ours.items():
            if shards[key]["touches"].numel() != rows:
                raise StateError(
                    f"shard {key}: the saved state has {shards[key]['touches'].numel()} rows, this model {rows}"
                )
        saved_config = state["config"]
        if saved_config != asdict(self.config):
            assert isinstance(saved_config, dict)
            differing = [k for k, v in asdict(self.config).items() if saved_config.get(k) != v]
            raise StateError(
                f"the saved state was made with another configuration: {differing} differ. Use the same "
                "StalenessConfig to resume, or start without the staleness state."
            )
        self.steps = int(state["steps"])  # type: ignore[call-overload]
        self._intervals = int(state["intervals"])  # type: ignore[call-overload]
        baseline = state["baseline"]
        self._baseline = None if baseline is None else tuple(baseline)  # type: ignore[arg-type]
        self.decisions = [Decision(**decision) for decision in state["decisions"]]  # type: ignore[attr-defined]
        for tbe in self._tbes:
            tbe.load(shards)
        self._prepare_step()


class _TrackedTbe:
    """One TBE's pool, and what a decision does with it."""

    def __init__(self, update_filter: UpdateFilter, config: StalenessConfig) -> None:
        self.filter = update_filter
        self.config = config
        has_state = update_filter.squared_gradients() is not None
        name = config.signal
        if name == "auto":
            name = "gain" if has_state else "movement"
        self.signal: Signal = SIGNALS[name]()
        tables = ", ".join(sorted({shard.table for shard in update_filter.shards}))
        if self.signal.needs_state and not has_state:
            raise AttachError(
                f"table(s) {tables}: signal={name!r} reads the sum of squared gradients, which "
                f"{update_filter.tbe.optimizer} does not keep; use signal='movement' or an Adagrad optimizer"
            )
        shards = update_filter.shards
        device = update_filter.device
        self.snapshot_dtype = _DTYPES[config.snapshot_dtype]
        dims = [shard.dim if self.signal.needs_snapshot else 0 for shard in shards]
        self.pool = RowPool.empty(device, dims, self.snapshot_dtype)
        self.row_bytes = RowPool.STATE_BYTES + max(dims) * self.snapshot_dtype.itemsize
        self.capacity = 0
        self.shard_begins = torch.tensor([shard.row_begin for shard in shards], dtype=torch.int64, device=device)
        self.excluded = [shard.table in config.exclude_tables for shard in shards]
        self.table_rate = torch.zeros(len(shards), dtype=torch.float64, device=device)
        self._table_seen = torch.zeros(len(shards), dtype=torch.int64, device=device)
        self._feature_table = torch.tensor(update_filter.feature_table, dtype=torch.int64, device=device)

    def observe(self, intervals: int) -> None:
        """Take in the interval that ended: the pool's rows, their rates, updates and signals."""
        config = self.config
        lookups = torch.zeros_like(self._table_seen).index_add_(0, self._feature_table, self.filter.lookups)
        new = (lookups - self._table_seen).double()
        self._table_seen = lookups
        decay = config.rate_decay if intervals > 1 else 0.0
        self.table_rate = decay * self.table_rate + (1.0 - decay) * new

        rows = self._pool_rows()
        self._avoid_overflow()
        touches = self.filter.touches[rows]
        scaled = touches.float() * config.count_every
        pool = self.pool.moved_to(rows, scaled, intervals, self.shard_begins)
        assert pool.fresh is not None
        new_touches = (touches - pool.seen).float() * config.count_every
        pool.rate = torch.where(pool.fresh, pool.rate, decay * pool.rate + (1.0 - decay) * new_touches)
        new_updates = new_touches * pool.duty
        pool.updates = torch.where(pool.fresh, pool.updates, pool.updates + new_updates)
        pool.seen = touches
        self.pool = pool
        self._score(new_updates)

    def _pool_rows(self) -> Tensor:
        """Ascending rows with enough touches, the most-touched ones where memory does not hold all."""
        least = -(-self.config.min_touches // self.config.count_every)
        touches = self.filter.touches
        rows = positions_of(touches >= least)
        for shard, left_alone in zip(self.filter.shards, self.excluded, strict=True):
            if left_alone:
                rows = rows[(rows < shard.row_begin) | (rows >= shard.row_begin + shard.rows)]
        if rows.numel() > self.capacity:
            most = touches[rows].topk(self.capacity, sorted=False).indices
            rows = rows[most.sort().values]
        return rows

    def _avoid_overflow(self) -> None:
        """int32 would wrap after 2^31 look-ups of one row. Only differences matter once a row is in the pool."""
        pool = self.pool
        near = pool.seen > _TOUCHES_LIMIT
        if pool.rows.numel() and bool(near.any()):
            self.filter.touches[pool.rows[near]] -= _TOUCHES_LIMIT // 2
            pool.seen[near] -= _TOUCHES_LIMIT // 2

    def _score(self, new_updates: Tensor) -> None:
        """Bring every row's signal up to date, and take the snapshots for the next."""
        pool, signal = self.pool, self.signal
        bounds = pool.bounds(self.shard_begins)
        weights = self.filter.weights() if signal.needs_snapshot else None
        states = self.filter.squared_gradients() if signal.needs_state else None
        begins = self.shard_begins.tolist()
        for shard, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if begin == end:
                continue
            local = pool.rows[begin:end] - begins[shard]
            part = slice(begin, end)
            now = torch.empty(0, device=local.device)
            if weights is not None:
                now = weights[shard].index_select(0, local).float()
            state = torch.empty(0, device=local.device)
            if states is not None:
                state = states[shard].index_select(0, local).float()
                state = state.mean(dim=1) if state.dim() == 2 else state
            view = RowView(
                weights=now,
                before=pool.snapshots[shard].float(),
                updates=pool.updates[part],
                new_updates=new_updates[part],
                state=state,
                state_before=pool.state[part],
            )
            score = signal.score(view)
            pool.score[part] = torch.where(score.isnan(), pool.score[part], score)
            if states is not None:
                pool.state[part] = state
            if weights is not None:
                pool.snapshots[shard] = now.to(self.snapshot_dtype)

    def comparable_score(self) -> Tensor:
        """The pool's scores, in units of their table's mean where the configuration says so."""
        pool = self.pool
        if not self.config.normalise_tables:
            return pool.score
        score = pool.score.clone()
        bounds = pool.bounds(self.shard_begins)
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            part, rate = score[begin:end], pool.rate[begin:end]
            known = part.isfinite()
            mean = (part[known] * rate[known]).sum() / rate[known].sum().clamp(min=1e-30)
            score[begin:end] = part / mean.clamp(min=1e-30)
        return score

    def thaw_turn(self, intervals: int) -> Tensor:
        """bool ``[n]``, the rows whose turn it is to be live through the coming interval."""
        return (self.pool.rows + intervals) % self.config.thaw_every == 0

    def apply(self, duty: Tensor, decision: int) -> Tensor:
        """Set the duties; float64 ``[5]``: rows in the pool, stale, thawed, refrozen, look-ups left out."""
        pool = self.pool
        table = torch.searchsorted(self.shard_begins, pool.rows, right=True) - 1
        duty = selection.cap_duty(duty, pool.rate, table, self.table_rate, self.config.max_table_share)
        stale, was_stale = duty < 1.0, pool.duty < 1.0
        refrozen = stale & pool.thawed
        pool.thawed = was_stale & ~stale
        pool.duty = duty
        self.filter.set_patterns(pool.rows, selection.step_patterns(duty, pool.rows, decision))
        return torch.tensor(
            [
                pool.rows.numel(),
                int(stale.sum()),
                int(pool.thawed.sum()),
                int(refrozen.sum()),
                float((pool.rate.double() * (1.0 - duty.double())).sum()),
            ],
            dtype=torch.float64,
        )

    # ------------------------------------------------------------------------------------------- its state

    def state(self) -> dict[str, dict[str, Tensor]]:
        bounds = self.pool.bounds(self.shard_begins)
        one = self.filter
        saved = {}
        for i, shard in enumerate(one.shards):
            rows = slice(shard.row_begin, shard.row_begin + shard.rows)
            features = self._feature_table == i
            saved[shard.key] = {
                "touches": one.touches[rows].clone(),
                "patterns": one.patterns[rows].clone(),
                "lookups": one.lookups[features],
                "skipped": one.skipped[features],
                "table_rate": self.table_rate[i].clone(),
                "table_seen": self._table_seen[i].clone(),
                **{
                    f"pool.{name}": value
                    for name, value in self.pool.state_of(bounds[i], bounds[i + 1], i, shard.row_begin).items()
                },
            }
        return saved

    def load(self, shards: dict[str, dict[str, Tensor]]) -> None:
        one = self.filter
        parts = [shards[shard.key] for shard in one.shards]
        pool = RowPool.empty(one.device, [], self.snapshot_dtype)
        for i, (shard, part) in enumerate(zip(one.shards, parts, strict=True)):
            rows = slice(shard.row_begin, shard.row_begin + shard.rows)
            features = self._feature_table == i
            one.touches[rows] = part["touches"]
            one.patterns[rows] = part["patterns"]
            one.lookups[features] = part["lookups"]
            one.skipped[features] = part["skipped"]
            self.table_rate[i] = part["table_rate"]
            self._table_seen[i] = part["table_seen"]
        for name in ("rows", "seen", "rate", "updates", "duty", "score", "thawed", "state"):
            values = [part[f"pool.{name}"].to(one.device) for part in parts]
            if name == "rows":
                values = [v + shard.row_begin for v, shard in zip(values, one.shards, strict=True)]
            setattr(pool, name, torch.cat(values))
        pool.snapshots = [part["pool.snapshots"].to(one.device) for part in parts]
        self.pool = pool
        one.any_stale = bool((one.patterns != selection.ALWAYS_LIVE).any())
