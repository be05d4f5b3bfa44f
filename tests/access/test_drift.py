"""Drift between profiles: against row-by-row sums, and what chance alone makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.access.criteo import needs_criteo, profile_of
from tests.access.profiles import dense, profiles, sparse, zipf_counts
from torchrec_slipstream.access import AccessProfile, TableAccess, drift
from torchrec_slipstream.errors import ProfileError


def counts_of(profile: AccessProfile, name: str) -> np.ndarray:
    return dense(profile[name]).counts.astype(np.float64)


@given(a=profiles(sizes=(5, 9)), b=profiles(sizes=(5, 9)), share=st.floats(0, 1), chunk=st.sampled_from([2, 1 << 22]))
def test_against_sums_over_rows(a: AccessProfile, b: AccessProfile, share: float, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "_CHUNK", chunk)
        found = a.drift(b, share)
    totals = [sum(counts_of(one, name).sum() for name in one) for one in (a, b)]
    overall = 0.0
    for name, one in found.tables.items():
        p, q = counts_of(a, name), counts_of(b, name)
        if p.sum() and q.sum():
            assert one.total_variation == pytest.approx(np.abs(p / p.sum() - q / q.sum()).sum() / 2, abs=1e-12)
        else:
            assert one.total_variation == (p.sum() != q.sum())
        if all(totals):
            overall += np.abs(p / totals[0] - q / totals[1]).sum() / 2
        assert one.hit_rate == b[name].hit_rate(a[name].top_rows(a.hot_rows(share)[name]))
        assert 0 <= one.by_chance <= 1
    if all(totals):
        assert found.overall.total_variation == pytest.approx(overall, abs=1e-12)
        backwards = b.drift(a, share)
        assert backwards.overall.total_variation == pytest.approx(found.overall.total_variation, abs=1e-12)
        assert backwards.overall.by_chance == pytest.approx(found.overall.by_chance, rel=1e-4)
    assert found.budget == a.budget_bytes(share)


@given(profile=profiles(), share=st.floats(0, 1))
def test_no_drift_from_itself(profile: AccessProfile, share: float) -> None:
    found = profile.drift(profile, share)
    for one in (found.overall, *found.tables.values()):
        assert one.total_variation == 0
        assert one.regret == pytest.approx(0, abs=1e-12)


def sampled(exponent: float, lookups: int, seed: int, turned: int = 0, every: int = 1) -> AccessProfile:
    """Look-ups of one Zipf table, the popularity of its rows shifted by some places."""
    random = np.random.default_rng(seed)
    chances = np.roll(1 / np.arange(1, 20_001) ** exponent, turned)
    counts = random.multinomial(lookups // every, chances / chances.sum()).astype(np.int32) * np.int32(every)
    return AccessProfile([TableAccess("t", 20_000, 16, counts)], lookups, every)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.4])
@pytest.mark.parametrize(("lookups", "every"), [((50_000, 50_000), 1), ((200_000, 20_000), 1), ((80_000, 80_000), 8)])
def test_one_traffic_moves_by_chance_only(exponent: float, lookups: tuple[int, int], every: int) -> None:
    """Two samples of one distribution: what is measured is what chance makes."""
    found = sampled(exponent, lookups[0], 1, every=every).drift(sampled(exponent, lookups[1], 2, every=every))
    assert found.tables["t"].total_variation == pytest.approx(found.tables["t"].by_chance, rel=0.05)
    assert found.overall.by_chance == pytest.approx(found.tables["t"].by_chance, rel=1e-9)


def test_traffic_that_moved_exceeds_chance() -> None:
    found = sampled(1.2, 50_000, 1).drift(sampled(1.2, 50_000, 2, turned=3), 0.0001)
    assert found.overall.total_variation > 2 * found.overall.by_chance
    assert found.overall.regret > 0.1
    assert "all tables" in str(found)


def test_tables_without_lookups() -> None:
    used = AccessProfile([TableAccess("t", 5, 4, np.arange(5))], 10)
    unused = AccessProfile([TableAccess("t", 5, 4, np.zeros(5, np.int32))], 10)
    assert used.drift(unused).overall == drift.TableDrift(1.0, 0.0, 1.0, 1.0)
    assert unused.drift(used, 0.5).overall == drift.TableDrift(1.0, 0.0, 0.0, 0.7)
    assert unused.drift(unused).overall == drift.TableDrift(0.0, 0.0, 1.0, 1.0)


def test_sparse_tables_are_not_made_dense() -> None:
    """2^40 rows: possible only where the rows listed are all that is looked at."""
    one = TableAccess("t", 2**40, 4, np.array([3, 1]), ids=np.array([7, 2**39]))
    other = TableAccess("t", 2**40, 4, np.array([2, 2]), ids=np.array([7, 2**40 - 1]))
    found = AccessProfile([one], 4).drift(AccessProfile([other], 4), one.row_bytes)
    assert found.overall.total_variation == 0.5
    assert found.overall.hit_rate == 0.5


def test_other_tables() -> None:
    a = TableAccess("a", 3, 4, np.array([1, 2, 3]))
    with pytest.raises(ProfileError, match=r"only one of the two profiles has table\(s\) 'a', 'b'"):
        AccessProfile([a], 1).drift(AccessProfile([replace(a, name="b")], 1))
    with pytest.raises(ProfileError, match="table 'a' has 3 rows of 16 bytes in one profile and 3 of 20 in the other"):
        AccessProfile([a], 1).drift(AccessProfile([replace(a, optimizer_bytes=4)], 1))


def test_forms_agree() -> None:
    a, b = (
        TableAccess("t", 5000, 4, zipf_counts(5000, 1.1, 9000, seed)).merged(
            TableAccess("t", 5000, 4, np.zeros(5000, int))
        )
        for seed in (1, 2)
    )
    pairs = [(x, y) for x in (a, sparse(a)) for y in (b, sparse(b))]
    found = [AccessProfile([x], 1).drift(AccessProfile([y], 1)).overall for x, y in pairs]
    for one in found[1:]:
        assert one.total_variation == pytest.approx(found[0].total_variation, rel=1e-12)
        assert one.by_chance == pytest.approx(found[0].by_chance, rel=1e-12)
        assert (one.hit_rate, one.best_hit_rate) == (found[0].hit_rate, found[0].best_hit_rate)


@needs_criteo
def test_criteo_hardly_drifts() -> None:
    """The file's last fifth against the rest: 14% of its look-ups go elsewhere, of which chance explains nearly all."""
    found = profile_of(np.arange(64_000)).drift(profile_of(np.arange(64_000, 80_000)), 0.01)
    assert found.overall.by_chance > 0.1
    assert found.overall.total_variation == pytest.approx(found.overall.by_chance, rel=0.05)
    assert 0 < found.overall.regret < 0.1


@pytest.mark.parametrize("chance", [0.5, 0.2, 0.999, 1e-6])
@pytest.mark.parametrize("number", [1, 2, 17, 5000, 10_000_000])
def test_mean_deviation_of_a_binomial(number: int, chance: float) -> None:
    """The closed form against draws."""
    drawn = np.random.default_rng(0).binomial(number, chance, 400_000)
    expected = np.abs(drawn - number * chance).mean()
    assert drift._mean_deviation(number, chance) == pytest.approx(expected, rel=0.1, abs=2e-5)
