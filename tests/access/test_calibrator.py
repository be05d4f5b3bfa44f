"""FAE's calibrator: the paper's worked example, tables of Student's t, and its intervals against exact counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.access.criteo import needs_criteo, profile_of, read_profile
from tests.access.profiles import sparse, zipf_counts
from torchrec_slipstream.access import AccessProfile, TableAccess, calibrate
from torchrec_slipstream.access.calibrator import least_hot_count
from torchrec_slipstream.access.student import t_quantile
from torchrec_slipstream.errors import ConfigError, ProfileError


def test_worked_example_of_the_paper() -> None:
    """t = 0.01%, 60.5M samples, x = 5%: H = 302.5."""
    assert least_hot_count(0.01, 60_500_000, 5) == pytest.approx(302.5, rel=1e-12)


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [
        # From the tables in textbooks.
        (0.9995, 34, 3.601),
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.995, 5, 4.032),
        (0.95, 10, 1.812),
        (0.9995, 3, 12.924),
        (0.9, 120, 1.289),
        (0.025, 34, -2.032),
        (0.5, 7, 0.0),
    ],
)
def test_students_t(probability: float, freedom: int, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=5.1e-4)


def test_students_t_in_closed_form() -> None:
    """1 and 2 degrees of freedom have formulas; many are normal."""
    for p in (0.6, 0.9, 0.999, 1 - 1e-9):
        assert t_quantile(p, 1) == pytest.approx(np.tan(np.pi * (p - 0.5)), rel=1e-6)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / np.sqrt(2 * p * (1 - p)), rel=1e-6)
        assert t_quantile(1 - p, 5) == pytest.approx(-t_quantile(p, 5), rel=1e-6)
    assert t_quantile(0.975, 10**7) == pytest.approx(1.959964, abs=1e-5)
    for bad in ((0.0, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="has to be in"):
            t_quantile(*bad)


def made_profile(rows: int = 200_000, tables: int = 2, every: int = 1) -> AccessProfile:
    parts = [
        TableAccess(f"t{i}", rows, 16, zipf_counts(rows, 1.0 + i / 10, 400_000, seed=i) * np.int32(every))
        for i in range(tables)
    ]
    return AccessProfile(parts, 400_000 * every, every)


@pytest.mark.parametrize("budget", ["500KB", "1MB", "3MB"])
def test_the_estimate_fits_and_no_lower_threshold_does(budget: str) -> None:
    profile = made_profile()
    found = calibrate(profile, budget)
    assert found.hot_bytes <= found.budget
    assert found.exact_bytes == pytest.approx(found.hot_bytes, rel=0.1)
    for name, one in found.tables.items():
        counts = profile[name].counts
        assert one.exact_rows == (counts >= one.least_count).sum()
        assert one.least_count == found.percent / 100 * profile[name].lookups
        assert one.low <= one.hot_rows <= one.high
    # A slightly lower t lets the next class of rows in, which does not fit.
    drawn = np.random.default_rng(0)
    more = 0.0
    for table in profile.tables.values():
        chunks = -(-table.rows // 1024)
        hot = [
            (table.counts[1024 * place : 1024 * (place + 1)] >= found.percent / 100 * (1 - 1e-6) * table.lookups).sum()
            for place in drawn.choice(chunks, 35, replace=False)
        ]
        more += np.mean(hot) * chunks * table.row_bytes
    assert more > found.budget


def test_a_budget_for_everything_takes_all_used_rows() -> None:
    profile = made_profile()
    found = calibrate(profile, "1GB", small_table=0, chunks=10**6)
    for name, one in found.tables.items():
        assert one.exact_rows == (profile[name].counts > 0).sum()
        assert one.low == one.high == one.hot_rows == one.exact_rows  # counted whole: nothing is estimated
    assert calibrate(profile, 0).hot_bytes == 0


def test_sampled_counts_give_the_threshold_in_the_sample() -> None:
    """The same sample scaled by 20 is the same answer, with H as counted in the sample."""
    plain, scaled = calibrate(made_profile(), "2MB"), calibrate(made_profile(every=20), "2MB")
    assert scaled.sampled_percent == 5
    for name, one in plain.tables.items():
        assert scaled.tables[name].least_count == pytest.approx(one.least_count)
        assert scaled.tables[name].hot_rows == one.hot_rows
    profile = made_profile(every=20)
    lookups = profile["t0"].lookups
    assert scaled.tables["t0"].least_count == pytest.approx(least_hot_count(scaled.percent, lookups, 5))


def test_small_tables_are_hot_whole() -> None:
    small = TableAccess("small", 15_000, 16, np.zeros(15_000, np.int32))
    profile = AccessProfile([small, *made_profile().tables.values()], 400_000)
    found = calibrate(profile, "2MB")
    assert found.tables["small"].whole
    assert found.tables["small"].hot_bytes == 960_000
    assert not found.tables["t0"].whole
    assert 960_000 < found.hot_bytes <= 2_000_000
    with pytest.raises(ProfileError, match=r"hot whole, take 938 KiB, 254 KiB more than the budget of 684 KiB"):
        calibrate(profile, 700_000)


def test_forms_and_seeds() -> None:
    profile = made_profile()
    listed = AccessProfile([sparse(one) for one in profile.tables.values()], profile.samples)
    assert calibrate(listed, "1MB") == calibrate(profile, "1MB")
    assert calibrate(profile, "1MB", seed=1) != calibrate(profile, "1MB")
    unused = TableAccess("t0", 10**6, 16, np.zeros(10**6, np.int32))
    nothing = calibrate(AccessProfile([unused], 0), "1MB")
    assert nothing.hot_bytes == nothing.exact_bytes == 0
    assert calibrate(AccessProfile([], 0)).tables == {}


@pytest.mark.parametrize("shape", ["hashed", "sorted"])
def test_coverage_of_the_interval(shape: str) -> None:
    """Hashed ids: the 90% interval covers the truth about as often as it says, over chunks drawn 200 times. Ids in
    the order of popularity: it does not, which the module's docstring warns of."""
    counts = zipf_counts(300_000, 1.1, 3_000_000)
    if shape == "sorted":
        counts = np.sort(counts)[::-1]
    profile = AccessProfile([TableAccess("t", len(counts), 16, counts)], 1)
    results = [
        calibrate(profile, 5_000 * 64, chunks=20, confidence=0.9, small_table=0, seed=seed).tables["t"]
        for seed in range(200)
    ]
    covered = np.mean([one.covers for one in results])
    assert 0.85 <= covered <= 0.96 if shape == "hashed" else covered < 0.6


def test_the_finite_population_narrows_the_interval() -> None:
    """All but one chunk drawn: the interval is nearly closed."""
    table = TableAccess("t", 40 * 1024, 16, zipf_counts(40 * 1024, 1.0, 200_000))
    profile = AccessProfile([table], 1)
    half = {
        chunks: (one := calibrate(profile, "400KB", chunks=chunks, small_table=0).tables["t"]).high - one.hot_rows
        for chunks in (20, 39, 40)
    }
    assert half[20] > 4 * half[39] > half[40] == 0


def test_printed() -> None:
    text = str(calibrate(made_profile(every=20), "1MB"))
    assert "99.9% interval" in text
    assert "5% of the inputs counted" in text
    assert " of 977 KiB" in text


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"chunks": 1}, ProfileError, "chunks=1 has to be at least 2"),
        ({"chunk_rows": 0}, ProfileError, "chunk_rows=0 at least 1"),
        ({"confidence": 1.0}, ProfileError, r"confidence=1.0 in \(0, 1\)"),
        ({"budget": "much"}, ConfigError, "'much' is not a size of memory"),
    ],
)
def test_bad_values(more: dict, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        calibrate(made_profile(tables=1), **more)


# --- real traffic -----------------------------------------------------------------------------------------------------


@needs_criteo
def test_intervals_on_criteo() -> None:
    """At 99.9% nearly all of 26 tables x 5 draws x 2 budgets are covered (tables of a few hot rows are not normal)."""
    profile = read_profile()
    covered = [
        one.covers
        for budget in ("2MB", "5MB")
        for seed in range(5)
        for one in calibrate(profile, budget, seed=seed).tables.values()
    ]
    assert len(covered) == 260
    assert np.mean(covered) > 0.97


@needs_criteo
def test_a_twentieth_of_the_batches_finds_the_hot_rows_traffic() -> None:
    """Hotline: 5% of the mini-batches find over 90% of the hot rows. Here 5% are 4,000 samples, too few to name the
    rows (about half of them), enough for their look-ups (over 90%)."""
    everything = profile_of(np.arange(80_000))
    sample = profile_of(np.flatnonzero(np.arange(80_000) // 128 % 20 == 0), every=20)
    drift = sample.drift(everything, 0.005)
    assert drift.overall.hit_rate > 0.9 * drift.overall.best_hit_rate
    hot, guessed = everything.hot_rows(0.005), sample.hot_rows(0.005)
    found = sum(
        len(np.intersect1d(one.top_rows(hot[name]), sample[name].top_rows(guessed[name])))
        for name, one in everything.tables.items()
    )
    assert 0.4 < found / sum(hot.values()) < 0.9
    # The calibrator on that sample: the exact threshold's bytes are near its own.
    found_at = calibrate(sample, "600KB")
    assert found_at.exact_bytes == pytest.approx(found_at.hot_bytes, rel=0.15)
    assert replace(found_at, budget=0) != found_at
