"""What a session tells: its report, put together over the ranks, and scalars while it trains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from typing import Protocol, Self, TypeVar

from torch import nn

from torchrec_slipstream.config import SlipstreamConfig
from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.inputs.live import LiveInputs
from torchrec_slipstream.placement.hot_rows import HotRows
from torchrec_slipstream.placement.slots import planned_overlay_bytes
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.report.inputs import InputReport
from torchrec_slipstream.report.octaves import Octaves
from torchrec_slipstream.report.placement import HitPoint, PlacementReport, Replan
from torchrec_slipstream.report.report import Report, TableReport
from torchrec_slipstream.staleness.tracker import StalenessTracker
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.features import model_tables


def report_of(
    config: SlipstreamConfig,
    model: nn.Module,
    filters: Sequence[UpdateFilter],
    tracker: StalenessTracker,
    hot: HotRows,
    inputs: LiveInputs,
    ranks: Ranks,
    *,
    seconds: float,
    first_step: int,
) -> Report:
    """What happened so far, over all ranks: a collective call.

    Args:
        config: of the session.
        model: that it is attached to.
        filters, tracker, hot, inputs: its parts on this rank.
        ranks: who reports.
        seconds: since the session was attached, or its state was loaded.
        first_step: the step at which that was.
    """
    return Report(
        tables=_joined(ranks.gather(_tables(filters))),
        steps=tracker.steps,
        seconds=seconds,
        tracker_seconds=tracker.seconds,
        target_share=config.staleness.target_share,
        decisions=list(tracker.decisions),
        placement=_placement(hot, ranks, seconds, tracker.steps, first_step),
        config=json.loads(json.dumps(asdict(config))),  # tuples as lists: what a file gives back is the same
        spread=_spread(tracker, ranks),
        inputs=_inputs(inputs, model, ranks),
        payoffs=[replace(one, rank=rank) for rank, of in enumerate(ranks.gather(tracker.payoffs())) for one in of],
    )


class ScalarWriter(Protocol):
    """What of TensorBoard's ``SummaryWriter`` is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


def check_writer(writer: object) -> None:
    """Raises AttachError unless scalars can be given to it, or it is None."""
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise AttachError(
            f"writer must have add_scalar(tag, value, step), as TensorBoard's SummaryWriter has, and a "
            f"{type(writer).__name__} has not"
        )


def write_scalars(writer: ScalarWriter, filters: Sequence[UpdateFilter], hot: HotRows, steps: int) -> None:
    """This rank's, after ``steps`` steps."""
    lookups = sum(int(one.lookups.sum()) for one in filters)
    skipped = sum(int(one.skipped.sum()) for one in filters)
    writer.add_scalar("slipstream/skipped_share", skipped / max(1, lookups), steps)
    if (rate := hot.last_hit_rate()) is not None:
        writer.add_scalar("slipstream/hit_rate", rate[1], rate[0])
    moved = sum(one.demoted + one.promoted for one in hot.replans)
    writer.add_scalar("slipstream/moved_rows", moved, steps)
    writer.add_scalar("slipstream/stall_seconds", sum(one.seconds for one in hot.replans), steps)


class _Adds(Protocol):
    def __add__(self, other: Self) -> Self: ...


_Part = TypeVar("_Part", bound=_Adds)


def _joined(parts: Sequence[Mapping[str, _Part]]) -> dict[str, _Part]:
    """By name, the sum over the parts that have it."""
    found: dict[str, _Part] = {}
    for part in parts:
        for name, mine in part.items():
            found[name] = found[name] + mine if name in found else mine
    return dict(sorted(found.items()))


def _tables(filters: Sequence[UpdateFilter]) -> dict[str, TableReport]:
    """This rank's."""
    parts = []
    for one in filters:
        lookups, skipped = one.lookups.tolist(), one.skipped.tolist()
        stale = (one.patterns != 255).cpu()
        for place, shard in enumerate(one.shards):
            features = [feature for feature, table in enumerate(one.feature_table) if table == place]
            touched = int((one.touches[shard.slots] > 0).sum()) if shard.counted else 0
            if place in one.sketches:
                touched = len(one.sketches[place].items()[0])
            mine = TableReport(
                rows=shard.rows,
                stale_rows=int(stale[shard.slots].sum()),
                touched_rows=touched,
                lookups=sum(lookups[feature] for feature in features),
                skipped=sum(skipped[feature] for feature in features),
            )
            parts.append({shard.fqn: mine})
    return _joined(parts)


def _spread(tracker: StalenessTracker, ranks: Ranks) -> dict[str, Octaves]:
    return _joined([of_tbe for part in ranks.gather(tracker.spread()) for of_tbe in part])


def _placement(hot: HotRows, ranks: Ranks, seconds: float, steps: int, first_step: int) -> PlacementReport | None:
    parts = ranks.gather((hot.tables(), hot.points(), hot.replans, hot.hbm_bytes))
    if not any(held for *_, held in parts):
        return None
    planned = hot.placement
    return PlacementReport(
        tables=_joined([tables for tables, *_ in parts]),
        points=[reduce(HitPoint.__add__, same) for same in zip(*(points for _, points, *_ in parts), strict=True)],
        replans=[reduce(Replan.__add__, same) for same in zip(*(plans for _, _, plans, _ in parts), strict=True)],
        hbm_bytes=sum(held for *_, held in parts),
        predicted_bytes=planned_overlay_bytes(planned) if planned is not None else None,
        predicted_hit_rate=planned.hit_rate if planned is not None else None,
        predicted_ms=planned.expected_ms if planned is not None else None,
        step_ms=1e3 * seconds / max(1, steps - first_step),
        seconds=seconds,
        first_step=first_step,
    )


def _inputs(inputs: LiveInputs, model: nn.Module, ranks: Ranks) -> InputReport | None:
    try:
        tables = model_tables(model)
    except AttachError:  # of this model nobody can say which rows a feature looks up
        tables = ()
    mine = inputs.report(tables)
    return reduce(InputReport.__add__, ranks.gather(mine)) if mine is not None else None
