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


def test_rows_that_return_are_worth_half_their_count_and_rows_that_go_by_nothing() -> None:
    counts = np.array([8, 6, 4, 2, 2, 0])
    assert values_of(counts, counts) == {count: count / 2 for count in (16, 12, 8, 4, 0)}
    assert values_of(counts, np.zeros(6, np.int64)) == {8: 0.0, 6: 0.0, 4: 0.0, 2: 0.0, 0: 0.0}


def test_it_is_the_mean_of_what_followed() -> None:
    earlier = np.array([0, 0, 0, 0, 2, 2, 4])
    later = np.array([1, 0, 0, 0, 2, 1, 3])
    values = values_of(earlier, later)
    assert values[0] == pytest.approx(0.25)
    assert values[1] == pytest.approx(0.25 + (1.5 - 0.25) / 4), "half a look-up, between none and two"
    assert values[4] == pytest.approx(1.5)
    assert values[7] == pytest.approx(1.5 + (3 - 1.5) * 1.5 / 2)


def test_averages_that_fall_are_pooled() -> None:
    values = values_of(np.array([2, 4, 4]), np.array([9, 0, 3]))
    assert values[4] == values[7] == pytest.approx(4.0), "12 look-ups of 3 rows"


def test_rows_beyond_what_the_earlier_window_saw_are_worth_in_proportion() -> None:
    values = values_of(np.array([2, 0]), np.array([2, 40]))
    assert values[4] == pytest.approx((2 + 40) / 2)
    assert values[40] == pytest.approx(21 * 20 / 2)
    assert values_of(np.zeros(2, np.int64), np.array([4, 0])) == {4: 2 * 2 / 0.5, 0: 2.0}


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
        # The rate that a count of both windows shows, to within what few rows can tell.
        assert value == pytest.approx(count / 2, rel=0.25, abs=8), count


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
    assert both["t"].recurrence == Recurrence.of(earlier, later)
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
    assert (parts.pairs, whole.pairs) == (2, 1)
    more = Recurrence.of(earlier, later, others=5)
    assert (more.classes[0], more.rows[0], more.rows.sum()) == (0, 5, whole.rows.sum() + 5)
    # A window of the same days twice over is as long as one of them.
    day = table(earlier).followed_by(table(later))
    week = day.merged(day)
    histogram = day.histogram
    twice = CountHistogram(histogram.counts * 2, histogram.rows)
    assert day.worth(histogram) == pytest.approx(week.worth(twice))


def test_a_faded_profile_ranks_rows_as_before() -> None:
    generator = np.random.default_rng(4)
    both = table(generator.integers(0, 50, 200) * 2).followed_by(table(generator.integers(0, 50, 200) * 2))
    faded = both.decayed(0.5)
    assert both.worth(both.histogram) == pytest.approx(faded.worth(faded.histogram))


def test_a_profile_without_two_windows_falls_back_on_counts() -> None:
    empty = Recurrence.of(np.zeros(0, np.int64), np.zeros(0, np.int64))
    histogram = CountHistogram.of(np.array([3, 1, 0]))
    np.testing.assert_array_equal(empty.values(histogram, 4), [3.0, 1.0, 0.0])
    untouched = Recurrence.of(np.zeros(3, np.int64), np.zeros(3, np.int64))
    np.testing.assert_array_equal(untouched.values(CountHistogram.of(np.zeros(3, np.int64)), 0), [0.0])
