"""The simulated caches against references that look at one row at a time, and the optimum against a search."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.caches import WAYS, belady, belady_bound, cache_set, simulate_lfu, simulate_lru, waits

Ints = npt.NDArray[np.int64]


def make_stream(seed: int, ids: int, batches: int, size: int) -> tuple[Ints, Ints, Ints]:
    """Rows, look-ups and batch limits of skewed requests."""
    generator = np.random.default_rng(seed)
    rows, lookups, limits = [], [], [0]
    for _ in range(batches):
        drawn = (ids * generator.random(size) ** 3).astype(np.int64)
        found, counts = np.unique(drawn, return_counts=True)
        rows.append(found)
        lookups.append(counts)
        limits.append(limits[-1] + len(found))
    return np.concatenate(rows), np.concatenate(lookups), np.array(limits)


def slow_cache(kind: str, rows: Ints, lookups: Ints, batches: Ints, sets_of: Ints, sets: int) -> list[bool]:
    """As FBGEMM's kernels say it, a row at a time."""
    slots: list[list[tuple[int, int]]] = [[(-1, 0) for _ in range(WAYS)] for _ in range(sets)]  # row, last used
    frequency: dict[int, int] = {-1: -1}
    hits: list[bool] = []
    for i in range(len(batches) - 1):
        batch = [int(row) for row in rows[batches[i] : batches[i + 1]]]
        missing: dict[int, list[int]] = {}
        for row, count in zip(batch, lookups[batches[i] : batches[i + 1]].tolist(), strict=True):
            frequency[row] = frequency.get(row, 0) + count
        for row in batch:
            one = slots[sets_of[row]]
            at = [way for way in range(WAYS) if one[way][0] == row]
            hits.append(bool(at))
            if at:
                one[at[0]] = (row, i + 1)
            else:
                missing.setdefault(int(sets_of[row]), []).append(row)
        for where, newcomers in missing.items():
            one = slots[where]
            if kind == "lru":
                order = sorted(range(WAYS), key=lambda way: one[way][1])
            else:
                order = sorted(range(WAYS), key=lambda way: frequency[one[way][0]])
                newcomers.sort(key=lambda row: -frequency[row])
            for way, row in zip(order, newcomers, strict=False):
                if kind == "lru" and one[way][1] == i + 1:
                    break
                if kind == "lfu" and frequency[one[way][0]] > frequency[row]:
                    break
                one[way] = (row, i + 1)
    return hits


@pytest.mark.parametrize("kind", ["lru", "lfu"])
@pytest.mark.parametrize(("sets", "size"), [(1, 30), (1, 200), (3, 90), (8, 400)])
def test_a_cache_does_what_the_kernels_say(kind: str, sets: int, size: int) -> None:
    rows, lookups, batches = make_stream(sets, 600, 25, size)
    sets_of = cache_set(np.arange(600), sets)
    if kind == "lru":
        hits = simulate_lru(rows, batches, sets_of, sets)
    else:
        hits = simulate_lfu(rows, lookups, batches, sets_of, sets)
    assert hits.tolist() == slow_cache(kind, rows, lookups, batches, sets_of, sets)
    assert 0 < hits.sum() < len(hits)


def test_without_sets_nothing_hits_and_with_enough_only_first_requests_miss() -> None:
    rows, lookups, batches = make_stream(5, 200, 10, 60)
    sets_of = cache_set(np.arange(200), 64)
    assert not simulate_lru(rows, batches, sets_of, 0).any()
    assert not simulate_lfu(rows, lookups, batches, sets_of, 0).any()
    distinct = len(np.unique(rows))
    assert (~simulate_lru(rows, batches, sets_of, 64)).sum() == distinct
    assert (~simulate_lfu(rows, lookups, batches, sets_of, 64)).sum() == distinct


def test_sets_are_those_of_fbgemm() -> None:
    # MurmurHash3's 64-bit finaliser of 1 is 0xb456bcfc34c2cb2c, by its author's reference implementation.
    sets = 10_007
    assert cache_set(np.array([0, 1]), sets).tolist() == [0, 0xB456BCFC34C2CB2C % sets]
    spread = np.bincount(cache_set(np.arange(64_000), 64), minlength=64)
    assert 900 < spread.min() < spread.max() < 1100


@st.composite
def streams(draw: st.DrawFn) -> tuple[Ints, Ints, int]:
    """A few small batches of rows 0 .. 4, and the first that is measured."""
    batches = draw(st.lists(st.sets(st.integers(0, 4), min_size=1, max_size=4), min_size=2, max_size=6))
    rows = np.array([row for one in batches for row in sorted(one)])
    limits = np.cumsum([0, *(len(one) for one in batches)])
    return rows, limits, draw(st.integers(1, len(batches) - 1))


def best_by_search(rows: Ints, batches: Ints, first: int, row_bytes: Ints, capacity: int, worth: Ints) -> int:
    """Every way to fill the cache and to keep what it has or has just looked up."""
    fitting = [
        frozenset(kept)
        for size in range(6)
        for kept in itertools.combinations(range(5), size)
        if row_bytes[list(kept)].sum() <= capacity
    ]
    best = dict.fromkeys(fitting, 0)
    for i in range(first, len(batches) - 1):
        part = slice(batches[i], batches[i + 1])
        batch = rows[part].tolist()
        following: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            now = hits + sum(int(w) for row, w in zip(batch, worth[part], strict=True) if row in kept)
            for other in fitting:
                if other <= kept | set(batch):
                    following[other] = max(following.get(other, 0), now)
        best = following
    return max(best.values())


@given(streams(), st.integers(0, 5))
def test_beladys_optimum_is_that_of_a_search(stream: tuple[Ints, Ints, int], capacity: int) -> None:
    rows, batches, first = stream
    since, until = waits(rows, batches, first)
    ones = np.ones(5, dtype=np.int64)
    best = best_by_search(rows, batches, first, ones, capacity, np.ones(len(rows), dtype=np.int64))
    assert belady(since, until, capacity) == best
    assert belady_bound(since, until, np.ones(len(since), dtype=np.int64), capacity) >= best - 1e-9


@given(streams(), st.integers(0, 12), st.integers(0, 1 << 30))
def test_no_cache_of_rows_of_any_bytes_exceeds_the_bound(
    stream: tuple[Ints, Ints, int], capacity: int, seed: int
) -> None:
    rows, batches, first = stream
    generator = np.random.default_rng(seed)
    row_bytes, worth = generator.integers(1, 5, 5), generator.integers(1, 9, len(rows))
    since, until = waits(rows, batches, first)
    rest = slice(int(batches[first]), None)
    bound = belady_bound(since, until, row_bytes[rows[rest]], capacity, worth[rest])
    assert bound >= best_by_search(rows, batches, first, row_bytes, capacity, worth) - 1e-9
    assert bound <= worth[rest].sum() + 1e-9


def test_a_cache_of_everything_has_all_hits_and_one_of_nothing_none() -> None:
    rows, lookups, batches = make_stream(9, 100, 12, 40)
    since, until = waits(rows, batches, 4)
    assert len(since) == len(rows) - batches[4]
    assert since.min() == 3
    assert belady(since, until, 100) == len(since)
    ones = np.ones(len(since), dtype=np.int64)
    assert belady_bound(since, until, ones, 100, lookups[batches[4] :]) == lookups[batches[4] :].sum()
    assert belady(since, until, 0) == belady_bound(since, until, ones, 0) == 0
