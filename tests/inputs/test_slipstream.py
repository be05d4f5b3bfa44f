"""Slipstream's input skipping on real TBEs, against the method written down in plain loops."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.inputs.skipping import FEATURES, ROWS, SIZE, Oracle, Run, hot_half, rows_of
from torchrec_slipstream.config import SlipstreamInputs
from torchrec_slipstream.errors import ConfigError, StateError
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.inputs.search import Found, bisect
from torchrec_slipstream.inputs.slipstream import SlipstreamSelector, SlipstreamShares
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe.watched import watched_shards

KNOBS = SlipstreamInputs(
    start=5, snapshot_steps=20, sample_share=1.0, min_touches=3, search_window=0.02, max_threshold=1.0
)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"start": 0},
    {"stale_lookups": 2},
    {"stale_lookups": 1, "each_table": True},
    {"movement": "per_touch"},
    {"movement": "relative", "max_threshold": 20.0},
    {"per_table": True},
    {"per_table": True, "stale_lookups": 2, "drop_share": 0.5},
    {"per_table": True, "movement": "relative", "stale_lookups": 1, "each_table": True},
    {"min_touches": 9},
]


@pytest.mark.parametrize("all_rows", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("watched", [(0, 1), (1,)])
@pytest.mark.filterwarnings("ignore:Slipstream's search")
def test_against_the_method(variant: dict[str, Any], all_rows: bool, watched: tuple[int, ...]) -> None:
    changes = {name: value for name, value in variant.items() if name != "drop_share"}
    share = variant.get("drop_share", 0.3)
    run = Run(replace(KNOBS, **changes), None if all_rows else hot_half, watched=watched, drop_share=share)
    start, end = run.knobs.start, run.knobs.start + run.knobs.snapshot_steps
    kept = run.train(range(end))
    assert all(map(all, kept))
    oracle = Oracle(run, start, end, range(end))
    threshold, met = oracle.search()
    (search,) = run.selector.searches
    assert search.step == end
    assert (search.found.threshold, search.found.met) == (threshold, met)
    assert search.found.samples == len(oracle.sampled)
    assert search.found.share == oracle.share(threshold)
    assert threshold > 0  # so that what follows can fail

    stale = run.selector.stale
    assert stale is not None
    for place, table in enumerate(run.tables):
        if place in watched:
            want = [score < threshold for score in oracle.scores[place]]
            looked_up = {row for one in oracle.sampled for row in rows_of(one, place)}
            # Of rows that no sampled input looks up the oracle has no share that is exact.
            rows = looked_up if run.knobs.per_table else range(ROWS[place])
            found = stale.of(table.fqn).tolist()
            assert [found[row] for row in rows] == [want[row] for row in rows]

    kept = run.train(range(end, end + 10))
    inputs = [[f[s] for f in bags] for bags in run.seen[end:] for s in range(SIZE)]
    known = {(t, r) for one in oracle.sampled for t, bag in zip(FEATURES, one, strict=True) for r in bag}
    compared = dropped = 0
    for keep, one in zip(itertools.chain(*kept), inputs, strict=True):
        if run.knobs.per_table and any((t, r) not in known for t, b in zip(FEATURES, one, strict=True) for r in b):
            continue
        assert keep == (not (oracle.is_hot(one) and oracle.is_stale(one, threshold)))
        compared += 1
        dropped += not keep
    assert compared > 50
    assert dropped > 2
    hot = sum(map(oracle.is_hot, inputs))
    total_dropped = len(inputs) - sum(itertools.chain(*kept))
    assert run.selector.shares == SlipstreamShares((end + 10) * SIZE, 10 * SIZE, hot, total_dropped)


def test_where_all_rows_are_hot_no_batch_is_looked_through_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for hot, passes in ((None, 1), (hot_half, 2)):
        run = Run(KNOBS, hot)
        run.train(range(25))
        with monkeypatch.context() as patch:
            counted = Mock(side_effect=RowSets.lookups_in)
            patch.setattr(RowSets, "lookups_in", lambda *given, counted=counted: counted(*given))
            run.train(range(25, 28))
        assert counted.call_count == 3 * passes


def test_steps_count_from_the_first_batch() -> None:
    """A session that has trained before takes its snapshots as a new one does."""
    early, late = Run(KNOBS), Run(KNOBS)
    step = late.selector.step
    late.selector.step = lambda steps: step(steps + 500)
    assert early.train(range(30)) == late.train(range(30))
    (one,), (other,) = early.selector.searches, late.selector.searches
    assert other == replace(one, step=525)


def test_an_untouched_row_is_not_stale() -> None:
    """The artefact's trap: what was not looked up between the snapshots moved by 0."""
    run = Run(replace(KNOBS, snapshot_steps=2, min_touches=1), drop_share=0.6)
    run.train(range(7))
    stale = run.selector.stale
    assert stale is not None
    untouched = 0
    for place, table in enumerate(run.tables):
        touched = run.touches[5][place] + run.touches[6][place]
        for row, is_stale in enumerate(stale.of(table.fqn).tolist()):
            assert not is_stale or touched[row] > 0
            untouched += touched[row] == 0
    assert untouched > 3
    assert sum(stale.sizes().values()) > 3


def test_a_search_that_fails_keeps_the_best_and_says_so() -> None:
    run = Run(replace(KNOBS, search_window=0.0))
    with pytest.warns(UserWarning, match=r"no threshold that drops 30% \+- 0%.*sample_share"):
        run.train(range(25))
    (search,) = run.selector.searches
    oracle = Oracle(run, 5, 25, range(25))
    assert (search.found.threshold, search.found.met) == oracle.search()
    assert not search.found.met
    assert search.found.threshold > 0
    assert search.found.share == oracle.share(search.found.threshold) > 0.2


def test_a_share_within_the_window_of_none_is_searched_for_all_the_same() -> None:
    run = Run(replace(KNOBS, search_window=0.08), drop_share=0.05)
    run.train(range(25))
    (search,) = run.selector.searches
    assert search.found.met
    assert 0 < search.found.share <= 0.13
    assert search.stale_rows > 0
    # At half of the range none is below, which is within the window; a twentieth is only higher up.
    assert bisect(np.array([0.8] + 19 * [2.0]), 0.05, 0.08, 1.0, lambda mine: mine) == Found(0.875, 0.05, True, 20)


@pytest.mark.parametrize("seed", [0, 2**24, 2**63, 2**100])
def test_any_seed_draws(seed: int) -> None:
    runs = [Run(replace(KNOBS, sample_share=0.5), selector_seed=of) for of in (seed, seed, seed + 1)]
    for run in runs:
        run.train(range(3))
    one, other, another = (run.selector.state_dict()["sampled"] for run in runs)
    values = [[of_kjt["values"].tolist() for of_batch in sampled for of_kjt in of_batch] for sampled in (one, other)]
    assert values[0] == values[1]
    assert values[0] != [of_kjt["values"].tolist() for of_batch in another for of_kjt in of_batch]


def test_without_samples_nothing_is_stale() -> None:
    run = Run(replace(KNOBS, sample_share=1e-9))
    with pytest.warns(UserWarning, match="0 sampled hot inputs"):
        run.train(range(25))
    assert all(map(all, run.train(range(25, 30))))
    assert run.selector.searches[0].stale_rows == 0


@pytest.mark.filterwarnings("ignore:Slipstream's search")
def test_searched_again() -> None:
    run = Run(replace(KNOBS, again=30))
    kept = run.train(range(100))
    dropping = [not all(of_batch) for of_batch in kept]
    assert [one.step for one in run.selector.searches] == [25, 55, 85]
    # Windows, in which all is thawed, are [5, 25), [35, 55), [65, 85) and [95, ...).
    thawed = [*range(25), *range(35, 55), *range(65, 85), *range(95, 100)]
    assert not any(dropping[step] for step in thawed)
    assert all(any(dropping[step] for step in part) for part in (range(25, 35), range(55, 65), range(85, 95)))
    for search, window, read in zip(
        run.selector.searches, ((5, 25), (35, 55), (65, 85)), (range(25), range(25, 55), range(55, 85)), strict=True
    ):
        threshold, _ = Oracle(run, *window, read).search()
        assert search.found.threshold == threshold


@pytest.mark.filterwarnings("ignore:Slipstream's search")
@pytest.mark.parametrize("stop", [3, 12, 25, 30, 40])
def test_resumes_bit_for_bit(stop: int) -> None:
    knobs = replace(KNOBS, sample_share=0.5, again=30)
    whole, broken = Run(knobs, hot_half), Run(knobs, hot_half)
    kept = whole.train(range(70))
    assert broken.train(range(stop)) == kept[:stop]
    state = broken.selector.state_dict()
    broken.selector = broken.new_selector()
    broken.selector.load_state_dict(state)
    assert broken.train(range(stop, 70)) == kept[stop:]
    assert broken.selector.searches == whole.selector.searches
    assert broken.selector.shares == whole.selector.shares
    assert not all(map(all, kept))


def test_refuses_other_states() -> None:
    run = Run(KNOBS)
    run.train(range(10))
    state = run.selector.state_dict()
    with pytest.raises(StateError, match="'fae'"):
        run.selector.load_state_dict({"selector": "fae"})
    with pytest.raises(StateError, match="drop_share"):
        Run(KNOBS, drop_share=0.5).selector.load_state_dict(state)
    with pytest.raises(StateError, match="min_touches"):
        Run(replace(KNOBS, min_touches=4)).selector.load_state_dict(state)
    run.watched = (1,)
    with pytest.raises(StateError, match="shards"):
        run.new_selector().load_state_dict(state)


def test_samples_a_share() -> None:
    run = Run(replace(KNOBS, sample_share=0.25, search_window=0.3))
    run.train(range(25))
    assert 0.18 < run.selector.searches[0].found.samples / (25 * SIZE) < 0.32


def test_hot_rows_are_asked_for_at_the_start() -> None:
    run = Run(KNOBS)
    asked = []

    def ask() -> RowSets:
        asked.append(len(run.seen))
        return hot_half(run.tables)

    shards = watched_shards([run.filter])
    run.selector = SlipstreamSelector(KNOBS, run.tables, shards, ask, Ranks(), drop_share=0.3)
    run.train(range(26))
    assert asked == [5]
    with pytest.raises(ConfigError, match="start=0"):
        SlipstreamSelector(replace(KNOBS, start=0), run.tables, shards, ask, Ranks(), drop_share=0.3)


def test_counted_lookups_stand_for_several() -> None:
    """Of a counted look-up in two, a row with one has two, and is not stale below four."""
    runs = [Run(replace(KNOBS, min_touches=least), scale=scale) for least, scale in ((2, 1), (3, 2), (4, 2), (5, 2))]
    stale = []
    for run in runs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.train(range(25))
        assert run.selector.stale is not None
        stale.append((run.selector.searches[0].found.threshold, run.selector.stale.digest))
    assert stale[0] == stale[1] == stale[2]


@given(
    critical=st.lists(st.floats(0, 1, width=32) | st.just(math.inf), max_size=40),
    target=st.floats(0, 0.99),
    window=st.floats(0, 0.2),
    highest=st.floats(1e-3, 2),
    ranks=st.integers(1, 3),
)
def test_bisection(critical: list[float], target: float, window: float, highest: float, ranks: int) -> None:
    """Split over ranks or not, within the window where it says so, and never worse than nothing."""
    values = np.array(critical)

    def of_all(mine: Tensor) -> Tensor:
        return mine * ranks  # every rank has the same

    one, several = (
        bisect(values, target, window, highest, lambda mine: mine),
        bisect(values, target, window, highest, of_all),
    )
    assert replace(several, samples=one.samples) == one
    assert several.samples == ranks * len(critical)
    if not critical:
        assert (one.threshold, one.share, one.met) == (0.0, 0.0, target == 0)
        return
    assert one.share == sum(value < one.threshold for value in critical) / len(critical)
    assert one.met == (abs(one.share - target) <= window and (one.share > 0 or target == 0))
    assert one.met or abs(one.share - target) <= target
    low = sum(value < highest for value in critical) / len(critical)
    if not one.met and len(set(critical)) == len(critical) and target < low:
        gaps = sorted({0.0, *(value for value in critical if value < highest)})
        if min(b - a for a, b in itertools.pairwise([*gaps, highest])) > highest * 2**-24:
            assert abs(one.share - target) <= 1 / len(critical)
