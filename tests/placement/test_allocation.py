"""Row allocation against a greedy that looks at every row, and against what must hold of any such order."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.access import CountHistogram
from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.placement import allocation
from torchrec_slipstream.placement.allocation import TableDemand, TableShare, allocate, hot_rows_of

Counts = npt.NDArray[np.int64]
# Few different counts and sizes, so that ties within and between tables are the rule.
Tables = dict[str, tuple[Counts, int]]


def demands(tables: Tables) -> list[TableDemand]:
    return [TableDemand(name, CountHistogram.of(counts), row_bytes) for name, (counts, row_bytes) in tables.items()]


@st.composite
def some_tables(draw: st.DrawFn) -> Tables:
    names = draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=5))
    counts = st.lists(st.one_of(st.integers(0, 6), st.integers(0, 1 << 50)), max_size=12)
    return {name: (np.array(draw(counts), dtype=np.int64), draw(st.sampled_from([1, 2, 3, 4, 7]))) for name in names}


def brute_force(tables: Tables, budget: float) -> dict[str, list[int]]:
    """Row by row in the documented order, until one does not fit."""
    rows = [
        (-Fraction(int(count), row_bytes), name, -int(count), row, row_bytes)
        for name, (counts, row_bytes) in tables.items()
        for row, count in enumerate(counts)
    ]
    hot: dict[str, list[int]] = {name: [] for name in tables}
    for _, name, _, row, row_bytes in sorted(rows):
        budget -= row_bytes
        if budget < 0:
            break
        hot[name].append(row)
    return {name: sorted(found) for name, found in hot.items()}


def hot_rows(tables: Tables, shares: dict[str, TableShare]) -> dict[str, list[int]]:
    return {name: hot_rows_of(counts, shares[name]).tolist() for name, (counts, _) in tables.items()}


@given(some_tables(), st.integers(0, 150))
def test_it_takes_what_a_row_by_row_greedy_takes(tables: Tables, budget: int) -> None:
    shares = allocate(demands(tables), budget)
    found = hot_rows(tables, shares)
    assert found == brute_force(tables, budget)
    for name, (counts, row_bytes) in tables.items():
        assert shares[name].hot_rows == len(found[name])
        assert shares[name].hot_bytes == len(found[name]) * row_bytes
        assert shares[name].hot_lookups == counts[found[name]].sum()


@given(some_tables(), st.integers(0, 150))
def test_it_stays_within_the_budget_and_leaves_out_no_denser_row(tables: Tables, budget: int) -> None:
    shares = allocate(demands(tables), budget)
    assert sum(share.hot_bytes for share in shares.values()) <= budget
    hot, cold = [], []
    for name, (counts, row_bytes) in tables.items():
        taken = set(hot_rows_of(counts, shares[name]).tolist())
        for row, count in enumerate(counts.tolist()):
            (hot if row in taken else cold).append(Fraction(count, row_bytes))
    assert not hot or not cold or min(hot) >= max(cold)


@given(some_tables(), st.integers(0, 150), st.randoms())
def test_the_order_of_the_tables_does_not_matter(tables: Tables, budget: int, random: object) -> None:
    shuffled = demands(tables)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert allocate(shuffled, budget) == allocate(demands(tables), budget)


@given(some_tables(), st.integers(0, 150), st.integers(0, 30))
def test_a_greater_budget_only_adds_rows(tables: Tables, budget: int, more: int) -> None:
    small = hot_rows(tables, allocate(demands(tables), budget))
    large = hot_rows(tables, allocate(demands(tables), budget + more))
    assert all(set(small[name]) <= set(large[name]) for name in tables)


@given(some_tables())
def test_budgets_of_nothing_and_of_everything(tables: Tables) -> None:
    assert not any(hot_rows(tables, allocate(demands(tables), 0)).values())
    everything = {name: list(range(len(counts))) for name, (counts, _) in tables.items()}
    needed = sum(len(counts) * row_bytes for counts, row_bytes in tables.values())
    for budget in (needed, needed + 1, 10**30, math.inf):
        assert hot_rows(tables, allocate(demands(tables), budget)) == everything


@given(some_tables(), st.integers(0, 150), st.integers(0, 2))
def test_counts_of_listed_rows_only_give_the_same_rows(tables: Tables, budget: int, listed_zeros: int) -> None:
    shares = allocate(demands(tables), budget)
    for name, (counts, _) in tables.items():
        ids = np.flatnonzero((counts > 0) | (np.arange(len(counts)) % 3 < listed_zeros)).astype(np.int64)
        sparse = hot_rows_of(counts[ids], shares[name], ids)
        assert sparse.tolist() == hot_rows_of(counts, shares[name]).tolist()


@pytest.mark.parametrize("rows_at_a_time", [1, 2, 3, 100])
def test_hot_rows_do_not_depend_on_how_many_are_looked_at_together(
    rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "_CHUNK", rows_at_a_time)
    counts = np.array([1, 4, 1, 0, 1, 4, 1])
    share = allocate([TableDemand("t", CountHistogram.of(counts), 4)], 4 * 5)["t"]
    assert hot_rows_of(counts, share).tolist() == [0, 1, 2, 4, 5]
    assert hot_rows_of(counts, share, np.arange(10, 17)).tolist() == [10, 11, 12, 14, 15]


def test_large_counts_are_compared_exactly() -> None:
    count = (1 << 60) + 2
    assert float(count) / 3 == float(count - 1) / 3, "else this tests nothing"
    tables = {"a": (np.array([count - 1]), 3), "b": (np.array([count]), 3)}
    assert hot_rows(tables, allocate(demands(tables), 3)) == {"a": [], "b": [0]}


def test_a_row_that_does_not_fit_ends_the_filling() -> None:
    tables = {"small": (np.array([5, 1]), 10), "large": (np.array([90]), 100)}
    assert hot_rows(tables, allocate(demands(tables), 15)) == {"small": [], "large": []}
    assert hot_rows(tables, allocate(demands(tables), 110)) == {"small": [0], "large": [0]}


def test_values_replace_counts_between_tables_but_not_within_one() -> None:
    tables = {"a": (np.array([4, 1, 0, 0]), 2), "b": (np.array([9, 8, 7]), 2)}
    a, b = demands(tables)
    a = TableDemand("a", a.histogram, 2, values=np.array([3.0, 3.0, 2.5]))
    b = TableDemand("b", b.histogram, 2, values=np.array([2.5, 0.5, 0.0]))
    assert hot_rows(tables, allocate([a, b], 6)) == {"a": [0, 1, 2], "b": []}
    shares = allocate([b, a], 10)
    assert hot_rows(tables, shares) == {"a": [0, 1, 2, 3], "b": [0]}
    assert shares["b"].hot_lookups == 9, "look-ups stay measured ones"
    raw = [TableDemand(one.name, one.histogram, 2, one.histogram.counts.astype(np.float64)) for one in (a, b)]
    for budget in range(16):
        assert allocate(raw, budget) == allocate(demands(tables), budget)


def test_tables_without_rows_and_no_tables() -> None:
    nothing = TableShare(least_count=0, ties=0, hot_rows=0, hot_bytes=0, hot_lookups=0)
    tables = {"empty": (np.zeros(0, np.int64), 4), "full": (np.array([0, 3]), 4)}
    assert allocate(demands(tables), 8)["empty"] == nothing
    assert list(allocate(demands(tables), 8)) == ["empty", "full"]
    assert allocate([], 8) == {}
    assert hot_rows_of(np.zeros(0, np.int32), nothing).dtype == np.int64
    assert hot_rows_of(np.zeros(0, np.int32), nothing, np.zeros(0, np.int64)).dtype == np.int64


def test_untouched_rows_of_a_table_that_lists_few() -> None:
    histogram = CountHistogram.of(np.array([5, 2]), untouched=10**9)
    share = allocate([TableDemand("t", histogram, 8)], 8 * 5)["t"]
    assert share == TableShare(least_count=0, ties=3, hot_rows=5, hot_bytes=40, hot_lookups=7)
    assert hot_rows_of(np.array([5, 2]), share, np.array([1, 10**8])).tolist() == [0, 1, 2, 3, 10**8]


GOOD = CountHistogram.of(np.array([3, 1, 1]))


@pytest.mark.parametrize(
    ("tables", "budget", "message"),
    [
        ([], -1, "the budget is -1 bytes; give 0 or more"),
        ([], math.nan, "the budget is nan bytes"),
        ([], 1.5, "the budget is 1.5 bytes; give a whole number"),
        ([TableDemand("t", GOOD, 0)], 1, "table 't': row_bytes is 0; give 1 to 67108864"),
        ([TableDemand("t", GOOD, 1 << 27)], 1, "row_bytes is 134217728"),
        ([TableDemand("t", GOOD, 4), TableDemand("t", GOOD, 4)], 1, "table 't' is given twice"),
        (
            [TableDemand("t", GOOD, 4, np.zeros(3))],
            1,
            r"table 't': values has the shape \(3,\); give one for each of 2",
        ),
        ([TableDemand("t", GOOD, 4, np.array([1.0, -1.0]))], 1, r"values\[1\] is -1.0"),
        ([TableDemand("t", GOOD, 4, np.array([np.nan, 1.0]))], 1, r"values\[0\] is nan"),
        ([TableDemand("t", GOOD, 4, np.array([1.0, 2.0]))], 1, "values rise from 1.0 to 2.0 at 1"),
        ([TableDemand("t", CountHistogram.of(np.array([1]), untouched=1 << 40), 1 << 26)], 1, "beyond 2\\^63"),
    ],
)
def test_what_cannot_be_allocated_is_named(tables: list[TableDemand], budget: float, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        allocate(tables, budget)


def test_a_share_of_other_counts_is_refused() -> None:
    share = allocate([TableDemand("t", GOOD, 4)], 8)["t"]
    with pytest.raises(PlanError, match="has 2 hot rows, but 1 rows have such counts"):
        hot_rows_of(np.array([3, 0, 0]), share)
    with pytest.raises(PlanError, match="has 2 hot rows, but 3 rows"):
        hot_rows_of(np.array([3, 3, 1]), share, np.array([0, 4, 7]))


def test_a_hundred_tables_of_ten_to_the_five_rows_take_seconds() -> None:
    """A hundredth of what benchmarks/placement.py --scale measures."""
    generator = np.random.default_rng(0)
    parts = [(generator.pareto(1.1, 10**5) * 2).clip(0, 10**8).astype(np.int32) for _ in range(4)]
    began = time.perf_counter()
    histograms = [CountHistogram.of(np.resize(parts[i % 4], 10**5)) for i in range(100)]
    tables = [TableDemand(f"t{i}", one, 4 * 2 ** (i % 6)) for i, one in enumerate(histograms)]
    budget = sum(one.histogram.total_rows * one.row_bytes for one in tables) // 10
    shares = allocate(tables, budget)
    hot = sum(len(hot_rows_of(parts[i % 4], shares[f"t{i}"])) for i in range(100))
    seconds = time.perf_counter() - began
    assert hot == sum(share.hot_rows for share in shares.values()) > 10**5
    assert seconds < 3, seconds
