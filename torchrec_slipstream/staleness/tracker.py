"""The staleness tracker: decides at the ends of intervals which updates are left out until the next decision.

Between two decisions a step costs one gather, in the update filter: the look-ups are counted for the access profile
anyway (``access/live.py``), and the same counts serve here. At a decision, every rank looks at its own rows and agrees
with the others on one number, the scale of the duties or the threshold, through sums over the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.config import StalenessConfig
from torchrec_slipstream.errors import StateError
from torchrec_slipstream.report.octaves import Octaves
from torchrec_slipstream.report.payoff import Payoff
from torchrec_slipstream.report.report import Decision
from torchrec_slipstream.report.thinning import thin
from torchrec_slipstream.staleness import choosing, selection
from torchrec_slipstream.staleness.tracked_tbe import TrackedTbe
from torchrec_slipstream.staleness.trial import TRIAL_STEPS, Trials
from torchrec_slipstream.tbe import Sampling, UpdateFilter

# How strongly the share left out is pulled back to its target: half of what is owed, in the coming interval.
_FEEDBACK = 0.5
# Steps before a decision whose gradients it looks at.
_WATCHED_STEPS = 4
_SAVED = ("config", "steps", "intervals", "skipping_intervals", "trial_left", "sampling", "decisions", "shards")


class StalenessTracker:
    """Follows the rows behind a number of update filters and sets which are stale.

    Args:
        filters: one a TBE of this rank.
        config: the knobs.
        total: sums a float64 tensor over the ranks in place and returns it; the identity on one rank.
        device: where ``total`` wants its tensors on a rank without tables; default: the CPU.
        scale: look-ups that a touch stands for (``AccessConfig.scale``).

    Raises:
        AttachError: the configured signal needs optimizer state that a table's optimizer does not keep.
    """

    def __init__(
        self,
        filters: Sequence[UpdateFilter],
        config: StalenessConfig,
        total: selection.Total,
        device: torch.device | None = None,
        *,
        scale: int = 1,
    ) -> None:
        self.config = config
        self.filters = list(filters)
        self._device = self.filters[0].device if self.filters else device or torch.device("cpu")
        self._total_of = total
        self.steps = 0
        self.seconds = 0.0
        self.decisions: list[Decision] = []
        self._intervals = 0
        self._skipping_intervals = 0  # since the decision that first found stale rows, that one included
        self._waited = 0.0  # for other ranks, in the present decision
        self._tbes = [TrackedTbe(one, config, scale) for one in self.filters]
        self._trials = Trials([tbe.trial for tbe in self._tbes], config)
        rows = sum(one.patterns.numel() for one in self.filters)
        for tbe in self._tbes:
            tbe.capacity = config.memory_bytes * tbe.filter.patterns.numel() // max(1, rows) // tbe.row_bytes
        self._prepare_step()

    def _total(self, values: Tensor) -> Tensor:
        began = time.perf_counter()
        total = self._total_of(values)
        self._waited += time.perf_counter() - began
        return total

    @property
    def _sampling(self) -> Sampling | None:
        return self.filters[0].sampling if self.filters else None

    def step(self) -> None:
        """Call after every training step. At the end of an interval it decides."""
        began = time.perf_counter()
        self.steps += 1
        if trial_ends := self._trials.end_step():
            self._end_trial()
        for one in self.filters:
            one.lower_high()
        if interval_ends := self.steps % self.config.interval == 0:
            self._decide()
        if trial_ends or interval_ends:
            self.seconds += time.perf_counter() - began
        self._prepare_step()

    def _prepare_step(self) -> None:
        to_go = self.config.interval - self.steps % self.config.interval
        coming = self._skipping_intervals + 1
        decides_next = choosing.decides(self.config, coming)
        watches = decides_next and self.config.selection == "sampling" and to_go <= _WATCHED_STEPS
        for tbe in self._tbes:
            one = tbe.filter
            one.phase = self.steps % selection.PHASES
            one.step = self.steps
            one.active = self._skipping_intervals > 0 and self._trials.skip(tbe.trial)
            one.watching = watches and self._trials.may_watch(tbe.trial, coming)
            if decides_next and to_go == min(_WATCHED_STEPS, self.config.interval):
                tbe.forgets = True
            if one.watching and tbe.forgets:
                one.magnitudes.clear()
                tbe.forgets = False
        self._trials.prepare_step()

    def _end_trial(self) -> None:
        """Let the TBEs that gained nothing alone."""
        rows = sum(tbe.pool.rows.numel() for tbe in self._tbes)
        steps = self.config.interval * choosing.gap(self.config, self._skipping_intervals)
        # Not the first decision, which pays for what is made once.
        seconds = self.decisions[-1].seconds if len(self.decisions) > 1 else 0.0
        for tbe in self._tbes:
            share = tbe.pool.rows.numel() / max(1, rows)
            tbe.trial.end(self.steps, share * seconds / steps)
            if not tbe.trial.pays:
                tbe.leave_alone()

    def payoffs(self) -> list[Payoff]:
        """What was measured last of each TBE of this rank that was tried."""
        return [tbe.trial.last for tbe in self._tbes if tbe.trial.last is not None]

    # ------------------------------------------------------------------------------------------- a decision

    @torch.no_grad()
    def _decide(self) -> None:
        self._intervals += 1
        config = self.config
        # A signal compares with the decision before, so the warm-up's last interval is enough to look at.
        if config.target_share == 0.0 or self.steps + config.interval < config.warmup_steps:
            return
        if self._skipping_intervals:
            self._skipping_intervals += 1
            if self._trials.are_due(self._skipping_intervals):
                self._trials.begin()
            if not choosing.decides(config, self._skipping_intervals):
                return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a decision waits anyway, and training's kernels are not its time
        began, self._waited = time.perf_counter(), 0.0
        tried = [tbe for tbe in self._tbes if self._trials.are_open_to(tbe.trial)]
        for tbe in tried:
            tbe.observe(self._intervals)
        if self.steps < config.warmup_steps:
            return
        table_rate, offered, skipped, all_offered, all_skipped = self._global_sums(tried).tolist()
        owed = config.target_share * offered - skipped
        coming = table_rate * choosing.until_next(config, max(1, self._skipping_intervals))
        share = config.target_share + _FEEDBACK * owed / max(coming, 1.0)
        wanted = torch.tensor(min(max(share, 0.0), 0.99) * table_rate, dtype=torch.float64)
        counts = torch.zeros(5, dtype=torch.float64)
        if config.selection == "sampling":
            chosen, left_out, popular = choosing.choose_sampling(config, tried, wanted, self._total)
            for one in self.filters:  # also of those left alone, so that all have one: that is what is saved
                one.sampling = chosen
            for tbe in tried:
                counts += tbe.apply_sampling(left_out, popular)
        else:
            duties = choosing.choose_duties(config, tried, wanted, table_rate, self._intervals, self._total)
            for tbe, duty in zip(tried, duties, strict=True):
                counts += tbe.apply(duty, self._intervals)
        pool, stale, thawed, refrozen, left_out = self._total(counts.to(self._device)).tolist()
        if stale and not self._skipping_intervals:
            self._skipping_intervals = 1
            if self._trials.are_due(1):
                self._trials.begin()
        self.decisions.append(
            Decision(
                step=self.steps,
                pool_rows=int(pool),
                stale_rows=int(stale),
                thawed_rows=int(thawed),
                refrozen_rows=int(refrozen),
                measured_share=all_skipped / max(all_offered, 1),
                expected_share=left_out / max(table_rate, 1.0),
                seconds=time.perf_counter() - began - self._waited,
            )
        )
        thin(self.decisions, Decision.join)

    def _global_sums(self, tried: Sequence[TrackedTbe]) -> Tensor:
        """float64 ``[5]`` over all ranks: of the TBEs tried, look-ups an interval, offered and left out; of all TBEs,
        offered and left out.

        What a TBE that is left alone could not leave out in its trials is no debt of the others.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=self._device)
        for tbe in tried:
            sums[0] += tbe.table_rate.sum()
            sums[1] += tbe.filter.offered.sum()
            sums[2] += tbe.filter.skipped.sum()
        for tbe in self._tbes:
            sums[3] += tbe.filter.offered.sum()
            sums[4] += tbe.filter.skipped.sum()
        return self._total(sums)

    def spread(self) -> list[dict[str, Octaves]]:
        """How rows and samples differ in what the choice goes by, of every TBE of this rank: see ``Report.spread``."""
        return [tbe.spread() for tbe in self._tbes]

    # ------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decisions depend on. Tensors are keyed by shard, hence unique over ranks."""
        shards: dict[str, dict[str, Tensor]] = {}
        for tbe in self._tbes:
            shards.update(tbe.state())
        return {
            "config": asdict(self.config),
            "steps": self.steps,
            "intervals": self._intervals,
            "skipping_intervals": self._skipping_intervals,
            "trial_left": self._trials.left,
            "sampling": None if self._sampling is None else [self._sampling.scale, self._sampling.least],
            "decisions": [asdict(decision) for decision in self.decisions],
            "shards": shards,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise StateError unless :meth:`load_state_dict` can restore this state."""
        if missing := [key for key in _SAVED if key not in state]:
            raise StateError(f"the saved staleness state is incomplete: it lacks {missing}")
        shards = state["shards"]
        ours = [shard.key for one in self.filters for shard in one.shards]
        if missing := sorted(set(ours) - shards.keys()):
            raise StateError(
                f"the saved state lacks shard(s) {missing[:3]} of this model; it has {sorted(shards)[:3]}. "
                "Staleness state follows the sharding: load it with the plan and the rank it was saved with, "
                "or start without it (rows are then tracked afresh)."
            )
        for tbe in self._tbes:
            tbe.check(shards)
        saved_config = state["config"]
        if saved_config != asdict(self.config):
            differing = [k for k, v in asdict(self.config).items() if saved_config.get(k) != v]
            raise StateError(
                f"the saved state was made with another configuration: {differing} differ. Use the same "
                "StalenessConfig to resume, or start without the staleness state."
            )
        _progress(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave. Checks everything first.

        Raises:
            StateError: other tables or shards, other sizes, or another configuration.
        """
        self.check(state)
        numbers, sampling, self.decisions = _progress(state)
        self.steps, self._intervals, self._skipping_intervals, self._trials.left = numbers
        self.seconds = 0.0  # a report is of the time since
        for tbe in self._tbes:
            tbe.load(state["shards"])
            tbe.filter.sampling = sampling
        self._prepare_step()


def _progress(state: dict[str, Any]) -> tuple[list[int], Sampling | None, list[Decision]]:
    """Of a saved state: steps, intervals, those since skipping began and steps left of a trial; the sampling; the
    decisions. Raises StateError if they are malformed."""
    try:
        numbers = [int(state[name]) for name in ("steps", "intervals", "skipping_intervals", "trial_left")]
        if min(numbers) < 0 or numbers[-1] > TRIAL_STEPS:
            raise ValueError(f"steps, intervals, those with skipping and what is left of a trial are {numbers}")
        sampling = None if state["sampling"] is None else Sampling(*state["sampling"])
        decisions = [Decision(**decision) for decision in state["decisions"]]
        return numbers, sampling, decisions
    except (TypeError, ValueError, IndexError) as error:
        raise StateError(f"the saved staleness state is malformed: {error}") from error
