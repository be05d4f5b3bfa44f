"""What skipping must beat: the same share of updates left out blindly, and the paper's own choice."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from examples.train_dlrm import Session
from torchrec_slipstream import Report, Slipstream, SlipstreamConfig, StalenessConfig, TableReport
from torchrec_slipstream.report.report import Decision
from torchrec_slipstream.staleness.signals import RowView
from torchrec_slipstream.tbe import UpdateFilter, find_tbes
from torchrec_slipstream.tbe.finding import FoundTbe

PROVIDERS = ("ours", "ours_tail", "random_rows", "random_lookups", "movement")
# No row is due for a thaw in any run: where the choice is drawn afresh every time, that thaws by itself.
_NEVER = 2**40


class RandomSignal:
    """A new random number for every trained row at every decision, so that a threshold on it picks random rows."""

    needs_snapshot = False
    needs_state = False

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def score(self, rows: RowView) -> Tensor:
        return torch.rand(rows.updates.numel(), generator=self._generator).to(rows.updates.device)


class RandomLookupFilter(UpdateFilter):
    """Leaves out every look-up with probability ``share``, trained row or not, each by itself."""

    def __init__(self, found: FoundTbe, share: float, generator: torch.Generator) -> None:
        super().__init__(found)
        self._share = share
        self._generator = generator

    def choose_live(self, rows: Tensor) -> Tensor:
        return (torch.rand(rows.numel(), generator=self._generator) >= self._share).to(rows.device)


class RandomLookups:
    """A session that leaves out random look-ups, from the step on at which a Slipstream would begin to skip.

    Args:
        config: ``target_share``, ``warmup_steps`` and ``interval`` count, nothing else does.
    """

    def __init__(self, model: DistributedModelParallel, config: StalenessConfig, seed: int) -> None:
        self._config = config
        # The first decision that is not before the end of the warm-up.
        self._begins = max(1, -(-config.warmup_steps // config.interval)) * config.interval
        self._steps = 0
        self._seen_before = 0
        self._began = time.perf_counter()
        generator = torch.Generator().manual_seed(seed)
        self.filters = [RandomLookupFilter(found, config.target_share, generator) for found in find_tbes(model)]
        for one in self.filters:
            one.attach()

    def step(self) -> None:
        self._steps += 1
        if self._steps == self._begins:
            self._seen_before = self._total("lookups")
            for one in self.filters:
                one.any_stale = True

    def report(self) -> Report:
        """One line for all tables; the measured share stands in the only decision."""
        seen, skipped = self._total("lookups"), self._total("skipped")
        share = skipped / max(1, seen - self._seen_before)
        rows = sum(shard.rows for one in self.filters for shard in one.shards)
        return Report(
            tables={"all": TableReport(rows=rows, stale_rows=0, touched_rows=0, lookups=seen, skipped=skipped)},
            steps=self._steps,
            seconds=time.perf_counter() - self._began,
            tracker_seconds=0.0,
            target_share=self._config.target_share,
            decisions=[Decision(self._begins, 0, 0, 0, 0, share, self._config.target_share, 0.0)],
        )

    def _total(self, name: str) -> int:
        return sum(int(getattr(one, name).sum()) for one in self.filters)


def attach_provider(provider: str, model: DistributedModelParallel, config: SlipstreamConfig, seed: int) -> Session:
    """Attach one of ``PROVIDERS``, with the share, warm-up and interval of ``config``."""
    staleness = config.staleness
    if provider == "random_lookups":
        return RandomLookups(model, staleness, seed)
    if provider == "random_rows":
        # "gain" because it keeps no snapshots, which nobody would look at.
        staleness = replace(staleness, selection="threshold", signal="gain", thaw_every=_NEVER)
        session = Slipstream(model, replace(config, staleness=staleness))
        signal = RandomSignal(seed)
        for tbe in session._tracker._tbes:
            tbe.signal = signal
        return session
    if provider == "movement":
        config = replace(config, staleness=replace(staleness, selection="threshold", signal="movement"))
    elif provider == "ours_tail":
        config = replace(config, staleness=replace(staleness, tail_share=0.75))
    elif provider != "ours":
        raise ValueError(f"provider is {provider!r}; give one of {', '.join(PROVIDERS)}")
    return Slipstream(model, config)
