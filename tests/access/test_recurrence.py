"""What counts are worth, learnt from two windows: of tables whose rows return, go by, or were seen once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.access import AccessProfile, CountHistogram, Recurrence, TableAccess
from torchrec_slipstream.errors import ProfileError
from torchrec_slipstream.placement.allocation import TableDemand, allocate

Counts = npt.NDArray[np.int64]


def held_out_values(earlier: Counts, later: Counts, histogram: CountHistogram) -> npt.NDArray[np.float64]:
    return Recurrence.of(earlier, later).values(histogram, int(earlier.sum() + later.sum()))


def values_of(earlier: Counts, later: Counts) -> dict[int, float]:
    histogram = CountHistogram.of(earlier + later)
    return dict(zip(histogram.counts.tolist(), held_out_values(earlier, later, histogram).tolist(), strict=True))


def test_rows_that_return_are_worth_their_count_and_rows_that_go_by_nothing() -> None:
    counts = np.array([8, 6, 4, 2, 2, 0])
    assert values_of(counts, counts) == {count: count for count in (16, 12, 8, 4, 0)}
    assert values_of(counts, np.zeros(6, np.int64)) == {8: 0.0, 6: 0.0, 4: 0.0, 2: 0.0, 0: 0.0}


def test_it_is_the_mean_of_what_followed() -> None:
    earlier = np.array([0, 0, 0, 0, 2, 2, 4])
    later = np.array([1, 0, 0, 0, 2, 1, 3])
    in_both = {count: value / 2 for count, value in values_of(earlier, later).items()}
    assert in_both[0] == pytest.approx(0.25)
    assert in_both[1] == pytest.approx(0.25 + (1.5 - 0.25) / 4), "half a look-up, between none and two"
    assert in_both[4] == pytest.approx(1.5)
    assert in_both[7] == pytest.approx(1.5 + (3 - 1.5) * 1.5 / 2)


def test_averages_that_fall_are_pooled() -> None:
    values = values_of(np.array([2, 4, 4]), np.array([9, 0, 3]))
    assert values[4] == values[7] == pytest.approx(2 * 4.0), "12 look-ups of 3 rows"


def test_rows_beyond_what_the_earlier_window_saw_are_worth_in_proportion() -> None:
    values = values_of(np.array([2, 0]), np.array([2, 40]))
    assert values[4] == pytest.approx(2 * (2 + 40) / 2)
    assert values[40] == pytest.approx(2 * 21 * 20 / 2)
    assert values_of(np.zeros(2, np.int64), np.array([4, 0])) == {4: 2 * 2 * 2 / 0.5, 0: 2 * 2.0}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 1 << 40)), max_size=30), st.integers(0, 40))
def test_they_can_always_be_allocated_on(pairs: list[tuple[int, int]], shift: int) -> None:
    earlier = np.array([count << min(shift, 4 * count) for count, _ in pairs], dtype=np.int64)
    later = np.array([count for _, count in pairs], dtype=np.int64)
    histogram = CountHistogram.of(earlier + later)
    values = held_out_values(earlier, later, histogram)
    shares = allocate([TableDemand("t", histogram, 4, values)], 40)
    assert shares["t"].hot_rows == min(10, len(pairs))


def test_large_counts_are_grouped_but_keep_their_order() -> None:
    generator = np.random.default_rng(0)
    rates = generator.pareto(0.7, 20_000) * 100
    earlier, later = generator.poisson(rates), generator.poisson(rates)
    values = values_of(earlier, later)
    assert max(values) > 1 << 16
    for count, value in values.items():
        # What both windows had, to within what few rows can tell.
        assert value == pytest.approx(count, rel=0.25, abs=16), count


def test_a_table_that_returns_is_preferred_to_one_that_goes_by() -> None:
    steady, passing = np.array([2, 2, 2, 0]), np.array([9, 8, 0, 0])
    demands = []
    for name, earlier, later in (("steady", steady, steady), ("passing", passing, passing[::-1].copy())):
        histogram = CountHistogram.of(earlier + later)
        demands.append(TableDemand(name, histogram, 4, held_out_values(earlier, later, histogram)))
    shares = allocate(demands, 4 * 3)
    assert (shares["steady"].hot_rows, shares["passing"].hot_rows) == (0, 3), (
        "unseen rows of passing get 8.5 on average"
    )
    none_follow = CountHistogram.of(passing)
    demands[1] = TableDemand("passing", none_follow, 4, held_out_values(passing, np.zeros(4, np.int64), none_follow))
    assert allocate(demands, 4 * 3)["steady"].hot_rows == 3


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (1, 1), (7, 2)])
def test_windows_may_be_of_different_length(before: int, after: int) -> None:
    rates = np.array([9, 5, 5, 2, 1, 0])
    earlier, later = rates * before, rates * after
    steady = Recurrence.of(earlier, later, samples=(before * 100, after * 100))
    histogram = CountHistogram.of(earlier + later)
    lookups = int(earlier.sum() + later.sum())
    assert steady.values(histogram, lookups) == pytest.approx(histogram.counts)
    # More of the same, whose windows are not known: worth its count as well.
    assert steady.values(CountHistogram.of(rates * 50), int(rates.sum()) * 50) == pytest.approx(
        np.unique(rates)[::-1] * 50
    )
    # Of rows that are looked up twice as often in the window after, as much is expected again, whatever the lengths.
    growing = CountHistogram.of(earlier + later * 2)
    learnt = Recurrence.of(earlier, later * 2, samples=(before * 100, after * 100))
    assert learnt.values(growing, growing.lookups) == pytest.approx(growing.counts * 2)


def test_a_chain_knows_what_all_before_said_of_the_last() -> None:
    rates = np.array([8, 4, 2, 0])
    a, b, c = (AccessProfile([table(rates * days)], 10 * days) for days in (1, 1, 1))
    three = a.followed_by(b).followed_by(c)
    assert three["t"].recurrence == Recurrence.of(rates * 2, rates, samples=(20, 10))
    assert three["t"].worth(three["t"].histogram) == pytest.approx([24, 12, 6, 0])
    # Days that had learnt from their own halves: these are shorter, and a count of theirs is another rate.
    day = a.followed_by(b)
    assert day.followed_by(day)["t"].recurrence == Recurrence.of(rates * 2, rates * 2, samples=(20, 20))
    pairs = day.merge(day)["t"]
    assert pairs.recurrence is not None
    assert (pairs.recurrence.pairs, pairs.recurrence.earlier_samples, pairs.recurrence.later_samples) == (2, 20, 20)
    assert pairs.worth(pairs.histogram) == pytest.approx(pairs.histogram.counts)


def test_nothing_is_learnt_from_a_window_without_samples() -> None:
    counts = np.array([3, 1, 0])
    known, unknown = AccessProfile([table(counts)], 10), AccessProfile([table(counts)], 0)
    learnt = known.followed_by(known)
    for earlier, later in ((known, unknown), (unknown, known), (unknown, unknown)):
        assert earlier.followed_by(later) == earlier.merge(later)
    assert learnt.followed_by(unknown)["t"].recurrence == learnt["t"].recurrence
    for samples in ((0, 1), (1, 0)):
        values = Recurrence.of(counts, counts[::-1].copy(), samples=samples).values(CountHistogram.of(counts), 4)
        np.testing.assert_array_equal(values, [3.0, 1.0, 0.0])


def test_windows_of_different_tables_are_refused_and_empty_ones_are_nothing() -> None:
    empty = CountHistogram.of(np.zeros(0, np.int64))
    assert held_out_values(np.zeros(0, np.int64), np.zeros(0, np.int64), empty).shape == (0,)
    with pytest.raises(ProfileError, match="the windows have 3 and 2 rows"):
        held_out_values(np.zeros(3, np.int64), np.zeros(2, np.int64), empty)


# ------------------------------------------------------------------------------------------- in a profile


def table(counts: Counts, name: str = "t") -> TableAccess:
    return TableAccess(name, len(counts), 4, counts)


def sparse(counts: Counts, name: str = "t") -> TableAccess:
    ids = np.flatnonzero(counts)
    return TableAccess(name, len(counts), 4, counts[ids], ids)


COUNTS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 9), min_size=n, max_size=n).map(np.array) for _ in range(2)))
)


@given(COUNTS, st.booleans(), st.booleans())
def test_windows_that_follow_each_other_add_up_and_teach(
    windows: tuple[Counts, Counts], first_sparse: bool, second_sparse: bool
) -> None:
    earlier, later = windows
    one = (sparse if first_sparse else table)(earlier)
    two = (sparse if second_sparse else table)(later)
    both = AccessProfile([one], 10).followed_by(AccessProfile([two], 10))
    assert both.samples == 20
    np.testing.assert_array_equal(both["t"].counts_of(0, len(earlier)), earlier + later)
    assert both["t"].recurrence == Recurrence.of(earlier, later, samples=(10, 10))
    assert both["t"].recurrence != Recurrence.of(earlier, later, samples=(10, 9))
    assert one.followed_by(two).recurrence == Recurrence.of(earlier, later), "equally long, where nothing else is said"
    merged = AccessProfile([one], 10).merge(AccessProfile([two], 10))
    assert merged["t"].recurrence is None
    assert merged["t"].worth(merged["t"].histogram) is None


def test_experience_adds_up_over_rows_and_days() -> None:
    generator = np.random.default_rng(3)
    earlier, later = generator.integers(0, 6000, 300), generator.integers(0, 6000, 300)
    parts = Recurrence.of(earlier[:100], later[:100]).merged(Recurrence.of(earlier[100:], later[100:]))
    whole = Recurrence.of(earlier, later)
    for name in ("classes", "rows", "earlier", "later"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert (parts.pairs, parts.earlier_samples, parts.later_samples) == (2, 2, 2)
    assert (whole.pairs, whole.earlier_samples, whole.later_samples) == (1, 1, 1)
    more = Recurrence.of(earlier, later, others=5)
    assert (more.classes[0], more.rows[0], more.rows.sum()) == (0, 5, whole.rows.sum() + 5)
    # A window of the same days twice over is as long as one of them: rows are ranked alike, for twice the traffic.
    day = table(earlier).followed_by(table(later))
    week = day.merged(day)
    histogram = day.histogram
    twice = CountHistogram(histogram.counts * 2, histogram.rows)
    value = day.worth(histogram)
    assert value is not None
    assert week.worth(twice) == pytest.approx(2 * value)


def test_a_faded_profile_ranks_rows_as_before() -> None:
    generator = np.random.default_rng(4)
    both = table(generator.integers(0, 50, 200) * 2).followed_by(table(generator.integers(0, 50, 200) * 2))
    faded, value = both.decayed(0.5), both.worth(both.histogram)
    assert value is not None
    assert faded.worth(faded.histogram) == pytest.approx(value / 2)


def test_tables_with_and_without_two_windows_share_a_budget_by_the_same_measure() -> None:
    steady = np.array([5, 3, 1, 0])
    learnt, plain = table(steady).followed_by(table(steady)), table(steady * 2 - (steady > 0), "plain")
    demands = [TableDemand(one.name, one.histogram, 4, one.worth(one.histogram)) for one in (learnt, plain)]
    shares = allocate(demands, 4 * 4)
    assert {name: share.hot_rows for name, share in shares.items()} == {"t": 2, "plain": 2}
    assert allocate(demands, 4)["t"].hot_rows == 1, "10 look-ups before 9"


def test_a_profile_without_two_windows_falls_back_on_counts() -> None:
    empty = Recurrence.of(np.zeros(0, np.int64), np.zeros(0, np.int64))
    histogram = CountHistogram.of(np.array([3, 1, 0]))
    np.testing.assert_array_equal(empty.values(histogram, 4), [3.0, 1.0, 0.0])
    untouched = Recurrence.of(np.zeros(3, np.int64), np.zeros(3, np.int64))
    np.testing.assert_array_equal(untouched.values(CountHistogram.of(np.zeros(3, np.int64)), 0), [0.0])
    # Looked up only in what was merged later.
    np.testing.assert_array_equal(untouched.values(histogram, 4), [3.0, 1.0, 0.0])
