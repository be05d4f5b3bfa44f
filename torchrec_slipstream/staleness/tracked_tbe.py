"""One TBE under the tracker's eyes: its pool of rows, and what a decision does with it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from torchrec_slipstream.config import StalenessConfig
from torchrec_slipstream.errors import AttachError, StateError
from torchrec_slipstream.report.octaves import Octaves
from torchrec_slipstream.staleness import selection
from torchrec_slipstream.staleness.pool import RowPool
from torchrec_slipstream.staleness.signals import SIGNALS, RowView, Signal
from torchrec_slipstream.staleness.trial import Trial
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.compaction import positions_of
from torchrec_slipstream.tbe.update_filter import ALWAYS_LIVE

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class TrackedTbe:
    """One TBE's pool, and what a decision does with it. A touch stands for ``scale`` look-ups.

    Attributes:
        trial: whether leaving its updates out pays.
        forgets: whether the next gradients to be watched take the place of those before.
    """

    def __init__(self, update_filter: UpdateFilter, config: StalenessConfig, scale: int) -> None:
        self.filter = update_filter
        self.config = config
        self.scale = scale
        self.signal = _signal_for(update_filter, config)
        shards = update_filter.shards
        device = update_filter.device
        self.snapshot_dtype = _DTYPES[config.snapshot_dtype]
        dims = [shard.dim if self.signal is not None and self.signal.needs_snapshot else 0 for shard in shards]
        self.pool = RowPool.empty(device, dims, self.snapshot_dtype)
        self.row_bytes = RowPool.STATE_BYTES + max(dims) * self.snapshot_dtype.itemsize
        self.capacity = 0
        self.shard_begins = torch.tensor([shard.row_begin for shard in shards], dtype=torch.int64, device=device)
        # A row without a count of its own cannot be known to have trained.
        self.excluded = [shard.table in config.exclude_tables or not shard.counted for shard in shards]
        self.table_rate = torch.zeros(len(shards), dtype=torch.float64, device=device)
        self._table_seen = torch.zeros(len(shards), dtype=torch.int64, device=device)
        self._observed = 0  # the interval that was taken in last
        self._offered_seen = 0  # which only a signal asks for
        self.trial = Trial(update_filter)
        self.forgets = False
        update_filter.followers.append(self._follow_lowering)
        self._feature_table = torch.tensor(update_filter.feature_table, dtype=torch.int64, device=device)

    def observe(self, intervals: int) -> None:
        """Take in what was since the last call, of the ``intervals`` so far: the pool's rows, their rates, updates and
        signals."""
        config = self.config
        passed, self._observed = max(1, intervals - self._observed), intervals
        lookups = torch.zeros_like(self._table_seen).index_add_(0, self._feature_table, self.filter.lookups)
        first = not bool(self._table_seen.any())
        new = (lookups - self._table_seen).double() / passed
        self._table_seen = lookups
        decay = 0.0 if first else config.rate_decay**passed
        self.table_rate = decay * self.table_rate + (1.0 - decay) * new

        rows = self._pool_rows()
        touches = self.filter.touches.index_select(0, rows)
        scaled = touches.float() * self.scale
        has_signal = self.signal is not None
        pool, fresh = self.pool.moved_to(rows, scaled, intervals, self.shard_begins, signals=has_signal)
        new_touches = (touches - pool.seen).float() * self.scale
        rate = (decay * pool.rate).add_(new_touches, alpha=(1.0 - decay) / passed)
        pool.rate = rate.index_copy_(0, fresh, pool.rate[fresh])
        pool.seen = touches
        self.pool = pool
        if self.signal is not None:
            offered = int(self.filter.offered.sum())
            # In the steps that left nothing out, as a trial's every other one, all rows were live.
            active = min(1.0, (offered - self._offered_seen) / max(1.0, float(new.sum()) * passed))
            new_updates = new_touches * (1.0 - active * (1.0 - pool.duty))
            pool.updates = (pool.updates + new_updates).index_copy_(0, fresh, pool.updates[fresh])
            self._offered_seen = offered
            self._score(self.signal, new_updates)

    def _pool_rows(self) -> Tensor:
        """Ascending rows with enough touches, the most-touched ones where memory does not hold all."""
        least = -(-self.config.min_touches // self.scale)
        touches = self.filter.touches
        rows = positions_of(touches >= least)
        if self.config.selection == "sampling" and not self.filter.can_sample:
            return rows[:0]
        for shard, left_alone in zip(self.filter.shards, self.excluded, strict=True):
            if left_alone:
                rows = rows[(rows < shard.slots.start) | (rows >= shard.slots.stop)]
        if rows.numel() > self.capacity:
            most = touches[rows].topk(self.capacity, sorted=False).indices
            rows = rows[most.sort().values]
        return rows

    def _follow_lowering(self, rows: Tensor, taken: Tensor) -> None:
        lowered = torch.isin(self.pool.rows, rows)
        self.pool.seen[lowered] -= taken[torch.searchsorted(rows, self.pool.rows[lowered])]

    def _score(self, signal: Signal, new_updates: Tensor) -> None:
        """Bring every row's signal up to date, and take the snapshots for the next."""
        pool = self.pool
        bounds = pool.bounds(self.shard_begins)
        begins = self.shard_begins.tolist()
        for shard, (begin, end) in enumerate(pairwise(bounds)):
            if begin == end:
                continue
            local = pool.rows[begin:end] - begins[shard]
            part = slice(begin, end)
            now = torch.empty(0, device=local.device)
            if signal.needs_snapshot:
                now = self.filter.weights(shard, local).float()
            state = torch.empty(0, device=local.device)
            if signal.needs_state:
                state = self.filter.squared_gradients(shard, local).float()
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
            if signal.needs_state:
                pool.state[part] = state
            if signal.needs_snapshot:
                pool.snapshots[shard] = now.to(self.snapshot_dtype)

    def comparable_score(self) -> Tensor:
        """The pool's scores, in units of their table's mean where the configuration says so."""
        pool = self.pool
        if not self.config.normalise_tables:
            return pool.score
        score = pool.score.clone()
        bounds = pool.bounds(self.shard_begins)
        for begin, end in pairwise(bounds):
            part, rate = score[begin:end], pool.rate[begin:end]
            known = part.isfinite()
            mean = (part[known] * rate[known]).sum() / rate[known].sum().clamp(min=1e-30)
            score[begin:end] = part / mean.clamp(min=1e-30)
        return score

    def thaw_turn(self, intervals: int) -> Tensor:
        """bool ``[n]``, the rows whose turn it is to be live through the coming interval."""
        return (self.pool.rows + intervals) % self.config.thaw_every == 0

    def apply_sampling(self, left_out: float, popular: float) -> Tensor:
        """Let the look-ups of the pool's rows be sampled, as the filter's ``sampling`` says; float64 ``[5]`` as
        :meth:`apply`.

        ``left_out`` is the share of the sampled rows' look-ups that is expected to be left out, ``popular`` the
        look-ups an interval from which on a row stays live.
        """
        pool = self.pool
        sampled = pool.rate < popular
        rows = pool.rows if bool(sampled.all()) else pool.rows[sampled]
        self.filter.set_patterns(rows, torch.zeros((), dtype=torch.uint8, device=rows.device))
        return self._set_duty(torch.where(sampled, 1.0 - left_out, 1.0))

    def apply(self, duty: Tensor, decision: int) -> Tensor:
        """Set the duties; float64 ``[5]``: rows in the pool, stale, thawed, refrozen, look-ups left out."""
        pool = self.pool
        table = torch.searchsorted(self.shard_begins, pool.rows, right=True) - 1
        duty = selection.cap_duty(duty, pool.rate, table, self.table_rate, self.config.max_table_share)
        self.filter.set_patterns(pool.rows, selection.step_patterns(duty, pool.rows, decision))
        return self._set_duty(duty)

    def leave_alone(self) -> None:
        """Let all rows be live, until the next :meth:`apply`."""
        rows = self.pool.rows[:0]  # whose duty stays: the next observation is also of the steps before
        self.filter.set_patterns(rows, torch.zeros((), dtype=torch.uint8, device=rows.device))

    def _set_duty(self, duty: Tensor) -> Tensor:
        """Remember the duties, and which rows they thaw; what :meth:`apply` returns."""
        pool = self.pool
        stale, was_stale = duty < 1.0, pool.duty < 1.0
        refrozen = stale & pool.thawed
        pool.thawed = was_stale & ~stale
        pool.duty = duty
        left_out = float((pool.rate * (1.0 - duty)).sum(dtype=torch.float64))
        rows = [pool.rows.numel(), int(stale.sum()), int(pool.thawed.sum()), int(refrozen.sum())]
        return torch.tensor([*rows, left_out], dtype=torch.float64)

    def spread(self) -> dict[str, Octaves]:
        """How this TBE's rows and samples differ in what the choice goes by: see ``Report.spread``."""
        counts = self.filter.counts
        counted = [shard.slots for shard in self.filter.shards if shard.counted]
        found = {"lookups": sum((Octaves.of(counts.counts(s.start, s.stop), self.scale) for s in counted), Octaves())}
        if self.signal is None:
            found["gradient"] = sum(map(Octaves.of, self.filter.magnitudes), Octaves())
        for name, kind in SIGNALS.items():
            if type(self.signal) is kind:  # a signal of somebody else's has no name to go by
                found[name] = Octaves.of(self.pool.score)
        return found

    # ------------------------------------------------------------------------------------------- its state

    def state(self) -> dict[str, dict[str, Tensor]]:
        saved = {key: {name: value.clone() for name, value in part.items()} for key, part in self._parts().items()}
        for shard in self.filter.shards:
            saved[shard.key]["pool.rows"] -= shard.row_begin
        return saved

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        """What is saved, by shard: views of what is large. The pool's rows are still those of the TBE."""
        bounds = self.pool.bounds(self.shard_begins)
        one = self.filter
        parts = {}
        none = torch.empty(0, device=one.device)
        for i, shard in enumerate(one.shards):
            rows = shard.slots
            features = self._feature_table == i
            parts[shard.key] = {
                "touches": one.touches[rows],
                "patterns": one.patterns[rows],
                "lookups": one.lookups[features],
                "offered": one.offered[features],
                "skipped": one.skipped[features],
                "table_rate": self.table_rate[i],
                "table_seen": self._table_seen[i],
                "observed": torch.tensor([self._observed, self._offered_seen]),
                "trial": self.trial.state(),
                # What the coming decision has seen of the gradients; with the first shard, as they are the TBE's.
                "magnitudes": torch.cat([none, *(one.magnitudes if i == 0 else [])]),
                **{f"pool.{name}": value for name, value in self.pool.part(bounds[i], bounds[i + 1], i).items()},
            }
        return parts

    def check(self, shards: dict[str, dict[str, Tensor]]) -> None:
        """Raise StateError unless the saved shards fit this TBE's."""
        expected = self._parts()
        for shard, columns in zip(self.filter.shards, self.pool.snapshots, strict=True):
            saved, mine = shards[shard.key], expected[shard.key]
            if missing := sorted(mine.keys() - saved.keys()):
                raise StateError(f"shard {shard.key}: the saved state is incomplete, it lacks {missing}")
            for name, tensor in mine.items():
                if saved[name].dtype != tensor.dtype:
                    raise StateError(f"shard {shard.key}: {name} is {saved[name].dtype} instead of {tensor.dtype}")
                shape: tuple[int, ...] = tuple(tensor.shape)
                if name == "pool.snapshots":
                    # A signal that needs no snapshot has none of any row.
                    shape = (saved["pool.rows"].numel() if columns.shape[1] else 0, columns.shape[1])
                elif name == "magnitudes":
                    shape = (saved[name].numel(),)
                elif name.startswith("pool."):
                    shape = (saved["pool.rows"].numel(),)
                if tuple(saved[name].shape) != shape:
                    raise StateError(
                        f"shard {shard.key}: the saved state has {name} of shape {tuple(saved[name].shape)}, this "
                        f"model needs {shape}"
                    )
            if not Trial.is_state(saved["trial"]):
                raise StateError(f"shard {shard.key}: the saved trial is {saved['trial'].tolist()}")
            rows = saved["pool.rows"]
            if rows.numel() and (int(rows[0]) < 0 or int(rows[-1]) >= shard.rows or not bool((rows.diff() > 0).all())):
                raise StateError(f"shard {shard.key}: the saved rows are not ascending rows of {shard.rows}")

    def load(self, shards: dict[str, dict[str, Tensor]]) -> None:
        one = self.filter
        parts = [shards[shard.key] for shard in one.shards]
        pool = RowPool.empty(one.device, [], self.snapshot_dtype)
        for i, (shard, part) in enumerate(zip(one.shards, parts, strict=True)):
            rows = shard.slots
            features = self._feature_table == i
            one.touches[rows] = part["touches"]
            one.patterns[rows] = part["patterns"]
            # An index of bools wants its values on its own device, unlike the slices round it.
            one.lookups[features] = part["lookups"].to(one.device)
            one.offered[features] = part["offered"].to(one.device)
            one.skipped[features] = part["skipped"].to(one.device)
            self.table_rate[i] = part["table_rate"]
            self._table_seen[i] = part["table_seen"]
        for name in ("rows", "seen", "rate", "updates", "duty", "score", "thawed", "state"):
            values = [part[f"pool.{name}"].to(one.device) for part in parts]
            if name == "rows":
                values = [v + shard.row_begin for v, shard in zip(values, one.shards, strict=True)]
            setattr(pool, name, torch.cat(values))
        pool.snapshots = [part["pool.snapshots"].to(one.device) for part in parts]
        self.pool = pool
        self._observed, self._offered_seen = parts[0]["observed"].tolist()
        self.trial.load(parts[0]["trial"])
        one.counts.loaded()
        one.magnitudes = [parts[0]["magnitudes"].to(one.device)] if parts[0]["magnitudes"].numel() else []
        one.any_stale = bool((one.patterns != ALWAYS_LIVE).any())


def _signal_for(update_filter: UpdateFilter, config: StalenessConfig) -> Signal | None:
    """The signal that this TBE's rows are compared by; None where none is needed.

    Raises AttachError if the signal reads optimizer state that the TBE's optimizer does not keep.
    """
    if config.selection == "sampling":
        return None
    has_state = update_filter.has_squared_gradients
    name = config.signal
    if name == "auto":
        name = "gain" if has_state else "movement"
    signal = SIGNALS[name]()
    if signal.needs_state and not has_state:
        tables = ", ".join(sorted({shard.table for shard in update_filter.shards}))
        raise AttachError(
            f"table(s) {tables}: signal={name!r} reads the sum of squared gradients, which "
            f"{update_filter.tbe.optimizer} does not keep; use signal='movement' or an Adagrad optimizer"
        )
    return signal
