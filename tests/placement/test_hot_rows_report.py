"""What hot rows leave behind for reports and states: re-plans left out, a bounded number of points, predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.placement.test_hot_rows import (
    DIM,
    HOT,
    ROWS,
    attach,
    hot_rows,
    one_table,
    placement_of,
    train,
    zipf,
)
from torchrec_slipstream import Placement, Slipstream
from torchrec_slipstream.placement.placement import ShardPlacement, TablePlacement
from torchrec_slipstream.report import thinning
from torchrec_slipstream.report.page import page
from torchrec_slipstream.report.placement import PlacementReport
from torchrec_slipstream.report.record import RunRecord
from torchrec_slipstream.tbe import find_tbes


def test_replans_that_the_limit_leaves_out_are_counted() -> None:
    """The first look is made whatever it costs; to make good for it takes longer than this run."""
    tbe = one_table()
    session = attach(tbe, max_stall_share=1e-6)
    train(tbe, session, zipf(70))
    report = placement_of(session)
    assert [one.step for one in report.replans] == [10]
    assert report.left_out == 6
    assert "1 re-plans, 1 of them moved rows" in str(report)
    assert "; 6 left out by the limit max_stall_share" in str(report)
    assert report.to_dict()["left_out"] == 6
    assert PlacementReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "1, 1 (6)" in page([RunRecord(report=session.report())])
    fresh = attach(other := one_table(), max_stall_share=1e-6)
    fresh.load_state_dict(session.state_dict())
    assert placement_of(fresh).left_out == 6
    train(other, fresh, zipf(10))
    unlimited = attach(tbe := one_table())
    train(tbe, unlimited, zipf(30))
    assert placement_of(unlimited).left_out == 0
    assert "left out" not in str(placement_of(unlimited))


def test_points_of_a_long_run_are_thinned_and_the_report_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(**more: Any) -> tuple[PlacementReport, Slipstream]:
        session = attach(tbe := one_table(), record_every=1, **more)
        train(tbe, session, zipf(60))
        return placement_of(session), session

    whole, _ = report()
    assert len(whole.points) == 60
    monkeypatch.setattr(thinning, "MOST", 10)
    thinned, session = report()
    assert 5 <= len(thinned.points) <= 10
    assert (thinned.points[0], thinned.points[-1]) == (whole.points[0], whole.points[-1])
    assert set(thinned.points) < set(whole.points)
    assert thinned.tables == whole.tables
    rates = thinned.hit_rates()
    widths = np.diff([0, *(step for step, _ in rates)])
    assert sum(rate * 60 * width for (_, rate), width in zip(rates, widths, strict=True)) == pytest.approx(
        thinned.total.hits
    )
    assert len(session.state_dict()["placement"]["points"]) == len(thinned.points)
    assert session._hot.last_hit_rate() is not None


def test_without_hot_rows_no_history_of_them_is_kept() -> None:
    tbe = one_table()
    session = attach(tbe, hbm_budget=None, replan_every=0, record_every=1)
    train(tbe, session, zipf(30))
    assert [point["step"] for point in session.state_dict()["placement"]["points"]] == [29, 30]
    assert session._hot.last_hit_rate() == (30, 0.0), "for a writer"
    assert session.report().placement is None


def test_memory_is_that_of_the_overlays() -> None:
    """Tables that are in fast memory whole are none of it."""
    session = attach(one_table())
    assert "the overlays' fast memory for hot rows and slot words: " in str(placement_of(session))
    assert "overlays' fast memory (planned)" in page([RunRecord(report=session.report())]).replace("&#x27;", "'")


def planned(model: nn.Module) -> Placement:
    """The first rows of the only table hot, for a second in the embeddings, which is a GPU's."""
    (shard,) = find_tbes(model)[0].shards
    zero: dict[str, Any] = {"lookups": 0, "hbm_bytes": 0, "host_bytes": 0}
    one = ShardPlacement(
        table=shard.fqn, rank=0, row_offset=0, col_offset=0, rows=ROWS, columns=DIM, whole=False,
        hot_rows=np.arange(HOT), hot_lookups=0, placed_bytes=0, misses=0.0, **zero,
    )  # fmt: skip
    table = TablePlacement(
        fqn=shard.fqn, name=shard.table, kernel="fused_uvm", sharding_type="table_wise", load_factor=None, rows=ROWS,
        dim=DIM, hot_rows=HOT, hit_rate=0.5, **zero,
    )  # fmt: skip
    return Placement(
        tables={shard.fqn: table}, shards=(one,), hbm_budget=0, hbm_bytes=(0,), host_bytes=(0,), hbm_capacity=(0,),
        host_capacity=(0,), expected_ms=1000.0, backing="uvm",
    )  # fmt: skip


def test_no_time_is_predicted_where_fast_memory_is_only_simulated() -> None:
    model = nn.ModuleList([tbe := one_table()])
    plan = planned(model)
    session = Slipstream(model, attach(one_table(), hbm_budget=None, replan_every=0).config, placement=plan)
    assert hot_rows(session) == set(range(HOT))
    train(tbe, session, zipf(20))
    report = session.report()
    assert report.placement is not None
    assert report.placement.predicted_ms is None
    assert "embedding part" not in str(report) + page([RunRecord(report=report)])
    assert plan.expected_ms == 1000.0, "the plan stays as it was made"
    on_a_gpu = replace(report.placement, predicted_ms=2.5, predicted_hit_rate=0.5)
    assert "planned for its embedding part: 2.5 ms" in str(on_a_gpu)
    html = page([RunRecord(report=replace(report, placement=on_a_gpu))])
    assert "slowest device</td><td>2.5 ms" in html
    assert replace(on_a_gpu, predicted_ms=torch.nan) == replace(on_a_gpu, predicted_ms=None)
