"""Does leaving updates out of a TBE make its steps shorter? Tried while training runs.

What a backward saves follows the look-ups left out; choosing them costs a step nearly the same whatever the batch. So
there is a batch below which skipping loses time, and where it lies depends on the machine, the optimizer, the dims and
the traffic: between two machines of one name it was seen to differ several times over. In a trial half of the steps run
stock, the others leave out what was chosen, and both are timed. A TBE that gains nothing is left alone, all its rows
live, until the next trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchrec_slipstream.config import StalenessConfig
from torchrec_slipstream.report.payoff import Payoff
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.stopwatch import Stopwatch

TRIAL_STEPS = 32
"""Steps of one trial. 16 a kind tell a TBE's time to a few percent on a busy machine."""
_LEAST_SAMPLES = 4
# Of a TBE's time in a stock step, what has to be saved. Below that it could be noise; and updates are not left out for
# nothing.
_WORTH = 0.05


def begins_with(interval: int) -> bool:
    """Whether a trial begins with this interval, counted from 1 where skipping began: the 1st, 2nd, 4th, 8th and so on.

    Early, as rows become trained; then ever more rarely, as less and less changes.
    """
    return interval.bit_count() == 1


def skips(step: int) -> bool:
    """Whether a trial's step, counted from 0, leaves updates out.

    Of two steps 2k and 2k + 1 one does. Which one, multiples of the golden ratio say, so that neither kind keeps step
    with what else happens every so often.
    """
    pair, second = divmod(step, 2)
    return ((pair * 0x9E3779B9) >> 31 & 1) != second


@dataclass
class Trial:
    """What was found of one TBE.

    Attributes:
        filter: the TBE's.
        pays: whether its updates are left out between trials; True until it was tried.
        last: what the last trial found; None before.
    """

    filter: UpdateFilter
    pays: bool = True
    last: Payoff | None = None
    _watches: dict[bool, list[Stopwatch]] = field(default_factory=lambda: {False: [], True: []})

    def begin(self) -> None:
        """Forget the times of the trial before."""
        for watches in self._watches.values():
            watches.clear()

    def watch(self, *, skips: bool) -> None:
        """Time the coming step, which leaves updates out or does not."""
        watch = Stopwatch(self.filter.device)
        self._watches[skips].append(watch)
        self.filter.stopwatch = watch

    def end(self, step: int, decision_seconds: float) -> None:
        """Decide whether it pays. Too few times, as right after resuming, change nothing.

        Args:
            step: of the session.
            decision_seconds: what decisions cost this TBE a step.
        """
        self.filter.stopwatch = None
        stock, skipping = (
            [found for one in self._watches[kind] if (found := one.seconds()) is not None] for kind in (False, True)
        )
        self.begin()
        if min(len(stock), len(skipping)) < _LEAST_SAMPLES:
            return
        # Lower quartiles, as whatever else the machine does only ever adds to a time.
        stock_ms, skipping_ms = (1e3 * float(np.quantile(found, 0.25)) for found in (stock, skipping))
        skipping_ms += 1e3 * decision_seconds
        self.pays = skipping_ms <= (1.0 - _WORTH) * stock_ms
        self.last = Payoff(self._tables(), step, stock_ms, skipping_ms, self.pays)

    def _tables(self) -> list[str]:
        return sorted({shard.fqn for shard in self.filter.shards})

    def state(self) -> Tensor:
        """float64 ``[4]``: whether it pays, and of the last trial step and milliseconds, NaN before the first."""
        last = self.last
        found = [last.step, last.stock_ms, last.skipping_ms] if last is not None else [torch.nan] * 3
        return torch.tensor([float(self.pays), *found], dtype=torch.float64)

    @staticmethod
    def is_state(state: Tensor) -> bool:
        """Whether :meth:`state` may have given this tensor, which is of its shape and dtype."""
        pays, *found = state.tolist()
        return pays in (0.0, 1.0) and (all(map(math.isnan, found)) or all(map(math.isfinite, found)))

    def load(self, state: Tensor) -> None:
        """Restore what :meth:`state` gave."""
        pays, step, stock_ms, skipping_ms = state.tolist()
        self.begin()
        self.pays, self.last = bool(pays), None
        if not math.isnan(step):
            self.last = Payoff(self._tables(), int(step), stock_ms, skipping_ms, self.pays)


class Trials:
    """The trials of this rank's TBEs. They come at the same steps on all ranks; what comes of them is each TBE's own.

    Attributes:
        left: steps that are left of the present trial; 0: there is none.
    """

    def __init__(self, trials: Sequence[Trial], config: StalenessConfig) -> None:
        self._trials = trials
        self._config = config
        self.left = 0

    def are_due(self, interval: int) -> bool:
        """Whether one begins with this interval, counted from 1 where skipping began."""
        return self._config.where == "faster" and begins_with(interval)

    def begin(self) -> None:
        """Begin one, unless the last is not over, as intervals are short."""
        if self.left == 0:
            self.left = TRIAL_STEPS
            for one in self._trials:
                one.begin()

    def are_open_to(self, one: Trial) -> bool:
        """Whether a TBE's updates are left out, or may be: it pays, or it is being tried."""
        return self.left > 0 or one.pays

    def skip(self, one: Trial) -> bool:
        """Whether the coming step leaves the TBE's updates out."""
        return self._skips_now if self.left else one.pays

    @property
    def _skips_now(self) -> bool:
        return skips(TRIAL_STEPS - self.left)

    def may_watch(self, one: Trial, interval: int) -> bool:
        """Whether the coming step's gradients may be looked at, for a decision at the end of this interval.

        Not in a trial's stock steps, to which it would add what a step that skips has anyway.
        """
        return self._skips_now if self.left else one.pays or self.are_due(interval)

    def prepare_step(self) -> None:
        """Time the coming step if it is a trial's."""
        for one in self._trials:
            one.filter.stopwatch = None
            if self.left and one.filter.any_stale:
                one.watch(skips=self._skips_now)

    def end_step(self) -> bool:
        """Count a training step; whether a trial ended with it."""
        if self.left == 0:
            return False
        self.left -= 1
        return self.left == 0
