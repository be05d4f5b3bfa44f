"""The tracker over real TBEs: which rows become stale, how many look-ups that leaves out, that nothing is frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn

from tests.tables import TBE, Lookups, make_tbe, table_states
from torchrec_slipstream import AccessConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.staleness.signals import Movement
from torchrec_slipstream.staleness.tracker import StalenessTracker
from torchrec_slipstream.tbe import UpdateFilter, find_tbes

ROWS = (400, 60)


def lookups_of(step: int, bags: int = 60) -> Lookups:
    """Skewed look-ups: row r about as often as 1 / (r + 1)."""
    generator = torch.Generator().manual_seed(step)
    parts = [(rows ** torch.rand(bags, generator=generator)).long().clamp(max=rows) - 1 for rows in ROWS]
    return Lookups(torch.cat(parts), torch.arange(2 * bags + 1))


def train(tbe: TBE, session: Slipstream | None, steps: range) -> None:
    """Pull every row's output to a target of its own with noise, so that rows settle as they are trained."""
    for step in steps:
        lookups = lookups_of(step)
        output = lookups.run(tbe)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        (output - 1.0 + 0.1 * noise).square().mean().backward()
        if session is not None:
            session.step()


def config(**changes: object) -> SlipstreamConfig:
    """``changes`` are those of the staleness configuration, but for the access counters' ``every``."""
    access = AccessConfig(every=int(str(changes.pop("every", 1))))
    base = StalenessConfig(where="everywhere", interval=10, warmup_steps=40, max_table_share=1.0)
    return SlipstreamConfig(staleness=replace(base, **changes), access=access)  # type: ignore[arg-type]


def tracker_of(session: Slipstream) -> StalenessTracker:
    return session._tracker


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_share": 0.3},
        {"target_share": 0.8},
        {"every": 3},
        {"tail_share": 0.8},
        {"selection": "duty"},
        {"selection": "duty", "normalise_tables": True},
        {"selection": "duty", "signal": "movement"},
        {"selection": "duty", "signal": "drift", "snapshot_dtype": "float16"},
        {"selection": "threshold"},
        {"selection": "threshold", "signal": "movement", "search": "bisection"},
    ],
)
def test_leaves_out_the_target_share(changes: dict[str, object]) -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config(**changes))
    train(tbe, session, range(400))
    report = session.report()
    target = changes.get("target_share", 0.5)
    assert report.measured_share == pytest.approx(target, abs=0.04)
    counted = report.total
    assert counted.skipped == pytest.approx(target * counted.lookups * 0.9, rel=0.1)  # 40 of 400 steps are warm-up
    assert counted.lookups == 400 * 120


def test_warmup_is_stock_bit_for_bit_and_skipping_begins_after_it() -> None:
    stock, ours = make_tbe(ROWS, (8, 8)), make_tbe(ROWS, (8, 8))
    session = Slipstream(ours, config())
    train(stock, None, range(40))
    train(ours, session, range(40))
    for want, got in zip(table_states(stock), table_states(ours), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert session.report().total.skipped == 0
    train(ours, session, range(40, 48))
    assert session.report().total.skipped > 0


@pytest.mark.parametrize("changes", [{"selection": "duty"}, {"selection": "threshold", "signal": "movement"}])
def test_rows_are_stale_only_when_trained_and_never_for_ever(changes: dict[str, object]) -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config(min_touches=20, **changes))
    one = tracker_of(session).filters[0]
    live_count = torch.zeros(one.patterns.numel())
    ever_stale = torch.zeros(one.patterns.numel(), dtype=torch.bool)
    for step in range(600):
        untrained = one.touches < 20
        train(tbe, session, range(step, step + 1))
        stale = one.patterns != 255
        assert not bool((stale & untrained & (one.touches < 20)).any())
        ever_stale |= stale
        if step >= 100:
            live_count += (one.patterns.long() >> one.phase) & 1
    assert ever_stale.sum() > 20
    # Every row that was ever stale was live in some of the later steps, and no table is all stale.
    assert bool((live_count[ever_stale] > 0).all())
    assert bool((live_count[ever_stale] < 500).any())


def test_untouched_rows_never_count_as_stale() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config(target_share=0.95, signal="movement", selection="threshold"))
    train(tbe, session, range(100))
    one = tracker_of(session).filters[0]
    assert bool((one.patterns[one.touches == 0] == 255).all())
    assert bool((one.touches == 0).any())


def test_settled_rows_are_chosen_before_moving_ones() -> None:
    """Rows 0-9 have a gradient that dies, rows 10-19 one that does not; both are looked up alike."""
    for signal in ("gain", "movement"):
        tbe = make_tbe((20,), (4,))
        session = Slipstream(
            tbe, config(selection="duty", signal=signal, target_share=0.3, interval=20, warmup_steps=100)
        )
        for step in range(200):
            output = Lookups(torch.arange(20), torch.arange(21)).run(tbe)
            gradient = torch.ones_like(output)
            gradient[:10] *= 0.9**step
            output.backward(gradient)
            session.step()
        duty = tracker_of(session)._tbes[0].pool.duty
        assert float(duty[:10].mean()) < 0.5
        assert float(duty[10:].mean()) > 0.9


def test_table_cap_and_excluded_table() -> None:
    tbe = make_tbe(ROWS, (8, 8), table_names=["big", "small"])
    session = Slipstream(tbe, config(target_share=0.9, max_table_share=0.6, min_touches=1))
    train(tbe, session, range(300))
    for table in session.report().tables.values():
        assert table.skipped_share <= 0.62
    session.detach()
    session = Slipstream(tbe, config(exclude_tables=("small",)))
    train(tbe, session, range(300))
    tables = session.report().tables
    assert tables["small"].skipped == 0
    assert tables["big"].skipped > 0


def test_tail_share_leaves_the_most_popular_rows_live() -> None:
    """At the same share of look-ups, more rows go unwritten in a step."""

    def rows_left_out(tail_share: float) -> tuple[int, float, Tensor]:
        tbe = make_tbe(ROWS, (8, 8))
        session = Slipstream(tbe, config(tail_share=tail_share, target_share=0.4))
        train(tbe, session, range(300))
        one = tracker_of(session).filters[0]
        unwritten = 0
        for step in range(300, 320):
            before = [state[0] for state in table_states(tbe)]
            looked_up = torch.cat([lookups_of(step).indices[:60], 400 + lookups_of(step).indices[60:]]).unique()
            train(tbe, session, range(step, step + 1))
            after = [state[0] for state in table_states(tbe)]
            moved = torch.cat([(a != b).any(dim=1) for a, b in zip(after, before, strict=True)])
            unwritten += int((~moved[looked_up]).sum())
        return unwritten, session.report().measured_share, one.patterns

    alike, share_alike, _ = rows_left_out(0.0)
    tail, share_tail, patterns = rows_left_out(0.8)
    assert share_tail == pytest.approx(share_alike, abs=0.03)
    assert tail > 1.1 * alike
    assert patterns[0] == 255, "row 0 is the most popular"


def test_memory_budget_keeps_the_most_touched_rows() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    row_bytes = 34 + 8 * 4
    session = Slipstream(tbe, config(selection="duty", signal="movement", memory_bytes=row_bytes * 30, min_touches=1))
    train(tbe, session, range(100))
    pool = tracker_of(session)._tbes[0].pool
    touches = tracker_of(session).filters[0].touches
    assert pool.rows.numel() == 30
    others = torch.ones(touches.numel(), dtype=torch.bool)
    others[pool.rows] = False
    assert int(touches[pool.rows].min()) >= int(touches[others].max()) - 5  # touched since the last decision
    held = sum(v.numel() * v.element_size() for v in vars(pool).values() if isinstance(v, Tensor))
    held += sum(s.numel() * s.element_size() for s in pool.snapshots)
    assert held <= row_bytes * 30


def test_refreeze_rate_is_measured_under_threshold() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config(selection="threshold", signal="movement", thaw_every=3))
    train(tbe, session, range(500))
    report = session.report()
    assert report.refreeze_rate is not None
    assert 0.2 < report.refreeze_rate <= 1.0
    assert "froze again" in str(report)


def test_counts_survive_the_limit_of_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_slipstream.access import counters

    def pools(limit: int) -> tuple[Tensor, Tensor, int]:
        tbe = make_tbe(ROWS, (8, 8))
        session = Slipstream(tbe, config())
        train(tbe, session, range(60))
        monkeypatch.setattr(counters, "TOUCHES_LIMIT", limit)
        train(tbe, session, range(60, 200))
        one = tracker_of(session)._tbes[0]
        return one.pool.updates, one.pool.rate, int(one.filter.touches.max())

    updates, rate, most = pools(counters.TOUCHES_LIMIT)
    # What a row enters the pool with is not made up for, so the limit must not be met before.
    wrapped_updates, wrapped_rate, wrapped_most = pools(100)
    assert torch.equal(updates, wrapped_updates)
    assert torch.equal(rate, wrapped_rate)
    assert wrapped_most < most


def test_sgd_falls_back_to_movement() -> None:
    tbe = make_tbe(ROWS, (8, 8), optimizer=EmbOptimType.EXACT_SGD)
    session = Slipstream(tbe, config(selection="duty"))
    train(tbe, session, range(200))
    assert session.report().measured_share == pytest.approx(0.5, abs=0.05)
    assert isinstance(tracker_of(session)._tbes[0].signal, Movement)


def test_several_collections_share_one_scale() -> None:
    """Two TBEs behind one session are decided as one: same share, spread by need."""
    model = nn.ModuleList([make_tbe(ROWS, (8, 8), seed=1), make_tbe(ROWS, (16, 16), seed=2)])
    filters = [UpdateFilter(one) for one in find_tbes(model)]
    tracker = StalenessTracker(filters, config(selection="duty").staleness, lambda values: values)
    for one in filters:
        one.counting = True
        one.attach()
    for step in range(200):
        for tbe in model:
            lookups_of(step).run(tbe).square().mean().backward()
        tracker.step()
    scales = []
    for one in tracker._tbes:
        free = (one.pool.duty < 1.0) & (one.pool.duty > 0.0)
        scales.append((one.pool.duty / one.pool.score)[free])
    torch.testing.assert_close(scales[0].median(), scales[1].median(), rtol=1e-3, atol=0)
