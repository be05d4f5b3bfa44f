"""The hot rows of one rank's tables while they train: their overlays, how often they are hit, and when they change."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import nan
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.config import PlacementConfig
from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.placement import saved_rows
from torchrec_slipstream.placement.migration import Moved, migrate
from torchrec_slipstream.placement.placement import Placement, ShardPlacement
from torchrec_slipstream.placement.replanning import Replanner
from torchrec_slipstream.placement.slots import (
    first_rows,
    may_be_hot,
    placed_shards,
    slots_of_budget,
    slots_of_placement,
)
from torchrec_slipstream.placement.stall import StallLimit
from torchrec_slipstream.report.placement import HitPoint, Replan, TableHits
from torchrec_slipstream.report.thinning import thin
from torchrec_slipstream.tbe import FoundTbe, UpdateFilter
from torchrec_slipstream.tbe.checkpoint import ReleaseBeforeAccess
from torchrec_slipstream.tbe.overlay import Overlay, can_hold


class HotRows:
    """The hot rows of one rank.

    Args:
        filters: one a TBE of this rank, not attached yet.
        config: the knobs.
        placement: which rows are hot at first; None: none, in overlays of ``config.hbm_budget``.
        rank: of this process in the placement.
        counted: how many of the steps from one number to before another are counted.
        total: sums a float64 tensor over the ranks in place and returns it.
        group_device: where ``total`` wants its tensors.

    Raises:
        AttachError: the placement or the budget does not fit the model.
    """

    def __init__(
        self,
        filters: Sequence[UpdateFilter],
        config: PlacementConfig,
        placement: Placement | None,
        *,
        rank: int,
        counted: Callable[[int, int], int],
        total: Callable[[Tensor], Tensor],
        group_device: torch.device,
    ) -> None:
        if placement is not None and config.hbm_budget is not None:
            raise AttachError(
                f"both a placement and hbm_budget={config.hbm_budget} were given; the placement says how much memory "
                "its hot rows take. Leave one out"
            )
        self.config = config
        self.filters = list(filters)
        self.placement = placement
        if placement is not None and any(one.device.type == "cpu" for one in self.filters):
            # A CPU has no faster memory than its own: the times of what was planned with say nothing about it.
            self.placement = replace(placement, expected_ms=nan)
        self.replans: list[Replan] = []
        self._counted = counted
        self._total = total
        self._group_device = group_device
        self._guards: list[ReleaseBeforeAccess] = []
        found = [one.found for one in self.filters]
        planned: list[list[ShardPlacement | None] | None] = [None] * len(found)
        self._first: list[dict[int, Tensor]] = [{} for _ in found]
        slots: list[Counter[int]] = [Counter() for _ in found]
        if config.hbm_budget is not None:
            slots = slots_of_budget(found, int(config.hbm_budget))
        if placement is not None:
            shards = placed_shards(found, placement, rank)
            slots = [slots_of_placement(one, plan) for one, plan in zip(found, shards, strict=True)]
            self._first = [first_rows(one, plan) for one, plan in zip(found, shards, strict=True)]
            planned = list(shards)
        self._whole = [_whole_shards(one, plan) for one, plan in zip(found, planned, strict=True)]
        self.overlays = [
            Overlay(one, dims, may_be_hot(one, placement, plan)) if sum(dims.values()) else None
            for one, dims, plan in zip(found, slots, planned, strict=True)
        ]
        self._replanners = [
            Replanner(overlay, one, config) if overlay is not None and config.replan_every else None
            for one, overlay in zip(self.filters, self.overlays, strict=True)
        ]
        # Features of tables that are in fast memory whole: every look-up is a hit.
        self._whole_features = [
            torch.tensor([f for f, t in enumerate(one.feature_table) if whole[t]], dtype=torch.int64).to(one.device)
            for one, whole in zip(self.filters, self._whole, strict=True)
        ]
        # At the last re-plan: look-ups so far, and steps.
        self._looked_up = self._planned_at = 0
        # By step: hits and look-ups until then. Without hot rows on any rank the last two are enough.
        self._points: list[tuple[int, Sequence[Tensor | int]]] = []
        self._keeps_points = placement is not None or config.hbm_budget is not None
        self._stall = StallLimit(config.max_stall_share, self._chunk_bytes)

    def attach(self) -> None:
        """Fill the overlays with their first rows. Call before the filters are attached. If it fails, nothing has
        changed."""
        try:
            for one, overlay, rows in zip(self.filters, self.overlays, self._first, strict=True):
                if overlay is not None:
                    migrate(overlay, rows, self._chunk_bytes)
                    one.overlay = overlay
                    self._guards.append(ReleaseBeforeAccess(one.found, overlay))
        except BaseException:
            self.withdraw()
            raise
        for one, replanner in zip(self.filters, self._replanners, strict=True):
            if replanner is not None:
                replanner.remember(0)
                one.followers.append(replanner.lower)
        self._first = []
        self._wait()  # a prefetch on another stream reads the slot words
        self._stall.restart()

    def withdraw(self) -> None:
        """Undo :meth:`attach` before any step, and let go of the memory."""
        self.detach()
        for one in self.filters:
            one.overlay = None

    def detach(self) -> None:
        """Leave the model's modules as they were. The filters detach first, and with that give all rows back."""
        for guard in self._guards:
            guard.remove()
        self._guards = []
        for one in self.filters:
            # Nothing is counted any more; whoever follows would keep the overlays for as long as the collector likes.
            one.followers.clear()

    @property
    def _chunk_bytes(self) -> int:
        return int(self.config.chunk_bytes)

    # ------------------------------------------------------------------------------------------- a step

    def step(self, steps: int) -> None:
        """Call after every training step, ``steps`` of which are over now."""
        if steps % self.config.record_every == 0:
            # The point before is long known; of the new one a clone is taken, for which nothing waits.
            if self._points:
                before, totals = self._points[-1]
                self._points[-1] = before, [int(value) for value in totals]
            self._points.append((steps, self._totals()))
            if not self._keeps_points:
                del self._points[:-2]
            thin(self._points, lambda _, later: later)  # which counts from the beginning, and so stands for both
        if self.config.replan_every and steps % self.config.replan_every == 0:
            self._replan(steps)

    def last_hit_rate(self) -> tuple[int, float] | None:
        """This rank's hit rate between its last two recorded points, and the step of the last."""
        if len(self._points) < 2:
            return None
        (_, before), (step, now) = self._points[-2:]
        hits, lookups = (int(b) - int(a) for a, b in zip(before, now, strict=True))
        return (step, hits / lookups) if lookups else None

    def _totals(self) -> list[Tensor]:
        hits, lookups = [], []
        for one, overlay, whole in zip(self.filters, self.overlays, self._whole_features, strict=True):
            hits.append(one.lookups.index_select(0, whole).sum())
            if overlay is not None:
                hits[-1] = hits[-1] + overlay.hits.sum()
            lookups.append(one.lookups.sum())
        zero = torch.zeros((), dtype=torch.int64)
        return [torch.stack(parts).sum() if parts else zero for parts in (hits, lookups)]

    # ------------------------------------------------------------------------------------------- a re-plan

    @torch.no_grad()
    def _replan(self, steps: int) -> None:
        """Every rank proposes for its own rows; all together decide whether it is worth it; each moves its own."""
        config, now = self.config, steps // self.config.replan_every
        refusals = torch.tensor(float(not self._stall.can_decide()), dtype=torch.float64, device=self._group_device)
        if float(self._total(refusals)) > 0.0:
            if self.replans:  # the first look is free
                self.replans[-1] = replace(self.replans[-1], left_out=self.replans[-1].left_out + 1)
            return  # some rank has not saved up for it: the next look will be at a longer window
        self._wait()  # for the training that is still under way: it is no cost of re-planning
        began = time.perf_counter()
        active = [one for one in self._replanners if one is not None]
        for replanner in active:
            replanner.observe(self._counted(self._planned_at, steps))
        found = [replanner.compare(now) for replanner in active]
        asked, promised = sum(moving for moving, _ in found), sum(gain for _, gain in found)
        share = min(1.0, self._stall.affordable_bytes() / asked) if asked else 1.0
        proposals = [replanner.propose(share) for replanner in active]
        lookups = sum(int(one.lookups.sum()) for one in self.filters)
        sums = torch.zeros(3, dtype=torch.float64, device=self._group_device)
        sums[0] = promised
        sums[1] = (lookups - self._looked_up) / (steps - self._planned_at)
        sums[2] = sum(proposal.bytes for proposal in proposals)
        gained, looked_up, moving = self._total(sums).tolist()  # the gain of all that should move, now or later
        self._looked_up, self._planned_at = lookups, steps
        gain = gained / max(looked_up, 1.0)
        decided = time.perf_counter()
        self._stall.decided(decided - began)
        moved = Moved()
        worth_it = moving > 0 and gain >= config.min_gain
        if worth_it:
            for replanner, proposal in zip(active, proposals, strict=True):
                moved += migrate(replanner.overlay, proposal.wanted, self._chunk_bytes)
                replanner.remember(now)
            self._wait()
            self._stall.moved(moved.bytes, time.perf_counter() - decided)
        seconds = time.perf_counter() - began
        self.replans.append(Replan(steps, gain, worth_it, moved.demoted, moved.promoted, moved.bytes, seconds))

    def _wait(self) -> None:
        """Wait for the device: so that the clock tells what moving cost, and other streams see what was moved."""
        for device in {one.device for one in self.filters if one.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    # ------------------------------------------------------------------------------------------- what it comes to

    def tables(self) -> dict[str, TableHits]:
        """This rank's part of the report, by table."""
        tables: dict[str, TableHits] = {}
        for one, overlay, whole in zip(self.filters, self.overlays, self._whole, strict=True):
            lookups = one.lookups.tolist()
            hits = overlay.hits.tolist() if overlay is not None else [0] * len(lookups)
            rows = overlay.hot_rows_by_shard() if overlay is not None else {}
            for place, shard in enumerate(one.shards):
                features = [f for f, table in enumerate(one.feature_table) if table == place]
                seen = sum(lookups[f] for f in features)
                is_whole = whole[place]
                hot = shard.rows if is_whole else rows[place].numel() if rows else 0
                planned = self.placement.tables.get(shard.fqn) if self.placement is not None else None
                mine = TableHits(
                    rows=shard.rows,
                    hot_rows=hot,
                    hot_bytes=hot * (one.element_size * shard.dim + one.optimizer_bytes(shard.dim)),
                    lookups=seen,
                    hits=seen if is_whole else sum(hits[f] for f in features),
                    predicted=planned.hit_rate if planned is not None else None,
                )
                name = shard.fqn
                tables[name] = tables[name] + mine if name in tables else mine
        return tables

    def points(self) -> list[HitPoint]:
        """This rank's look-ups and hits over time."""
        return [HitPoint(step, int(lookups), int(hits)) for step, (hits, lookups) in self._points]

    @property
    def slots(self) -> int:
        """How many rows of this rank can be hot."""
        return sum(pool.slots for overlay in self.overlays if overlay is not None for pool in overlay.pools)

    @property
    def hbm_bytes(self) -> int:
        """Bytes of fast memory that this rank's overlays take."""
        return sum(overlay.hbm_bytes for overlay in self.overlays if overlay is not None)

    # ------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> dict[str, Any]:
        """Which rows are hot, and what the next re-plans depend on; tensors only of this rank's shards."""
        return saved_rows.of(self.filters, self.overlays, self._replanners) | {
            "config": asdict(self.config),
            "replans": [asdict(one) for one in self.replans],
            "points": [asdict(point) for point in self.points()],
            "looked_up": self._looked_up,
            "planned_at": self._planned_at,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise StateError unless :meth:`load_state_dict` can restore ``state``."""
        saved_rows.check_config(state, self.config)
        saved_rows.check(state, self.filters, self.overlays, self._replanners)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`check` has passed. The model is loaded already."""
        saved_rows.load(state, self.filters, self.overlays, self._replanners, self._chunk_bytes)
        self.replans = [Replan(**one) for one in state["replans"]]
        self._points = [(point["step"], [point["hits"], point["lookups"]]) for point in state["points"]]
        self._looked_up, self._planned_at = state["looked_up"], state["planned_at"]
        self._wait()
        self._stall.restart()


def _whole_shards(found: FoundTbe, planned: Sequence[ShardPlacement | None] | None) -> list[bool]:
    """Which shards are in fast memory whole, or are planned so (on a CPU, which has none)."""
    return [
        (shard.rows > 0 and not can_hold(found, place)) or (planned is not None and _is_whole(planned[place]))
        for place, shard in enumerate(found.shards)
    ]


def _is_whole(planned: ShardPlacement | None) -> bool:
    return planned is not None and planned.whole
