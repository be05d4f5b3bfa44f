"""Updates are left out only where that saves time: trials over real TBEs, timed by the real clock."""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.staleness.test_tracker import ROWS, config, train
from tests.tables import TBE, Lookups, make_tbe, table_states
from torchrec_slipstream import Report, Slipstream, StalenessConfig
from torchrec_slipstream.report.payoff import Payoff
from torchrec_slipstream.staleness import choosing, trial
from torchrec_slipstream.staleness.trial import TRIAL_STEPS

# With 120 look-ups a step, choosing takes several times what there is to save; with 40,000 in a table of 120 MB, a
# fraction.
WIDE = (60_000, 512)
_LOOKUPS = 40_000


def step_of(tbe: TBE, step: int, *, rows: int, bags: int, length: int) -> None:
    indices = torch.randint(0, rows, (bags * length,), generator=torch.Generator().manual_seed(step))
    output = Lookups(indices, torch.arange(0, bags * length + 1, length)).run(tbe)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(step)) / bags)


def wide_step(tbe: TBE, step: int) -> None:
    step_of(tbe, step, rows=WIDE[0], bags=_LOOKUPS // 20, length=20)


def faster(**changes: Any) -> Any:
    return config(where="faster", **changes)


@given(st.integers(0, 10**9))
def test_a_trials_steps_come_in_pairs_of_both_kinds(pair: int) -> None:
    assert trial.skips(2 * pair) != trial.skips(2 * pair + 1)


def test_a_trial_has_as_many_steps_of_each_kind_in_no_period() -> None:
    kinds = [trial.skips(step) for step in range(TRIAL_STEPS)]
    assert sum(kinds) == TRIAL_STEPS // 2
    for period in range(2, 9):
        for phase in range(period):
            assert len(set(kinds[phase::period])) == 2, "neither kind keeps step with anything"


def test_trials_become_rarer() -> None:
    assert [n for n in range(1, 70) if trial.begins_with(n)] == [1, 2, 4, 8, 16, 32, 64]


def test_small_batches_are_left_alone_after_a_trial_and_train_as_stock_then() -> None:
    stock, ours = make_tbe(ROWS, (8, 8)), make_tbe(ROWS, (8, 8), table_names=["big", "small"])
    session = Slipstream(ours, faster(interval=40))
    train(ours, session, range(40 + TRIAL_STEPS))
    report = session.report()
    (found,) = report.payoffs
    assert found.tables == ["big", "small"]
    assert (found.rank, found.step, found.pays) == (0, 40 + TRIAL_STEPS, False)
    assert 0.0 < found.stock_ms < found.skipping_ms
    assert 0.0 < report.total.skipped_share < 0.25, "half of the trial's steps left half of their look-ups out"
    assert report.total.stale_rows == 0, "their updates run"
    assert "leaving updates out was tried and saved no time, so all are made (target 50%)" in str(report)
    assert f"{found.skipping_ms:.2f} with some left out (step 72): left alone, all its updates run" in str(report)

    train(ours, session, range(72, 80 + TRIAL_STEPS))  # the next trial begins with the next interval, 80
    tried = session.report()
    assert [one.step for one in tried.payoffs] == [80 + TRIAL_STEPS]
    assert tried.total.skipped > report.total.skipped
    for before, after in zip(ours.split_embedding_weights(), stock.split_embedding_weights(), strict=True):
        after.copy_(before)
    for (before,), (after,) in zip(ours.split_optimizer_states(), stock.split_optimizer_states(), strict=True):
        after.copy_(before)
    train(ours, session, range(80 + TRIAL_STEPS, 159))  # the third interval begins none
    train(stock, None, range(80 + TRIAL_STEPS, 159))
    for want, got in zip(table_states(stock), table_states(ours), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert session.report().total.skipped == tried.total.skipped


@pytest.mark.parametrize("selection", ["sampling", "duty"])
def test_where_it_saves_time_it_goes_on(selection: str) -> None:
    tbe = make_tbe(WIDE[:1], WIDE[1:])
    session = Slipstream(tbe, faster(selection=selection, target_share=0.8, warmup_steps=10, min_touches=1))
    for step in range(20 + TRIAL_STEPS):
        wide_step(tbe, step)
        session.step()
    report = session.report()
    (found,) = report.payoffs
    assert found.pays, found
    assert found.skipping_ms < 0.95 * found.stock_ms
    assert report.total.stale_rows > 0.9 * WIDE[0]
    assert report.measured_share == pytest.approx(0.8, abs=0.05), "of the steps that leave out"
    before = report.total
    for step in range(20 + TRIAL_STEPS, 60):
        wide_step(tbe, step)
        session.step()
    after = session.report()
    skipped = after.total.skipped - before.skipped
    assert skipped == pytest.approx(0.8 * (after.total.lookups - before.lookups), rel=0.1)
    assert "since skipping began" in str(after)
    assert "of look-ups had their update left out where that saves time (target 80%)" in str(after)
    assert Report.from_dict(after.to_dict()) == after


def test_each_tbe_is_tried_by_itself() -> None:
    small, large = make_tbe((60,), (8,), table_names=["small"]), make_tbe(WIDE[:1], WIDE[1:], table_names=["large"])
    changes = {"target_share": 0.8, "warmup_steps": 10, "min_touches": 1}
    session = Slipstream(nn.ModuleList([small, large]), faster(**changes))

    def steps(begin: int, end: int) -> None:
        for step in range(begin, end):
            step_of(small, step, rows=60, bags=30, length=1)
            wide_step(large, step)
            session.step()

    steps(0, 20 + TRIAL_STEPS)
    by_table = {one.tables[0].split(".")[-1]: one for one in session.report().payoffs}
    assert {name: one.pays for name, one in by_table.items()} == {"small": False, "large": True}
    before = session.report().tables
    steps(20 + TRIAL_STEPS, 60)
    after = session.report().tables
    skipped = {name.split(".")[-1]: after[name].skipped - before[name].skipped for name in after}
    assert skipped["small"] == 0
    assert skipped["large"] > 0
    # The target is of the look-ups that can be left out, not of those left alone as well.
    assert session.report().measured_share == pytest.approx(0.8, abs=0.05)


def test_a_resumed_session_knows_what_was_found() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, faster(interval=40))
    train(tbe, session, range(40 + TRIAL_STEPS + 3))
    file = io.BytesIO()
    torch.save(session.state_dict(), file)
    file.seek(0)
    other = make_tbe(ROWS, (8, 8))
    resumed = Slipstream(other, faster(interval=40))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.report().payoffs == session.report().payoffs
    skipped = resumed.report().total.skipped
    train(other, resumed, range(75, 79))
    assert resumed.report().total.skipped == skipped


def test_all_tbes_have_one_sampling_also_those_left_alone() -> None:
    """For it is saved once."""
    small, large = make_tbe((60,), (8,)), make_tbe(WIDE[:1], WIDE[1:])
    session = Slipstream(nn.ModuleList([small, large]), faster(target_share=0.8, warmup_steps=10, min_touches=1))
    for step in range(61):
        step_of(small, step, rows=60, bags=30, length=1)
        wide_step(large, step)
        session.step()
    assert [one.any_stale for one in session._filters] == [False, True]
    assert session._filters[0].sampling == session._filters[1].sampling
    saved = session.state_dict()["staleness"]["sampling"]
    resumed = Slipstream(nn.ModuleList([make_tbe((60,), (8,)), make_tbe(WIDE[:1], WIDE[1:])]), session.config)
    resumed.load_state_dict(session.state_dict())
    assert [[one.sampling.scale, one.sampling.least] for one in resumed._filters if one.sampling] == [saved, saved]


def test_a_trial_that_resuming_cut_short_changes_nothing() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, faster(interval=40))
    train(tbe, session, range(40 + TRIAL_STEPS - 3))
    state = session.state_dict()
    assert state["staleness"]["trial_left"] == 3
    other = make_tbe(ROWS, (8, 8))
    resumed = Slipstream(other, faster(interval=40))
    resumed.load_state_dict(state)
    train(other, resumed, range(69, 74))
    report = resumed.report()
    assert report.payoffs == []
    assert report.total.stale_rows > 0, "until it is known, updates are left out"


def test_everywhere_nothing_is_timed() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config())
    train(tbe, session, range(100))
    assert session.report().payoffs == []
    assert session._filters[0].stopwatch is None
    assert session.report().total.skipped > 0


def test_payoffs_are_written_for_people() -> None:
    many = Payoff(["m.t_1", "m.t_2", "m.t_3"], 1234, 20.0, 12.5, pays=True, rank=1)
    assert str(many) == (
        "rank 1, 3 tables (m.t_1, ...): 20.00 ms a step with all updates, 12.50 with some left out (step 1,234): "
        "updates are left out"
    )
    assert str(Payoff(["m.t_1"], 9, 1.0, 2.0, pays=False)).startswith("rank 0, m.t_1: 1.00 ms")


# ------------------------------------------------------------------------------------------ decisions become rarer


def test_the_first_interval_after_a_trial_brings_a_decision() -> None:
    """Whatever was chosen together with those that lost must not last until the next regular one."""
    for interval, after in ((50, 1), (10, 4), (1, TRIAL_STEPS)):
        staleness = StalenessConfig(interval=interval)
        for begin in (16, 64, 1024):
            assert choosing.decides(staleness, begin)
            assert choosing.decides(staleness, begin + after)
        regular = choosing.gap(staleness, 1024)
        assert choosing.until_next(staleness, 1024) == after
        assert choosing.until_next(staleness, 1024 + after) == regular - after
        everywhere = StalenessConfig(interval=interval, where="everywhere")
        assert choosing.until_next(everywhere, 1024) == regular
        assert not choosing.decides(everywhere, 1024 + after)


@pytest.mark.parametrize("selection", ["sampling", "threshold"])
def test_decisions_of_sampling_become_rarer_and_the_share_stays(selection: str) -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config(selection=selection, interval=2, warmup_steps=40))
    train(tbe, session, range(400))
    report = session.report()
    intervals = [(one.step - report.decisions[0].step) // 2 + 1 for one in report.decisions]
    if selection == "threshold":  # whose rows thaw in turn
        assert intervals == list(range(1, len(intervals) + 1))
    else:
        assert intervals[:16] == list(range(1, 17))
        gaps = [later - earlier for earlier, later in pairwise(intervals)]
        assert gaps == sorted(gaps)
        assert gaps[-1] == 16
        for octave in (16, 32, 64):
            assert sum(octave <= n < 2 * octave for n in intervals) == 8
    assert report.measured_share == pytest.approx(0.5, abs=0.04)


def test_what_was_observed_late_is_still_by_interval() -> None:
    """A TBE that was left alone for a while takes in several intervals at once."""
    sessions = [Slipstream(make_tbe((20,), (4,)), config(interval=10**6, min_touches=1)) for _ in range(2)]
    often, late = (session._tracker._tbes[0] for session in sessions)
    for step in range(1, 13):
        for session in sessions:
            session._filters[0].counting = True
            rows = torch.arange(20).repeat(1 if step <= 4 else 3)
            Lookups(rows, torch.arange(len(rows) + 1)).run(session._filters[0].tbe).sum().backward()
        often.observe(step)
        if step in (4, 12):
            late.observe(step)
    past = 0.5**8  # rate_decay, and eight intervals since the rate changed
    for one in (often, late):
        assert one.table_rate.tolist() == pytest.approx([past * 20.0 + (1 - past) * 60.0])
        assert one.pool.rate.tolist() == pytest.approx([past * 1.0 + (1 - past) * 3.0] * 20)


@pytest.mark.parametrize("selection", ["duty", "threshold"])
def test_updates_of_a_trials_stock_steps_count(selection: str) -> None:
    """What a signal divides a row's movement by: the updates that ran since the decision before."""
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, faster(selection=selection, signal="movement", interval=40, warmup_steps=80))
    train(tbe, session, range(80))
    one = session._tracker._tbes[0]
    rows, before, duty = one.pool.rows.clone(), one.pool.updates.clone(), one.pool.duty.clone()
    touched = one.filter.touches.clone()
    train(tbe, session, range(80, 120))
    known = torch.isin(one.pool.rows, rows)
    touches = (one.filter.touches - touched)[rows].float()
    counted = (one.pool.updates[known] - before).double()
    # 16 of the 40 steps left updates out: the others ran stock, in the trial and, as it did not pay, after it.
    assert not session.report().payoffs[0].pays
    torch.testing.assert_close(counted, (touches * (1 - 16 / 40 * (1 - duty))).double(), rtol=1e-4, atol=1e-3)
    assert bool((duty < 0.5).any())


def test_what_a_loser_could_not_leave_out_is_no_debt_of_the_others() -> None:
    """Nearly all look-ups of one TBE are of a table that is excluded; it does not pay."""
    bound = make_tbe((1000, 50), (4, 4), table_names=["excluded", "small"])
    free = make_tbe(WIDE[:1], WIDE[1:], table_names=["free"])
    changes = {"warmup_steps": 10, "min_touches": 1, "exclude_tables": ("excluded",)}
    session = Slipstream(nn.ModuleList([bound, free]), faster(**changes))
    (of_bound, of_free) = session._filters
    offsets = torch.cat([torch.arange(0, 100_001, 1000), 100_000 + torch.arange(1, 101)])
    shares = []
    for step in range(160):
        before = int(of_free.skipped.sum())
        generator = torch.Generator().manual_seed(step)
        rows = [torch.randint(0, of, (count,), generator=generator) for of, count in ((1000, 100_000), (50, 100))]
        output = Lookups(torch.cat(rows), offsets).run(bound)
        output.backward(torch.randn(output.shape, generator=generator))
        wide_step(free, step)
        session.step()
        shares.append((int(of_free.skipped.sum()) - before) / _LOOKUPS)
    found = {one.tables[-1].split(".")[-1]: one.pays for one in session.report().payoffs}
    assert found == {"small": False, "free": True}
    assert 0 < int(of_bound.skipped.sum()) < 100 * 160
    assert int(of_free.skipped.sum()) == pytest.approx(0.5 * int(of_free.offered.sum()), rel=0.15)
    # Of both together half is asked for in trials, which the one that can makes up for after them.
    assert max(shares[10:42]) > 0.9
    assert sum(shares[60:80] + shares[140:160]) / 40 == pytest.approx(0.4, abs=0.15)
