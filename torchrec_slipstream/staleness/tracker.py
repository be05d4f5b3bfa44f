"""The staleness tracker: decides once an interval which updates are left out until the next.

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
from torchrec_slipstream.report.report import Decision
from torchrec_slipstream.report.thinning import thin
from torchrec_slipstream.staleness import selection
from torchrec_slipstream.staleness.tracked_tbe import TrackedTbe
from torchrec_slipstream.tbe import Sampling, UpdateFilter

# How strongly the share left out is pulled back to its target: half of what is owed, in the coming interval.
_FEEDBACK = 0.5
# Steps before a decision whose gradients it looks at.
_WATCHED_STEPS = 4
_SAVED = ("config", "steps", "intervals", "baseline", "sampling", "decisions", "shards")


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
        self._total = total
        self.steps = 0
        self.seconds = 0.0
        self.decisions: list[Decision] = []
        self._intervals = 0
        self._baseline: tuple[int, int] | None = None
        self._tbes = [TrackedTbe(one, config, scale) for one in self.filters]
        rows = sum(one.patterns.numel() for one in self.filters)
        for tbe in self._tbes:
            tbe.capacity = config.memory_bytes * tbe.filter.patterns.numel() // max(1, rows) // tbe.row_bytes
        self._prepare_step()

    @property
    def _sampling(self) -> Sampling | None:
        return self.filters[0].sampling if self.filters else None

    def step(self) -> None:
        """Call after every training step. At the end of an interval it decides."""
        began = time.perf_counter()
        self.steps += 1
        for one in self.filters:
            one.lower_high()
        if self.steps % self.config.interval == 0:
            self._decide()
            self.seconds += time.perf_counter() - began
        self._prepare_step()

    def _prepare_step(self) -> None:
        for one in self.filters:
            one.phase = self.steps % selection.PHASES
            one.step = self.steps
            to_go = self.config.interval - self.steps % self.config.interval
            one.watching = self.config.selection == "sampling" and to_go <= _WATCHED_STEPS
            if to_go == min(_WATCHED_STEPS, self.config.interval):
                one.magnitudes.clear()

    # ------------------------------------------------------------------------------------------- a decision

    @torch.no_grad()
    def _decide(self) -> None:
        began = time.perf_counter()
        self._intervals += 1
        config = self.config
        # A signal compares with the decision before, so the warm-up's last interval is enough to look at.
        if config.target_share == 0.0 or self.steps + config.interval < config.warmup_steps:
            return
        for tbe in self._tbes:
            tbe.observe(self._intervals)
        if self.steps < config.warmup_steps:
            return
        sums = self._global_sums()
        table_rate, seen, skipped = (float(value) for value in sums)
        if self._baseline is None:
            self._baseline = (int(seen), int(skipped))
        seen, skipped = seen - self._baseline[0], skipped - self._baseline[1]
        owed = config.target_share * seen - skipped
        share = config.target_share + _FEEDBACK * owed / max(table_rate, 1.0)
        wanted = torch.tensor(min(max(share, 0.0), 0.99) * table_rate, dtype=torch.float64)
        counts = torch.zeros(5, dtype=torch.float64)
        if config.selection == "sampling":
            chosen, left_out, popular = self._choose_sampling(wanted)
            for tbe in self._tbes:
                counts += tbe.apply_sampling(chosen, left_out, popular)
        else:
            for tbe, duty in zip(self._tbes, self._choose_duties(wanted, table_rate), strict=True):
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
        thin(self.decisions, Decision.join)

    def _global_sums(self) -> Tensor:
        """float64 ``[3]`` over all ranks: look-ups an interval, look-ups seen, look-ups left out."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for tbe in self._tbes:
            sums[0] += tbe.table_rate.sum()
            sums[1] += tbe.filter.lookups.sum()
            sums[2] += tbe.filter.skipped.sum()
        return self._total(sums)

    def _choose_sampling(self, wanted: Tensor) -> tuple[Sampling, float, float]:
        """How to sample so that the wanted number of look-ups is left out.

        The gradients of the steps before stand for those to come, and stale look-ups for all of a sample's.

        Returns:
            The sampling, the share of the sampled rows' look-ups that it leaves out, and the look-ups an interval up
            to which a row is sampled.
        """
        config = self.config
        none = torch.empty(0, device=self._device)
        magnitudes = torch.cat([none, *(m for one in self.filters for m in one.magnitudes)])
        rate = torch.cat([none, *(tbe.pool.rate for tbe in self._tbes)])
        popular = float("inf")
        if config.tail_share > 0.0:
            popular = selection.quantile_threshold(rate, rate, wanted / config.tail_share, self._total)
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        sums[0] = torch.where(rate < popular, rate, 0.0).sum(dtype=torch.float64)
        sums[1] = magnitudes.isfinite().sum()
        sampled_rate, watched = (float(value) for value in self._total(sums))
        share = min(float(wanted) / max(sampled_rate, 1.0), config.max_table_share, 1.0 - config.min_probability)
        if watched == 0.0:
            return Sampling(1.0, 1.0), 0.0, popular  # no backward has shown its gradients: keep everything
        target = torch.tensor(share * watched, dtype=torch.float64)
        scale = selection.proportional_scale(
            magnitudes, torch.ones_like(magnitudes), target, config.min_probability, self._total
        )
        return Sampling(scale, config.min_probability), share, popular

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
            "baseline": self._baseline,
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
        self.steps, self._intervals, self._baseline, sampling, self.decisions = _progress(state)
        self.seconds = 0.0  # a report is of the time since
        for tbe in self._tbes:
            tbe.load(state["shards"])
            tbe.filter.sampling = sampling
        self._prepare_step()


def _progress(state: dict[str, Any]) -> tuple[int, int, tuple[int, int] | None, Sampling | None, list[Decision]]:
    """Of a saved state: steps, intervals, baseline, sampling and decisions. Raises StateError if they are malformed."""
    try:
        baseline = None if state["baseline"] is None else (int(state["baseline"][0]), int(state["baseline"][1]))
        sampling = None if state["sampling"] is None else Sampling(*state["sampling"])
        decisions = [Decision(**decision) for decision in state["decisions"]]
        return int(state["steps"]), int(state["intervals"]), baseline, sampling, decisions
    except (TypeError, ValueError, IndexError) as error:
        raise StateError(f"the saved staleness state is malformed: {error}") from error
