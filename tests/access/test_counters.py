"""Counting row by row: exact, one step in k without bias, halved fairly, and safe from int32's end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_slipstream.access import counters
from torchrec_slipstream.access.counters import RowCounts, coins, is_counted

CPU = torch.device("cpu")


def counted(rows: Tensor, size: int, *, fades: bool = False) -> RowCounts:
    counts = RowCounts(size, CPU, fades=fades)
    counts.add(rows)
    return counts


@given(st.lists(st.lists(st.integers(0, 29), max_size=60), max_size=4))
def test_counts_are_bincounts(batches: list[list[int]]) -> None:
    counts = RowCounts(30, CPU)
    for batch in batches:
        counts.add(torch.tensor(batch, dtype=torch.int64))
    everything = torch.tensor([row for batch in batches for row in batch], dtype=torch.int64)
    assert torch.equal(counts.counts(0, 30), torch.bincount(everything, minlength=30))
    assert torch.equal(counts.counts(7, 19), torch.bincount(everything, minlength=30)[7:19])
    assert counts.nbytes == 30 * 4


@pytest.mark.parametrize("every", [1, 2, 7, 8])
def test_one_step_of_every_block_is_counted_and_each_place_alike(every: int) -> None:
    blocks = 4000
    places = [[place for place in range(every) if is_counted(block * every + place, every)] for block in range(blocks)]
    assert all(len(block) == 1 for block in places)
    times = torch.bincount(torch.tensor(places).flatten(), minlength=every).double()
    # Binomial: five standard deviations of a place's share.
    torch.testing.assert_close(times / blocks, torch.full_like(times, 1 / every), atol=5 * 0.5 / blocks**0.5, rtol=0)


def test_steps_counted_do_not_move_in_step_with_periodic_data() -> None:
    """A fixed stride of 8 would see two of 16 kinds of steps."""
    kinds = torch.tensor([step % 16 for step in range(32_000) if is_counted(step, 8)])
    shares = torch.bincount(kinds, minlength=16) / kinds.numel()
    torch.testing.assert_close(shares, torch.full((16,), 1 / 16), atol=0.02, rtol=0)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50), st.integers(0, 2**32), st.integers(0, 10**12))
def test_halving_is_exact_but_for_a_coin(values: list[int], seed: int, first: int) -> None:
    counts = RowCounts(len(values), CPU, fades=True)
    counts.touches.copy_(torch.tensor(values))
    counts.halve(0, len(values), seed, first)
    halves = counts.counts(0, len(values)).tolist()
    for value, half in zip(values, halves, strict=True):
        assert half in ({value // 2} if value % 2 == 0 else {value // 2, value // 2 + 1})
    assert counts.touches.tolist() == values, "staleness takes differences of these"
    again = RowCounts(len(values), CPU, fades=True)
    again.touches.copy_(torch.tensor(values))
    # However the rows are sharded, they get the same coins.
    middle = len(values) // 2
    again.halve(middle, len(values), seed, first + middle)
    again.halve(0, middle, seed, first)
    assert again.counts(0, len(values)).tolist() == halves


def test_halving_is_right_on_average() -> None:
    rows = 200_000
    counts = counted(torch.arange(rows).repeat(3), rows, fades=True)
    counts.halve(0, rows, seed=1, first=0)
    assert float(counts.counts(0, rows).double().mean()) == pytest.approx(1.5, abs=0.005)
    counts.halve(0, rows, seed=2, first=0)
    assert float(counts.counts(0, rows).double().mean()) == pytest.approx(0.75, abs=0.008)
    counts.add(torch.arange(rows))
    assert float(counts.counts(0, rows).double().mean()) == pytest.approx(1.75, abs=0.008)


def test_coins_are_fair_and_independent() -> None:
    rows = torch.arange(100_000)
    one, other = coins(rows, 1).double(), coins(rows, 2).double()
    assert set(one.tolist()) == {0.0, 1.0}
    for coin in (one, other, (one == other).double(), (one[1:] == one[:-1]).double(), (one[2:] == one[:-2]).double()):
        assert float(coin.mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("fades", [False, True])
def test_counts_survive_the_end_of_int32(fades: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = RowCounts(3, CPU, fades=fades)
    counts.touches.copy_(torch.tensor([2**30 + 5, 2**30, 7]))
    assert [part.tolist() for part in counts.lower_high()] == [[], []], "too little was added to look"
    counts.loaded()
    assert [part.tolist() for part in counts.lower_high()] == [[0], [2**29]]
    assert counts.touches.tolist() == [2**29 + 5, 2**30, 7]
    assert counts.counts(0, 3).tolist() == [2**30 + 5, 2**30, 7]
    monkeypatch.setattr(counters, "TOUCHES_LIMIT", 100)
    small = RowCounts(2, CPU, fades=fades)
    for _ in range(40):
        small.add(torch.zeros(30, dtype=torch.int64))
        small.add(torch.ones(1, dtype=torch.int64))
        small.lower_high()
    assert small.counts(0, 2).tolist() == [1200, 40]
    assert int(small.touches.max()) <= 100 + 50 + 31
    small.touches[1] += 260
    small.loaded()
    assert [part.tolist() for part in small.lower_high()] == [[1], [200]], "as far as it takes"


def test_counts_above_int32_that_never_fade(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = RowCounts(1, CPU)
    for _ in range(8):
        counts.touches += 2**29
        counts.loaded()
        counts.lower_high()
    assert counts.counts(0, 1).tolist() == [2**32]
