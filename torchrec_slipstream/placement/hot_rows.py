"""The hot rows of one rank's tables while they train: their overlays, how often they are hit, and when they change."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.access.counters import is_counted
from torchrec_slipstream.config import PlacementConfig
from torchrec_slipstream.errors import AttachError, StateError
from torchrec_slipstream.placement.migration import Moved, migrate
from torchrec_slipstream.placement.placement import Placement
from torchrec_slipstream.placement.replanning import Replanner
from torchrec_slipstream.placement.slots import (
    first_rows,
    fqn_of,
    placed_shards,
    slots_of_budget,
    slots_of_placement,
)
from torchrec_slipstream.report.placement import HitPoint, Replan, TableHits
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.checkpoint import ReleaseBeforeAccess
from torchrec_slipstream.tbe.overlay import Overlay, can_hold

# A first move is made to learn what moving costs: of so many chunks.
_PROBE_CHUNKS = 4
# Weight of the past in the measured cost of a byte.
_COST_DECAY = 0.5


class HotRows:
    """The hot rows of one rank.

    Args:
        filters: one a TBE of this rank, not attached yet.
        config: the knobs.
        placement: which rows are hot at first; None: none, in overlays of ``config.hbm_budget``.
        rank: of this process in the placement.
        scale: steps that a counted one stands for (``AccessConfig.scale``).
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
        scale: int,
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
        self.replans: list[Replan] = []
        self._scale = scale
        self._total = total
        self._group_device = group_device
        self._guards: list[ReleaseBeforeAccess] = []
        self._whole: set[tuple[int, int]] = set()
        found = [one.found for one in self.filters]
        self._first: list[dict[int, Tensor]] = [{} for _ in found]
        slots: list[Counter[int]] = [Counter() for _ in found]
        if config.hbm_budget is not None:
            slots = slots_of_budget(found, int(config.hbm_budget))
        if placement is not None:
            planned = placed_shards(found, placement, rank)
            slots = [slots_of_placement(one, plan) for one, plan in zip(found, planned, strict=True)]
            self._first = [first_rows(one, plan) for one, plan in zip(found, planned, strict=True)]
            self._whole = {
                (i, place)
                for i, plan in enumerate(planned)
                for place, shard in enumerate(plan)
                if shard is not None and shard.whole
            }
        self._whole |= {
            (i, place)
            for i, one in enumerate(found)
            for place, s in enumerate(one.shards)
            if s.rows and not can_hold(one, place)
        }
        self.overlays = [
            Overlay(one, dims, [(i, place) not in self._whole for place in range(len(one.shards))])
            if sum(dims.values())
            else None
            for i, (one, dims) in enumerate(zip(found, slots, strict=True))
        ]
        self._replanners = [
            Replanner(overlay, one, config) if overlay is not None and config.replan_every else None
            for one, overlay in zip(self.filters, self.overlays, strict=True)
        ]
        self._looked_up = 0
        self._points: list[tuple[int, list[Tensor]]] = []
        self._second_a_byte: float | None = None
        self._planned_at = time.perf_counter()

    def attach(self) -> None:
        """Fill the overlays with their first rows. Call before the filters are attached."""
        for one, overlay, rows in zip(self.filters, self.overlays, self._first, strict=True):
            if overlay is not None:
                migrate(overlay, rows, self._chunk_bytes)
                one.overlay = overlay
                self._guards.append(ReleaseBeforeAccess(one.found, overlay))
        for replanner in self._replanners:
            if replanner is not None:
                replanner.remember(0)
        self._first = []
        self._planned_at = time.perf_counter()

    def detach(self) -> None:
        """Give all rows back to their tables, and leave the model's modules as they were. The filters detach first."""
        for guard in self._guards:
            guard.remove()
        self._guards = []

    @property
    def _chunk_bytes(self) -> int:
        return int(self.config.chunk_bytes)

    # ------------------------------------------------------------------------------------------- a step

    def step(self, steps: int) -> None:
        """Call after every training step, ``steps`` of which are over now."""
        if steps % self.config.record_every == 0:
            # Clones only: nothing waits for the device until somebody asks for a report.
            self._points.append((steps, self._totals()))
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
        for i, one in enumerate(self.filters):
            whole = torch.tensor([(i, table) in self._whole for table in one.feature_table])
            hits.append(one.lookups[whole.to(one.device)].sum() if bool(whole.any()) else one.lookups.new_zeros(()))
            if (overlay := self.overlays[i]) is not None:
                hits[-1] = hits[-1] + overlay.hits.sum()
            lookups.append(one.lookups.sum())
        zero = torch.zeros((), dtype=torch.int64)
        return [torch.stack(parts).sum() if parts else zero for parts in (hits, lookups)]

    # ------------------------------------------------------------------------------------------- a re-plan

    @torch.no_grad()
    def _replan(self, steps: int) -> None:
        """Every rank proposes for its own rows; all together decide whether it is worth it; each moves its own."""
        config, now = self.config, steps // self.config.replan_every
        window = range(steps - config.replan_every, steps)
        counted = sum(is_counted(step, self._scale) for step in window)
        active = [one for one in self._replanners if one is not None]
        for replanner in active:
            replanner.observe(counted)
        most = self._affordable_bytes()
        proposals = []
        for replanner in active:
            proposals.append(replanner.propose(now, most))
            most -= proposals[-1].bytes
        lookups = sum(int(one.lookups.sum()) for one in self.filters)
        sums = torch.zeros(3, dtype=torch.float64, device=self._group_device)
        sums[0] = sum(proposal.gain for proposal in proposals)
        sums[1] = (lookups - self._looked_up) / config.replan_every
        sums[2] = sum(proposal.bytes for proposal in proposals)
        gained, looked_up, moving = self._total(sums).tolist()
        self._looked_up = lookups
        gain = gained / max(looked_up, 1.0)
        moved, seconds = Moved(), 0.0
        worth_it = moving > 0 and gain >= config.min_gain
        if worth_it:
            began = time.perf_counter()
            for replanner, proposal in zip(active, proposals, strict=True):
                moved += migrate(replanner.overlay, proposal.wanted, self._chunk_bytes)
                replanner.remember(now)
            self._wait()
            seconds = time.perf_counter() - began
            self._learn_cost(moved.bytes, seconds)
        self.replans.append(Replan(steps, gain, worth_it, moved.demoted, moved.promoted, moved.bytes, seconds))
        self._planned_at = time.perf_counter()

    def _affordable_bytes(self) -> float:
        """Bytes that may move now for the stall to stay within its share of the time since the last re-plan."""
        if self.config.max_stall_share is None:
            return float("inf")
        if self._second_a_byte is None:
            return float(_PROBE_CHUNKS * self._chunk_bytes)
        return self.config.max_stall_share * (time.perf_counter() - self._planned_at) / self._second_a_byte

    def _learn_cost(self, moved_bytes: int, seconds: float) -> None:
        if moved_bytes:
            cost, past = seconds / moved_bytes, self._second_a_byte
            self._second_a_byte = cost if past is None else _COST_DECAY * past + (1.0 - _COST_DECAY) * cost

    def _wait(self) -> None:
        """Wait for the device, so that the clock tells what moving cost."""
        for device in {one.device for one in self.filters if one.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    # ------------------------------------------------------------------------------------------- what it comes to

    def tables(self) -> dict[str, TableHits]:
        """This rank's part of the report, by table."""
        tables: dict[str, TableHits] = {}
        for i, (one, overlay) in enumerate(zip(self.filters, self.overlays, strict=True)):
            lookups = one.lookups.tolist()
            hits = overlay.hits.tolist() if overlay is not None else [0] * len(lookups)
            for place, shard in enumerate(one.shards):
                features = [f for f, table in enumerate(one.feature_table) if table == place]
                seen = sum(lookups[f] for f in features)
                is_whole = (i, place) in self._whole
                hot = overlay.hot_rows(place).numel() if overlay is not None else 0
                hot = shard.rows if is_whole else hot
                planned = self.placement.tables.get(fqn_of(shard)) if self.placement is not None else None
                mine = TableHits(
                    rows=shard.rows,
                    hot_rows=hot,
                    hot_bytes=hot * (one.element_size * shard.dim + one.optimizer_bytes(shard.dim)),
                    lookups=seen,
                    hits=seen if is_whole else sum(hits[f] for f in features),
                    predicted=planned.hit_rate if planned is not None else None,
                )
                name = fqn_of(shard)
                tables[name] = tables[name] + mine if name in tables else mine
        return tables

    def points(self) -> list[HitPoint]:
        """This rank's look-ups and hits over time."""
        return [HitPoint(step, int(lookups), int(hits)) for step, (hits, lookups) in self._points]

    @property
    def hbm_bytes(self) -> int:
        """Bytes of fast memory that this rank's overlays take."""
        return sum(overlay.hbm_bytes for overlay in self.overlays if overlay is not None)

    # ------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> dict[str, Any]:
        """Which rows are hot, and what the next re-plans depend on; tensors only of this rank's shards."""
        shards = {}
        for one, overlay in zip(self.filters, self.overlays, strict=True):
            for place, shard in enumerate(one.shards):
                features = [table == place for table in one.feature_table]
                if overlay is not None:
                    shards[shard.key] = {"hot": overlay.hot_rows(place), "hits": overlay.hits[features]}
        return {
            "config": asdict(self.config),
            "shards": shards,
            "replanners": [None if one is None else one.state_dict() for one in self._replanners],
            "replans": [asdict(one) for one in self.replans],
            "points": [asdict(point) for point in self.points()],
            "looked_up": self._looked_up,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise StateError unless :meth:`load_state_dict` can restore ``state``."""
        if differing := [n for n, value in asdict(self.config).items() if state.get("config", {}).get(n) != value]:
            raise StateError(
                f"the saved state was made with another configuration: {differing} differ. Use the same "
                "PlacementConfig to resume, or start without the session's state."
            )
        for one, overlay in zip(self.filters, self.overlays, strict=True):
            if overlay is None:
                continue
            for pool in overlay.pools:
                hot = 0
                for place in pool.shards:
                    shard = one.shards[place]
                    rows = state.get("shards", {}).get(shard.key, {}).get("hot")
                    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
                        raise StateError(f"shard {shard.key}: the saved state does not say which rows are hot")
                    if rows.numel() and (
                        int(rows[0]) < 0 or int(rows[-1]) >= shard.rows or not bool((rows.diff() > 0).all())
                    ):
                        raise StateError(
                            f"shard {shard.key}: the saved hot rows are not ascending rows of {shard.rows}"
                        )
                    hot += rows.numel()
                if hot > pool.slots:
                    tables = ", ".join(sorted({one.shards[place].table for place in pool.shards}))
                    raise StateError(
                        f"table(s) {tables}: the saved state has {hot} hot rows, this session's overlay {pool.slots} "
                        "slots; resume with the placement or the budget that it was saved with"
                    )
        saved = state.get("replanners")
        if not isinstance(saved, list) or len(saved) != len(self._replanners):
            raise StateError("the saved state of the re-plans does not belong to this model")
        for replanner, part in zip(self._replanners, saved, strict=True):
            if replanner is not None:
                try:
                    replanner.check(part)
                except ValueError as error:
                    raise StateError(
                        f"the saved state of the re-plans does not belong to this model: {error}"
                    ) from error

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`check` has passed. The model is loaded already."""
        for one, overlay in zip(self.filters, self.overlays, strict=True):
            if overlay is None:
                continue
            wanted = {}
            for place, shard in enumerate(one.shards):
                saved = state["shards"][shard.key]
                if overlay.space.own[place]:
                    wanted[place] = saved["hot"].to(one.device)
                overlay.hits[[table == place for table in one.feature_table]] = saved["hits"].to(one.device)
            migrate(overlay, wanted, self._chunk_bytes)
        for replanner, part in zip(self._replanners, state["replanners"], strict=True):
            if replanner is not None:
                replanner.load_state_dict(part)
        self.replans = [Replan(**one) for one in state["replans"]]
        self._points = [(p["step"], [torch.tensor(p["hits"]), torch.tensor(p["lookups"])]) for p in state["points"]]
        self._looked_up = state["looked_up"]
