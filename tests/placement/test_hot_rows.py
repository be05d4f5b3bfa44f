"""When rows become hot and cold while a bare TBE trains: by gain, cost, age, and the time that moving may take."""

from __future__ import annotations

import gc
import json
import math
import time
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tables import TBE, Lookups, make_lookups, make_tbe, table_states
from torchrec_slipstream import AccessConfig, PlacementConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.errors import ConfigError, StateError
from torchrec_slipstream.placement import stall as stall_module
from torchrec_slipstream.placement.hot_rows import HotRows
from torchrec_slipstream.placement.stall import StallLimit
from torchrec_slipstream.report.placement import PlacementReport

ROWS, DIM = 200, 8
ROW_BYTES = 4 * DIM + 4
HOT = 40
BUDGET = 4 * ROWS + HOT * ROW_BYTES


def attach(tbe: TBE, *, counter: str = "exact", **placement: Any) -> Slipstream:
    base: dict[str, Any] = {
        "hbm_budget": BUDGET, "replan_every": 10, "min_gain": 0.0, "move_cost": 0.0, "max_stall_share": None,
        "record_every": 10,
    }  # fmt: skip
    config = SlipstreamConfig(
        staleness=StalenessConfig(target_share=0.0),
        access=AccessConfig(counter=counter),
        placement=PlacementConfig(**{**base, **placement}),
    )
    return Slipstream(nn.ModuleList([tbe]), config)


def zipf(steps: int, *, rows: int = ROWS, size: int = 60, turn: int = 0, seed: int = 0) -> list[Tensor]:
    """Batches of one-look-up bags; row ``r``'s share falls with ``(r - turn) % rows``, as ``1 / (r + 1)``."""
    share = 1.0 / np.arange(1, rows + 1)
    generator = np.random.default_rng(seed)
    drawn = generator.choice(rows, (steps, size), p=share / share.sum())
    return list(torch.from_numpy((drawn + turn) % rows))


def train(tbe: TBE, session: Slipstream, batches: list[Tensor]) -> None:
    for rows in batches:
        Lookups(rows, torch.arange(len(rows) + 1)).run(tbe).square().sum().backward()
        session.step()


def placement_of(session: Slipstream) -> PlacementReport:
    placement = session.report().placement
    assert placement is not None
    return placement


def hot_rows(session: Slipstream) -> set[int]:
    (overlay,) = session._hot.overlays
    assert overlay is not None
    return set(overlay.hot_rows(0).tolist())


def one_table() -> TBE:
    return make_tbe((ROWS,), (DIM,))


# --------------------------------------------------------------------------------------- what is found and counted


@pytest.mark.parametrize("counter", ["exact", "sampled"])
def test_finds_the_top_rows_of_a_steady_stream(counter: str) -> None:
    tbe = one_table()
    session = attach(tbe, counter=counter)
    batches = zipf(320)
    train(tbe, session, batches)
    # The most popular rows beyond doubt: row 20 has half the traffic of row 9.
    assert set(range(10)) <= hot_rows(session)
    assert max(hot_rows(session)) < ROWS
    report = placement_of(session)
    assert report.total.hot_rows == HOT
    assert report.hbm_bytes == BUDGET
    share = 1.0 / np.arange(1, ROWS + 1)
    best = float(share[:HOT].sum() / share.sum())
    # Promised in look-ups of all steps, however many are counted.
    assert 0.4 < max(one.gain for one in report.replans) < 1.01
    late = [rate for step, rate in report.hit_rates() if step > 160]
    assert np.mean(late) == pytest.approx(best, abs=0.03)
    if counter == "exact":
        counts = np.bincount(torch.cat(batches).numpy(), minlength=ROWS)
        clearly = np.flatnonzero(counts > 1.5 * np.sort(counts)[-HOT])
        assert set(clearly.tolist()) <= hot_rows(session)


def test_follows_a_stream_that_turns() -> None:
    tbe = one_table()
    session = attach(tbe)
    train(tbe, session, zipf(60))
    train(tbe, session, zipf(60, turn=100, seed=1))
    assert set(range(100, 108)) <= hot_rows(session)
    assert not set(range(50, 80)) & hot_rows(session)


@pytest.mark.parametrize("record_every", [1, 7])
def test_hits_and_points_are_counted_exactly(record_every: int) -> None:
    """Against a count of every look-up by the words of that moment; look-ups in evaluation are none."""
    tbe = make_tbe((ROWS, 50), (DIM, 16), features=(0, 0, 1))
    session = attach(tbe, record_every=record_every, hbm_budget=4 * (ROWS + 50) + 3000)
    (overlay,) = session._hot.overlays
    assert overlay is not None
    seen, points = [[0, 0], [0, 0]], []
    for step in range(50):
        lookups = make_lookups((ROWS // 4, ROWS, 50), (9, 9, 9), seed=step)
        bounds = lookups.offsets[[0, 18, 27]].tolist()
        for table, (begin, end) in enumerate(pairwise(bounds)):
            rows = lookups.indices[begin:end]
            seen[table][0] += len(rows)
            seen[table][1] += int((overlay.slots_of(table, rows) >= 0).sum())
        lookups.run(tbe).square().sum().backward()
        with torch.no_grad():
            lookups.run(tbe)
        session.step()
        if (step + 1) % record_every == 0:
            points.append((step + 1, seen[0][0] + seen[1][0], seen[0][1] + seen[1][1]))
    report = placement_of(session)
    tables = list(report.tables.values())
    assert [[table.lookups, table.hits] for table in tables] == seen
    assert min(table.hits for table in tables) > 50
    assert [(point.step, point.lookups, point.hits) for point in report.points] == points
    rates = dict(report.hit_rates())
    (_, lookups_before, hits_before), (last, lookups_now, hits_now) = points[-2:]
    assert rates[last] == (hits_now - hits_before) / (lookups_now - lookups_before)


# --------------------------------------------------------------------------------------- the knobs


def test_least_gain() -> None:
    """What the first re-plan promises, a little more than which is not worth a move."""
    tbe = one_table()
    session = attach(tbe)
    train(tbe, session, zipf(10))
    (first,) = session._hot.replans
    assert first.moved
    assert 0.5 < first.gain <= 1.0
    for least, moves in ((first.gain * 0.999, True), (min(1.0, first.gain * 1.001), False)):
        tbe = one_table()
        session = attach(tbe, min_gain=least)
        train(tbe, session, zipf(10))
        assert session._hot.replans[0].moved is moves
        assert bool(hot_rows(session)) is moves
        assert session._hot.replans[0].gain == first.gain


def test_cost_of_a_move_and_hysteresis_keep_rows_of_like_traffic_where_they_are() -> None:
    moved, rates = {}, {}
    # All rows alike: what counts differ by is chance.
    batches = [torch.randint(0, ROWS, (60,), generator=torch.Generator().manual_seed(s)) for s in range(200)]
    for name, more in {
        "eager": {"hysteresis": 1.0},
        "hysteresis": {"hysteresis": 3.0},
        "cost": {"hysteresis": 1.0, "move_cost": 1000.0},
    }.items():
        tbe = one_table()
        session = attach(tbe, **more)
        train(tbe, session, batches)
        report = placement_of(session)
        moved[name], rates[name] = report.moved_rows, report.total.hit_rate
    assert moved["eager"] > 2 * moved["hysteresis"]
    assert moved["cost"] == 0  # a row would have to have 1000 look-ups in 16 re-plans
    assert moved["hysteresis"] >= HOT


def test_young_rows_stay() -> None:
    """A row that became hot in re-plan n may leave in n + min_age, and not before."""
    born: dict[int, int] = {}
    ages = []
    tbe = one_table()
    session = attach(tbe, min_age=3, hysteresis=1.0)
    for now in range(1, 16):
        before = hot_rows(session)
        train(tbe, session, zipf(10, turn=13 * now, seed=now))
        after = hot_rows(session)
        ages += [now - born[row] for row in before - after]
        born |= dict.fromkeys(after - before, now)
    assert len(ages) > 20
    assert min(ages) == 3


# --------------------------------------------------------------------------------------- the time it takes


def test_moving_stays_within_its_share_of_run_time() -> None:
    """The whole hot set changes at every re-plan, and every step waits a little, as a model's own work would."""
    share = 0.02
    rows = 20_000
    moved = {}
    for limit in (None, share):
        tbe = make_tbe((rows,), (64,))
        budget = 4 * rows + rows // 2 * (4 * 64 + 4)
        session = attach(tbe, hbm_budget=budget, replan_every=2, max_stall_share=limit, chunk_bytes=2000)
        generator = torch.Generator().manual_seed(0)
        for step in range(120):
            indices = torch.randint(0, rows // 2, (2000,), generator=generator) + (rows // 2) * (step // 2 % 2)
            train(tbe, session, [indices])
            time.sleep(0.005)
        report = placement_of(session)
        moved[limit] = report.moved_rows
        if limit is not None:
            # A move may take longer than what was learnt says: one's worth of slack.
            slack = max(one.seconds for one in report.replans)
            assert sum(one.seconds for one in report.replans) <= share * report.seconds + slack
    assert moved[None] > 3 * moved[share] > 0


class _Clock:
    """Time that only passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stall_module, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("for_itself", [0.0, 0.2, 5.0])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.5])
def test_limit_holds_and_uses_what_it_may(monkeypatch: pytest.MonkeyPatch, share: float, for_itself: float) -> None:
    """Moves that cost ``for_itself`` seconds and one a million bytes, asked for every ten seconds; noisy by 20%."""
    clock = _Clock(monkeypatch)
    limit = StallLimit(share, chunk_bytes=1000)
    assert limit.affordable_bytes() == 4000
    noise = np.random.default_rng(0)
    spent, moved, longest = 0.0, 0.0, 0.0
    for _ in range(20_000):
        clock.now += 10.0
        if (most := math.floor(min(limit.affordable_bytes(), 1e7))) > 0:
            seconds = (for_itself + most / 1e6) * noise.uniform(0.8, 1.2)
            limit.moved(most, seconds)
            clock.now += seconds
            spent, moved, longest = spent + seconds, moved + most, max(longest, seconds)
    assert spent <= share * clock.now + longest
    assert spent > 0.7 * min(share * clock.now, 20_000 * (for_itself + 10.0))
    # It does not waste its time on moves of a few rows.
    assert moved / 1e6 > 0.3 * spent


def test_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = StallLimit(None, chunk_bytes=1000)
    limit.moved(10, 1e9)
    assert limit.affordable_bytes() == math.inf


def test_what_is_left_for_later_is_shared_by_all_tables() -> None:
    """Where little may move, no table's rows have to wait for all of another's."""
    tbe = make_tbe((ROWS, ROWS), (DIM, 16))
    session = attach(tbe, hbm_budget=8 * ROWS + 4000, max_stall_share=0.5, chunk_bytes=200)
    batches = [torch.cat(pair) for pair in zip(zipf(10), zipf(10, seed=1), strict=True)]
    train(tbe, session, batches)
    (overlay,) = session._hot.overlays
    assert overlay is not None
    assert session._hot.replans[0].bytes <= 4 * 200
    assert all(overlay.hot_rows(place).numel() > 2 for place in (0, 1))
    # The best of each.
    assert 0 in overlay.hot_rows(0)
    assert 0 in overlay.hot_rows(1)


def test_report_before_any_step() -> None:
    session = attach(one_table())
    report = session.report()
    assert "-" in str(report.placement)
    assert "nan" not in str(report.placement)
    json.dumps(report.to_dict(), allow_nan=False)
    assert session._hot.last_hit_rate() is None


def test_budget_covers_slot_words_and_rows_and_is_used_up() -> None:
    for budget in (BUDGET, BUDGET + ROW_BYTES - 1, BUDGET - 1):
        session = attach(one_table(), hbm_budget=budget)
        assert session._hot.slots == (HOT - 1 if budget < BUDGET else HOT)
        assert session._hot.hbm_bytes <= budget


def test_detached_rows_are_home_and_their_memory_is_free() -> None:
    stock, ours = one_table(), one_table()
    session = attach(ours)
    for rows in zipf(30):
        Lookups(rows, torch.arange(len(rows) + 1)).run(stock).square().sum().backward()
    train(ours, session, zipf(30))
    assert len(hot_rows(session)) == HOT
    overlay = weakref.ref(session._hot.overlays[0])
    session.detach()
    assert placement_of(session).total.hot_rows == HOT  # a report may be asked for later
    gc.collect()
    gc.disable()
    try:
        del session
        assert overlay() is None
    finally:
        gc.enable()
    for mine, theirs in zip(table_states(ours)[0], table_states(stock)[0], strict=True):
        assert torch.equal(mine, theirs)


def test_state_keeps_ages_whatever_slots_rows_come_into() -> None:
    tbe = one_table()
    session = attach(tbe, min_age=100, hysteresis=1.0)
    train(tbe, session, zipf(10, size=3))
    train(tbe, session, zipf(10, turn=50, seed=1, size=3))
    state = session.state_dict()
    other = one_table()
    fresh = attach(other, min_age=100, hysteresis=1.0)
    train(other, fresh, zipf(20, turn=120, size=12))  # whose slots are taken, by other rows
    fresh.load_state_dict(state)
    ages = []
    for one in (session, fresh):
        hot: HotRows = one._hot
        (replanner,), (overlay,) = hot._replanners, hot.overlays
        assert replanner is not None
        assert overlay is not None
        since = replanner._pools[0].since
        rows = overlay.hot_rows(0)
        ages.append(dict(zip(rows.tolist(), since[overlay.slots_of(0, rows)].tolist(), strict=True)))
    assert ages[0] == ages[1]
    assert set(ages[0].values()) == {1, 2}
    assert session._hot.replans == fresh._hot.replans


@pytest.mark.parametrize("counter", ["sketch", "off"])
def test_replans_without_counts_are_refused(counter: str) -> None:
    with pytest.raises(ConfigError, match=rf"replan_every=10 .* counter='{counter}' .* use counter='sampled'"):
        attach(one_table(), counter=counter)
    with pytest.raises(ConfigError, match=r"hbm_budget=5000 without replan_every"):
        PlacementConfig(hbm_budget=5000)


def test_a_report_after_a_resume_is_of_the_time_since() -> None:
    tbe = one_table()
    session = attach(tbe)
    train(tbe, session, zipf(30))
    state = session.state_dict()
    kept = {name: one.clone() for name, one in next(iter(state["placement"]["replanners"].values()))[0].items()}
    train(tbe, session, zipf(30, seed=1))
    now = next(iter(state["placement"]["replanners"].values()))[0]
    assert all(torch.equal(now[name], one) for name, one in kept.items()), "what was saved stays as it was"
    fresh = attach(other := one_table())
    fresh.load_state_dict(state)
    train(other, fresh, zipf(10, seed=2))
    report = placement_of(fresh)
    assert report.first_step == 30
    assert len(report.replans) == 4
    assert report.stall_seconds == report.replans[-1].seconds
    assert 0.0 < report.stall_share < 1.0
    assert report.step_ms == pytest.approx(1e3 * report.seconds / 10)
    # Who forgets the budget, or the placement, when resuming hears of it.
    cold = SlipstreamConfig(
        access=fresh.config.access, staleness=fresh.config.staleness, placement=PlacementConfig(replan_every=10)
    )
    forgotten = state | {"placement": state["placement"] | {"config": {"hbm_budget": None, "replan_every": 10}}}
    with pytest.raises(StateError, match="the saved state has hot rows, this session no overlay"):
        Slipstream(nn.ModuleList([one_table()]), cold).load_state_dict(forgotten)
