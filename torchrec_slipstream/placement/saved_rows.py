"""What a session's state says of hot rows: saved, checked as a whole before anything changes, and loaded.

Of every shard which rows are hot and how often they were hit; of every overlay what its re-plans have learnt. Slots are
not saved: rows come into any slots again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.config import PlacementConfig
from torchrec_slipstream.errors import StateError
from torchrec_slipstream.placement.migration import migrate
from torchrec_slipstream.placement.replanning import Replanner
from torchrec_slipstream.report.placement import HitPoint, Replan
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.overlay import Overlay

Filters = Sequence[UpdateFilter]
Overlays = Sequence[Overlay | None]
Replanners = Sequence[Replanner | None]


def of(filters: Filters, overlays: Overlays, replanners: Replanners) -> dict[str, Any]:
    """The part of the state that is by shard and by overlay; keys are distinct over ranks."""
    shards, learnt = {}, {}
    for one, overlay, replanner in zip(filters, overlays, replanners, strict=True):
        if overlay is not None:
            for place, rows in overlay.hot_rows_by_shard().items():
                shards[one.shards[place].key] = {"hot": rows, "hits": overlay.hits[_features(one, place)]}
        if replanner is not None:
            learnt[one.shards[0].key] = replanner.state_dict()
    return {"shards": shards, "replanners": learnt}


def check_config(state: Mapping[str, Any], config: PlacementConfig) -> None:
    """Raise StateError if the state was made with other knobs, or is cut short."""
    saved = state.get("config", {})
    # What the state was shaped by; the other knobs may be turned between two runs.
    if differing := [name for name in ("hbm_budget", "replan_every") if saved.get(name) != getattr(config, name)]:
        raise StateError(
            f"the saved state was made with another configuration: {differing} differ. Use the same "
            "PlacementConfig to resume, or start without the session's state."
        )
    for name, kind in (("replans", Replan), ("points", HitPoint)):
        wanted = {field.name for field in fields(kind)}
        entries = state.get(name)
        if not isinstance(entries, list) or any(not isinstance(e, dict) or e.keys() != wanted for e in entries):
            raise StateError(f"the saved state of the hot rows is incomplete: {name} is not a list of {sorted(wanted)}")
    for name in ("looked_up", "planned_at"):
        if not isinstance(state.get(name), int):
            raise StateError(f"the saved state of the hot rows is incomplete: {name} is not a number")


def check(state: Mapping[str, Any], filters: Filters, overlays: Overlays, replanners: Replanners) -> None:
    """Raise StateError unless :func:`load` can restore the state."""
    saved, learnt = state.get("shards", {}), state.get("replanners", {})
    for one, overlay, replanner in zip(filters, overlays, replanners, strict=True):
        if overlay is None:
            lost = {shard.key: saved.get(shard.key, {}).get("hot") for shard in one.shards}
            if any(isinstance(rows, Tensor) and rows.numel() for rows in lost.values()):
                raise StateError(
                    f"shard(s) {', '.join(lost)}: the saved state has hot rows, this session no overlay; resume with "
                    "the placement or the budget that it was saved with"
                )
            continue
        hot = {place: _checked(saved, one, overlay, place) for place in range(len(one.shards))}
        for pool in overlay.pools:
            needed = sum(hot[place] for place in pool.shards)
            if needed > pool.slots:
                tables = ", ".join(sorted({one.shards[place].table for place in pool.shards}))
                raise StateError(
                    f"table(s) {tables}: the saved state has {needed} hot rows, this session's overlay {pool.slots} "
                    "slots; resume with the placement or the budget that it was saved with"
                )
        if replanner is not None:
            key = one.shards[0].key
            try:
                replanner.check(learnt.get(key), hot)
            except ValueError as error:
                raise StateError(
                    f"shard {key}: the saved state of its re-plans does not belong to this model: {error}"
                ) from error


def load(
    state: Mapping[str, Any], filters: Filters, overlays: Overlays, replanners: Replanners, chunk_bytes: int
) -> None:
    """Restore what :func:`check` has passed: move rows, ``chunk_bytes`` at a time, until the saved ones are hot."""
    for one, overlay, replanner in zip(filters, overlays, replanners, strict=True):
        if overlay is None:
            continue
        wanted = {}
        for place, shard in enumerate(one.shards):
            saved = state["shards"][shard.key]
            if overlay.space.own[place]:
                wanted[place] = saved["hot"].to(one.device)
            overlay.hits[_features(one, place)] = saved["hits"].to(one.device)
        migrate(overlay, wanted, chunk_bytes)
        if replanner is not None:
            replanner.load_state_dict(state["replanners"][one.shards[0].key])


def _checked(saved: Mapping[str, Any], one: UpdateFilter, overlay: Overlay, place: int) -> int:
    """How many hot rows the state has of a shard."""
    shard, own = one.shards[place], overlay.space.own[place]
    part = saved.get(shard.key, {})
    rows, hits = part.get("hot"), part.get("hits")
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
        raise StateError(f"shard {shard.key}: the saved state does not say which rows are hot")
    if rows.numel() and (
        not own or int(rows[0]) < 0 or int(rows[-1]) >= shard.rows or not bool((rows.diff() > 0).all())
    ):
        raise StateError(f"shard {shard.key}: the saved hot rows are not ascending rows of {shard.rows if own else 0}")
    features = sum(_features(one, place))
    if not isinstance(hits, Tensor) or hits.dtype != torch.int64 or list(hits.shape) != [features]:
        raise StateError(f"shard {shard.key}: the saved state does not say how often each of {features} features hit")
    return rows.numel()


def _features(one: UpdateFilter, place: int) -> list[bool]:
    return [table == place for table in one.feature_table]
