"""Access profiles: every figure against counting row by row, in both forms; merging, decay, and bad values."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.access.profiles import any_tables, dense, profiles, sparse, tables, zipf_counts
from torchrec_slipstream.access import AccessProfile, TableAccess, table
from torchrec_slipstream.errors import ConfigError, ProfileError


def ranked(one: TableAccess) -> list[int]:
    """Rows, the most looked-up first, ties by the lower row."""
    counts = one.counts_of(0, one.rows)
    return sorted(range(one.rows), key=lambda row: (-int(counts[row]), row))


# --- one table --------------------------------------------------------------------------------------------------------


@given(one=any_tables(), data=st.data())
def test_rows_against_a_sort(one: TableAccess, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, one.rows + 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "_CHUNK", data.draw(st.sampled_from([1, 3, 1 << 24])))
        top = one.top_rows(number)
    assert top.tolist() == sorted(ranked(one)[:number])
    assert top.dtype == np.int64
    counts = one.counts_of(0, one.rows)
    all_hit = number >= one.rows or one.lookups == 0
    expected = 1.0 if all_hit else int(counts[top].sum(dtype=np.int64)) / one.lookups
    assert one.hit_rate(number) == expected
    assert one.hit_rate(top) == expected
    begin, end = sorted([data.draw(st.integers(0, one.rows)), data.draw(st.integers(0, one.rows))])
    assert one.counts_of(begin, end).tolist() == counts.tolist()[begin:end]
    assert one.histogram.total_rows == one.rows
    assert one.counted_lookups == counts.sum(dtype=np.int64)


@given(one=any_tables(), batch=st.floats(0, 1e6))
def test_both_forms_say_the_same(one: TableAccess, batch: float) -> None:
    a, b = dense(one), sparse(one)
    assert a == b == one
    assert a.hit_rate(one.rows) == b.hit_rate(np.arange(one.rows)) == 1.0
    assert pickle.loads(pickle.dumps(b)) == a
    assert a.cacheability == b.cacheability
    assert a.expected_distinct(batch) == b.expected_distinct(batch)
    for number in range(one.rows + 1):
        assert a.hit_rate(number) == b.hit_rate(number)
        assert a.top_rows(number).tolist() == b.top_rows(number).tolist()


@given(one=any_tables(), data=st.data())
def test_a_changed_count_is_another_table(one: TableAccess, data: st.DataObject) -> None:
    counts = one.counts_of(0, one.rows).astype(np.int64)
    counts[data.draw(st.integers(0, one.rows - 1))] += 1
    other = replace(one, counts=counts, ids=None, lookups=one.lookups + 1)
    assert one != other
    assert sparse(other) != one
    assert one != replace(one, lookups=one.lookups + 1)


@given(one=any_tables(), batch=st.floats(0.5, 1e5))
def test_expected_distinct(one: TableAccess, batch: float) -> None:
    found = one.expected_distinct(batch)
    counts = dense(one).counts.astype(np.float64)
    lost = one.lookups - counts.sum()
    if one.lookups:
        spread = counts == 0 if (counts == 0).any() else np.ones(one.rows, bool)
        counts[spread] += lost / spread.sum()
        assert found == pytest.approx(float((1 - (1 - counts / counts.sum()) ** batch).sum()), rel=1e-6, abs=1e-9)
    else:
        assert found == 0
    assert found <= min(max(1, batch), one.rows) * (1 + 1e-12)


@given(one=any_tables())
def test_cacheability_is_the_area_of_misses(one: TableAccess) -> None:
    area = one.cacheability
    assert 0 <= area <= 0.5 + 1e-9
    if one.lookups == one.counted_lookups:
        missed = [1 - one.hit_rate(number) for number in range(one.rows + 1)]
        assert area == pytest.approx(float(np.trapezoid(missed)) / one.rows, abs=1e-9)


def test_int32_counts_stay_int32_and_are_not_copied() -> None:
    counts = np.arange(10, dtype=np.int32)
    one = TableAccess("t", 10, 4, counts)
    assert np.shares_memory(one.counts, counts)
    assert np.shares_memory(one.counts_of(3, 7), counts)
    assert one.merged(one).counts.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        one.counts[0] = 1
    counts[0] = 5  # the caller's own array stays writable


def test_counts_beyond_int32() -> None:
    one = TableAccess("t", 2, 4, np.array([2**31 - 1, 1], dtype=np.int32))
    merged = one.merged(sparse(one))
    assert merged.counts.tolist() == [2**32 - 2, 2]
    assert merged.lookups == one.merged(one).lookups == 2**32
    assert one.merged(one) == merged == sparse(one).merged(one) == sparse(one).merged(sparse(one))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": 0}, "table 'a': rows is 0; give an integer of at least 1"),
        ({"embedding_dim": -4}, "table 'a': embedding_dim is -4"),
        ({"element_size": 0}, "element_size is 0"),
        ({"optimizer_bytes": True}, "optimizer_bytes is True"),
        ({"counts": [1, 2, 3]}, "the counts are list; give a one-dimensional numpy array of int32 or int64"),
        ({"counts": np.zeros(3)}, r"the counts are float64 \(3,\)"),
        ({"counts": np.zeros((3, 1), np.int32)}, r"the counts are int32 \(3, 1\)"),
        ({"counts": np.zeros(4, np.int32)}, "there are 4 counts for 3 rows; give one a row, or their ids"),
        ({"counts": np.array([0, -7, 0])}, "row 1 has a count of -7; .* count in int64"),
        ({"counts": np.array([-7]), "ids": np.array([2])}, "row 2 has a count of -7"),
        ({"counts": np.array([1]), "ids": np.array([3])}, "id 3 is not a row of the table; ids are 0 to 2"),
        ({"counts": np.array([1]), "ids": np.array([-1])}, "id -1 is not a row"),
        ({"counts": np.array([1, 1]), "ids": np.array([2, 1])}, "id 1 follows 2; give the ids ascending, each once"),
        ({"counts": np.array([1, 1]), "ids": np.array([1, 1])}, "id 1 follows 1"),
        ({"counts": np.array([1, 1]), "ids": np.array([1])}, r"the ids are int64 \(1,\); give .* int64 \(2,\)"),
        ({"lookups": 5}, "lookups is 5, and the counts alone add up to 6"),
    ],
)
def test_bad_tables(changed: dict[str, object], said: str) -> None:
    fields: dict[str, object] = {"name": "a", "rows": 3, "embedding_dim": 4, "counts": np.array([1, 2, 3])}
    with pytest.raises(ProfileError, match=said):
        TableAccess(**{**fields, **changed})  # type: ignore[arg-type]


def test_bad_questions() -> None:
    one = TableAccess("a", 3, 4, np.array([1, 2, 3]))
    for call, said in (
        (lambda: one.hit_rate(-1), "-1 hot rows were asked for"),
        (lambda: one.hit_rate(np.array([0, 3])), r"hot row 3 is not in \[0, 3\)"),
        (lambda: one.hit_rate(np.array([1, 0, 1])), "hot row 1 is given twice"),
        (
            lambda: one.hit_rate(np.array([])),
            r"the hot rows are float64 \(0,\); give their ids as .*np.empty\(0, np.int64",
        ),
        (lambda: one.hit_rate(np.array([True, False, True])), r"the hot rows are bool \(3,\)"),
        (lambda: one.hit_rate(np.array(1)), r"the hot rows are int64 \(\)"),
        (lambda: one.top_rows(True), "True hot rows"),
        (lambda: one.counts_of(2, 4), r"rows \[2, 4\) were asked for; give a range within \[0, 3\)"),
        (lambda: one.decayed(1.5), r"the decay factor is 1.5; give a number in \[0, 1\]"),
        (lambda: one.merged(replace(one, optimizer_bytes=8)), "optimizer_bytes is 0 here and 8 in the other"),
        (lambda: one.merged(TableAccess("a", 4, 4, np.zeros(4, np.int32))), "rows is 3 here and 4 in the other"),
    ):
        with pytest.raises(ProfileError, match=f"table 'a': {said}"):
            call()


# --- all tables -------------------------------------------------------------------------------------------------------


def greedy(profile: AccessProfile, budget: int) -> int:
    """Look-ups served, taking row by row by look-ups a byte until one does not fit."""
    rows = [
        (-int(count) / one.row_bytes, name, one.row_bytes, int(count))
        for name, one in profile.tables.items()
        for count in one.counts_of(0, one.rows)
        if count
    ]
    hits = 0
    for _, _, size, count in sorted(rows):
        budget -= size
        if budget < 0:
            break
        hits += count
    return hits


@given(profile=profiles(), share=st.floats(0, 1))
def test_hit_rate_is_the_greedy_choice(profile: AccessProfile, share: float) -> None:
    budget = profile.budget_bytes(share)
    found = profile.hit_rate(budget)
    assert found == profile.hit_rate(share) == profile.hit_rate(f"{budget}B")
    if profile.lookups == 0 or budget >= profile.total_bytes:
        assert found == 1.0
    else:
        assert found == pytest.approx(greedy(profile, budget) / profile.lookups, rel=1e-15)
    hot = profile.hot_rows(budget)
    assert sum(number * profile[name].row_bytes for name, number in hot.items()) <= budget
    assert sum(profile[name].hit_rate(hot[name]) * profile[name].lookups for name in hot) >= greedy(profile, budget)


@given(profile=profiles())
def test_curves_rise_to_one(profile: AccessProfile) -> None:
    for name in [None, *profile.tables]:
        curve = profile.curve(20, name)
        assert (np.diff(curve.bytes) > 0).all()
        assert (np.diff(curve.hit_rate) >= 0).all()
        assert curve.hit_rate[-1] == 1.0
        assert 2 <= len(curve.bytes) <= 20
    assert [profile.hit_rate(int(one)) for one in profile.curve(20).bytes] == profile.curve(20).hit_rate.tolist()


@given(a=profiles(sizes=(5, 9)), b=profiles(sizes=(5, 9)), c=profiles(sizes=(5, 9)))
def test_merging_adds_up_in_any_order(a: AccessProfile, b: AccessProfile, c: AccessProfile) -> None:
    merged = a.merge(b)
    assert merged == b.merge(a)
    assert merged.merge(c) == a.merge(b.merge(c)) == a.merge(b, c)
    assert merged.samples == a.samples + b.samples
    for name, one in merged.tables.items():
        added = dense(a[name]).counts.astype(np.int64) + dense(b[name]).counts
        assert dense(one).counts.tolist() == added.tolist()
        assert one.lookups == a[name].lookups + b[name].lookups
    nothing = AccessProfile([replace(one, counts=one.counts * 0, lookups=0) for one in a.tables.values()], 0)
    assert a.merge(nothing) == a


@given(profile=profiles(), factor=st.floats(0, 1))
def test_decay(profile: AccessProfile, factor: float) -> None:
    faded = profile.decayed(factor)
    for name, one in faded.tables.items():
        before = profile[name].counts_of(0, one.rows)
        assert (np.abs(one.counts_of(0, one.rows) - before * factor) <= 0.5).all()
        assert one.lookups >= one.counted_lookups
        assert abs(one.lookups - profile[name].lookups * factor) <= 0.5 + 0.5 * one.rows
    assert profile.decayed(1.0) == profile
    assert profile.decayed(0.0).lookups == 0


def test_tables_without_lookups() -> None:
    empty = TableAccess("empty", 10, 4, np.zeros(10, np.int32))
    used = TableAccess("used", 10, 4, np.arange(10, dtype=np.int32))
    profile = AccessProfile([used, empty], samples=5)
    assert profile.hit_rate(0) == 0
    assert profile.hit_rate(used.rows * used.row_bytes) == 1.0
    assert profile.hot_rows("1MB") == {"empty": 0, "used": 9}
    assert empty.hit_rate(0) == 1.0
    assert empty.top_rows(3).tolist() == [0, 1, 2]
    assert profile.pooling_factor("empty") == 0
    assert "empty" in str(profile)
    alone = AccessProfile([empty], samples=0)
    assert alone.hit_rate(0) == 1.0
    assert alone.pooling_factor("empty") == 0
    assert AccessProfile([], 0).hit_rate(0) == 1.0
    assert "0 samples" in str(AccessProfile([], 0))


def test_figures_of_a_skewed_table() -> None:
    """A hand-worked profile: two tables, one of twice the bytes a row."""
    a = TableAccess("a", 4, 4, np.array([8, 4, 2, 0]))
    b = TableAccess("b", 2, 8, np.array([10, 6]), element_size=4)
    profile = AccessProfile([b, a], samples=15)
    assert (a.row_bytes, b.row_bytes, profile.total_bytes) == (16, 32, 128)
    # By look-ups a byte: a0 .5, b0 .3125, a1 .25, b1 .1875, a2 .125.
    for budget, hits in ((15, 0), (16, 8), (47, 8), (48, 18), (64, 22), (95, 22), (96, 28), (112, 30), (128, 30)):
        assert profile.hit_rate(budget) == pytest.approx(hits / 30)
    assert profile.hot_rows(64) == {"a": 2, "b": 1}
    assert profile.pooling_factor("a") == 14 / 15
    assert list(profile.tables) == ["a", "b"]
    text = str(profile)
    assert re.search(r"^b +2 +8 +64 B +16 +1.07 +100.0% +62.5% +62.5% +62.5%$", text, re.MULTILINE)


def test_bad_profiles() -> None:
    one = TableAccess("a", 3, 4, np.array([1, 2, 3]))
    profile = AccessProfile([one], 3)
    other = AccessProfile([replace(one, name="b")], 3)
    for call, said in (
        (lambda: AccessProfile([one, one], 1), "two tables are called 'a'"),
        (lambda: AccessProfile([one], -1), "samples=-1; give an integer of at least 0"),
        (lambda: AccessProfile([one], 1, 0), "sampled_every=0; give an integer of at least 1"),
        (lambda: profile["x"], "the profile has no table 'x'; it has 'a'"),
        (lambda: profile.hit_rate(1.5), r"budget=1.5; a float is a share of the tables' bytes, in \[0, 1\]"),
        (lambda: profile.merge(other), r"only one of the two profiles has table\(s\) 'a', 'b'; merge profiles of"),
        (lambda: profile.statistics(0), "batch_size=0; give the global batch's samples"),
        (lambda: AccessProfile(["a"], 1), "one of the tables is 'a'; give TableAccess objects"),
        (lambda: profile.merge("x"), "'x' is no AccessProfile; give one"),
        (lambda: profile.followed_by(None), "None is no AccessProfile; give one"),
        (lambda: profile.drift(3), "3 is no AccessProfile; give one"),
        (lambda: profile.curve(-1), "points=-1; give an integer of at least 2"),
        (lambda: profile.curve(2.5), "points=2.5; give an integer of at least 2"),
        (lambda: profile.curve(20, "x"), "the profile has no table 'x'"),
    ):
        with pytest.raises(ProfileError, match=said):
            call()
    with pytest.raises(ConfigError, match="'8 apples' is not a size of memory"):
        profile.hit_rate("8 apples")


def test_container() -> None:
    a, b = (TableAccess(name, 3, 4, np.array([1, 2, 3])) for name in "ab")
    profile = AccessProfile([b, a], 6)
    assert list(profile) == ["a", "b"]
    assert len(profile) == 2
    assert "a" in profile
    assert "c" not in profile
    assert profile.select(["b"]) == AccessProfile([b], 6)
    assert profile != AccessProfile([a, b], 7)
    assert pickle.loads(pickle.dumps(profile)) == profile
    with pytest.raises(TypeError):
        profile.tables["c"] = a  # type: ignore[index]


@given(one=tables(unattributed=False))
def test_sizes_do_not_depend_on_the_order_of_rows(one: TableAccess) -> None:
    turned = replace(one, counts=one.counts[::-1])
    assert turned.cacheability == one.cacheability
    assert turned.expected_distinct(7) == one.expected_distinct(7)


def test_a_large_table_is_not_sorted() -> None:
    """2 x 10^6 rows: what a threshold finds is what a full sort finds."""
    counts = zipf_counts(2_000_000, 1.1, 3_000_000)
    one = TableAccess("t", len(counts), 16, counts)
    order = np.lexsort((np.arange(len(counts)), -counts))
    for number in (1, 1000, 300_000, 1_500_000):
        assert np.array_equal(one.top_rows(number), np.sort(order[:number]))
        assert np.array_equal(sparse(one).top_rows(number), np.sort(order[:number]))
