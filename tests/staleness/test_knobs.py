"""What single knobs of the tracker do, in figures: touches, rates, and how a share that was missed is made good."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.staleness.test_tracker import ROWS, config, tracker_of, train
from tests.tables import TBE, Lookups, make_tbe
from torchrec_slipstream import AccessConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.access.counters import is_counted

EVERY = AccessConfig().every


def look_up(tbe: TBE, session: Slipstream, rows: list[int]) -> None:
    Lookups(torch.tensor(rows, dtype=torch.int64), torch.arange(len(rows) + 1)).run(tbe).square().sum().backward()
    session.step()


@pytest.mark.parametrize(("min_touches", "counted_lookups"), [(5, 1), (8, 1), (9, 2), (17, 3)])
def test_a_counted_lookup_stands_for_those_of_as_many_steps(min_touches: int, counted_lookups: int) -> None:
    """Row r is looked up in r of the counted steps, at the default of one in 8, row 0 in all the others."""
    steps = 10 * EVERY
    staleness = StalenessConfig(where="everywhere", min_touches=min_touches, interval=steps, warmup_steps=steps)
    tbe = make_tbe((20,), (4,))
    session = Slipstream(tbe, SlipstreamConfig(staleness=staleness))
    counted = 0
    for step in range(steps):
        if is_counted(step, EVERY):
            counted += 1
            look_up(tbe, session, list(range(counted, 11)))
        else:
            look_up(tbe, session, [0])
    assert counted == 10
    (one,) = session._filters
    expected = [row for row in range(1, 11) if row >= counted_lookups]
    assert (one.patterns[:20] != 255).nonzero().flatten().tolist() == expected
    assert session.report().total.stale_rows == len(expected)


def test_rates_remember_the_past_by_rate_decay() -> None:
    tbe = make_tbe((20,), (4,))
    session = Slipstream(tbe, config(warmup_steps=10, rate_decay=0.75))
    (one,) = tracker_of(session)._tbes

    def rates() -> Tensor:
        return torch.stack([one.pool.rate[one.pool.rows == row].sum() for row in (0, 1)]).double()

    expected = torch.tensor([20.0, 10.0], dtype=torch.float64)
    for lookups in ([0, 0, 1], [0, 1, 1, 1, 1], [1]):
        for _ in range(10):
            look_up(tbe, session, lookups)
        new = torch.tensor([10.0 * lookups.count(row) for row in (0, 1)], dtype=torch.float64)
        expected = 0.75 * expected + 0.25 * new
        torch.testing.assert_close(rates(), expected, rtol=1e-6, atol=0)
        assert float(one.table_rate.sum()) == pytest.approx(float(expected.sum()))


@pytest.mark.parametrize("selection", ["sampling", "duty"])
@pytest.mark.parametrize("owed", [240, -240])
def test_half_of_what_is_owed_is_made_good_in_the_next_interval(owed: int, selection: str) -> None:
    """As though so many look-ups of 1,200 an interval had been left out too few."""

    def expected_share(owed: int) -> float:
        tbe = make_tbe(ROWS, (8, 8))
        session = Slipstream(tbe, config(selection=selection, target_share=0.4))
        train(tbe, session, range(59))
        tracker_of(session).filters[0].skipped[0] -= owed
        train(tbe, session, range(59, 60))
        return session.report().decisions[-1].expected_share

    assert expected_share(owed) - expected_share(0) == pytest.approx(0.5 * owed / 1200, abs=0.01)
