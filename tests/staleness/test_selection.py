"""The choice of rows: shares met, exactly where it says so, and the same on any split over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_slipstream.staleness import selection

scores = st.lists(
    st.tuples(st.one_of(st.floats(0, 1e6, width=32), st.just(float("nan"))), st.integers(1, 1000)),
    min_size=1,
    max_size=60,
)


def alone(values: Tensor) -> Tensor:
    return values


def split(pairs: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([p[0] for p in pairs]), torch.tensor([float(p[1]) for p in pairs])


@given(pairs=scores, share=st.floats(0, 0.99))
def test_quantile_threshold_is_exact(pairs: list[tuple[float, int]], share: float) -> None:
    """No more than the target lies below it, and one row more would be too much."""
    score, rate = split(pairs)
    target = torch.tensor(share * float(rate.sum()), dtype=torch.float64)
    threshold = selection.quantile_threshold(score, rate, target, alone)
    below = score < threshold
    assert float(rate[below].double().sum()) <= float(target)
    rest = score[score.isfinite() & ~below]
    if rest.numel():
        with_next = score <= rest.min()
        assert float(rate[with_next].double().sum()) > float(target)


@given(
    values=st.lists(st.integers(1, 10**6), min_size=60, max_size=120, unique=True),
    scale=st.sampled_from([2.0**-40, 1.0, 2.0**40]),
    share=st.floats(0.05, 0.95),
)
def test_bisection_lands_in_its_window(values: list[int], scale: float, share: float) -> None:
    """Rows of one look-up each and distinct scores: a threshold within two rows of any target exists, and is found."""
    score, rate = torch.tensor(values) * scale, torch.ones(len(values))
    target, window = (torch.tensor(x, dtype=torch.float64) for x in (share * len(values), 2.0))
    threshold = selection.bisect_threshold(score, rate, target, window, alone)
    assert abs(int((score < threshold).sum()) - float(target)) <= 2.0


def test_bisection_that_cannot_reach_its_window_gives_the_nearest_it_met() -> None:
    """The artefact stays at 0 in silence; here one row of 90 look-ups makes 10 or 100 the only choices."""
    score, rate = torch.tensor([0.1, 0.5]), torch.tensor([10.0, 90.0])
    target, window = (torch.tensor(x, dtype=torch.float64) for x in (30.0, 1.0))
    assert 0.1 < selection.bisect_threshold(score, rate, target, window, alone) <= 0.5
    nothing = selection.bisect_threshold(score[:0], rate[:0], target, window, alone)
    assert 0.0 <= nothing <= 1.0


@given(
    pairs=st.lists(st.tuples(st.floats(2.0**-20, 2.0**20, width=32), st.integers(1, 1000)), min_size=1, max_size=60),
    share=st.floats(0, 0.99),
    least=st.sampled_from([0.0, 0.05, 0.3]),
)
def test_duty_cycles_meet_the_share_in_proportion_to_the_score(
    pairs: list[tuple[float, int]], share: float, least: float
) -> None:
    score, rate = split(pairs)
    target = torch.tensor(share * float(rate.sum()), dtype=torch.float64)
    duty = selection.duty_cycles(score, rate, target, least, alone)
    assert float(duty.min()) >= least - 1e-6
    assert float(duty.max()) <= 1.0
    left_out = float((rate.double() * (1 - duty.double())).sum())
    possible = float(rate.double().sum()) * (1 - least)
    # Bins are 2% wide, so the rows that saturate inside their bin may miss by that.
    assert abs(left_out - min(float(target), possible)) <= 0.025 * float(rate.sum())
    free = (duty > least + 1e-6) & (duty < 1 - 1e-6)
    if free.any():
        scale = (duty / score)[free]
        torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-4, atol=0)


def test_unknown_scores_stay_live() -> None:
    score, rate = torch.tensor([float("nan"), 1.0]), torch.tensor([10.0, 10.0])
    duty = selection.duty_cycles(score, rate, torch.tensor(15.0, dtype=torch.float64), 0.0, alone)
    assert duty[0] == 1.0
    assert duty[1] < 0.01


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_agree_with_one(ranks: int) -> None:
    """Every rank sees only its rows and the sums; all come to what one rank with all rows decides."""
    import threading

    generator = torch.Generator().manual_seed(3)
    score = torch.rand(400, generator=generator).pow(4)
    rate = torch.randint(1, 50, (400,), generator=generator).float()
    target = torch.tensor(0.4 * float(rate.sum()), dtype=torch.float64)
    window = torch.tensor(0.01 * float(rate.sum()), dtype=torch.float64)
    barrier, lock, pot = threading.Barrier(ranks), threading.Lock(), {}

    def total(values: Tensor) -> Tensor:
        with lock:
            pot["sum"] = values.clone() if "sum" not in pot else pot["sum"] + values
        barrier.wait()
        result = pot["sum"].clone()
        barrier.wait()
        with lock:
            pot.pop("sum", None)
        barrier.wait()
        return result

    found: dict[int, tuple[Tensor, float, float]] = {}

    def rank(r: int) -> None:
        mine, of = score[r::ranks], rate[r::ranks]
        found[r] = (
            selection.duty_cycles(mine, of, target, 0.0, total),
            selection.quantile_threshold(mine, of, target, total),
            selection.bisect_threshold(mine, of, target, window, total),
        )

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    duty = selection.duty_cycles(score, rate, target, 0.0, alone)
    for r in range(ranks):
        torch.testing.assert_close(found[r][0], duty[r::ranks], rtol=1e-5, atol=1e-6)
        assert found[r][1] == selection.quantile_threshold(score, rate, target, alone)
        assert found[r][2] == selection.bisect_threshold(score, rate, target, window, alone)


def test_a_rank_without_rows_sums_in_the_same_type() -> None:
    """An all-reduce of float64 on one rank and int64 on another is an error, or garbage."""
    kinds = set()

    def total(values: Tensor) -> Tensor:
        kinds.add(values.dtype)
        return values

    target = torch.tensor(1.0, dtype=torch.float64)
    for rows in (0, 3):
        mine, of = torch.rand(rows), torch.ones(rows)
        selection.proportional_scale(mine, of, target, 0.02, total)
        selection.duty_cycles(mine, of, target, 0.0, total)
        selection.quantile_threshold(mine, of, target, total)
        selection.bisect_threshold(mine, of, target, target, total)
        assert kinds == {torch.float64}


def test_cap_leaves_no_table_skipped_whole() -> None:
    duty = torch.tensor([0.0, 0.0, 0.5])
    rate = torch.tensor([60.0, 40.0, 100.0])
    table = torch.tensor([0, 0, 1])
    capped = selection.cap_duty(duty, rate, table, torch.tensor([100.0, 100.0], dtype=torch.float64), 0.8)
    torch.testing.assert_close(capped, torch.tensor([0.2, 0.2, 0.5]))


@given(duty=st.floats(0, 1, width=32), first=st.integers(0, 10**12))
def test_patterns_have_the_duty_on_average(duty: float, first: int) -> None:
    rows = torch.arange(first, first + 50)
    decisions = 64
    live = torch.zeros(50)
    for decision in range(decisions):
        patterns = selection.step_patterns(torch.full((50,), duty), rows, decision)
        live += torch.tensor([bin(p).count("1") for p in patterns.tolist()])
    # A low-discrepancy sequence of 64 terms misses its mean by a few parts in 64 of one eighth.
    torch.testing.assert_close(live / (8 * decisions), torch.full((50,), duty), rtol=0, atol=0.02)


def test_patterns_spread_over_rows_and_steps() -> None:
    patterns = selection.step_patterns(torch.full((4000,), 0.25), torch.arange(4000), 3)
    by_step = torch.stack([(patterns >> bit) & 1 for bit in range(8)]).float().mean(dim=1)
    torch.testing.assert_close(by_step, torch.full((8,), 0.25), rtol=0, atol=0.04)
    again = selection.step_patterns(torch.full((4000,), 0.25), torch.arange(4000), 3)
    assert torch.equal(patterns, again)
    assert selection.step_patterns(torch.ones(3), torch.arange(3), 9).tolist() == [255] * 3
    assert selection.step_patterns(torch.zeros(3), torch.arange(3), 9).tolist() == [0] * 3
