"""The re-planning benchmark, tiny: its traces, what the session is held against, and what it reports."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from benchmarks import caches, replan
from benchmarks.replan import drifting_trace, main, without_tables
from benchmarks.replan_rates import Comparison, best_rows
from benchmarks.replan_run import Run, lookups_of, time_moves, train
from benchmarks.traces import Trace
from examples.synthetic import make_synthetic
from torchrec_slipstream import PlacementConfig
from torchrec_slipstream.placement.forecast import Forecast, choose

EVERY, FIRST, SLOTS = 5, 2, 60
TINY = ["--samples", "2600", "--rows", "200", "--batch", "40", "--dim", "4", "--replan-every", "5", "--rounds", "2"]
TINY += ["--dense-sizes", "8", "--over-sizes", "8", "--max-stall-share", "0"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return drifting_trace(2600, 200, 1.0, batch_size=40, dim=4, seed=0)


@pytest.fixture(scope="module")
def run(trace: Trace) -> Run:
    sizes = {"dense_sizes": [8], "over_sizes": [8]}
    return train(trace, SLOTS, EVERY, 65, **sizes, max_stall_share=None, min_gain=PlacementConfig().min_gain, seed=0)


def simulated(trace: Trace, intervals: int) -> tuple[list[npt.NDArray[np.bool_]], list[float]]:
    """The hot rows after each interval and its hit rate, from the same forecast, by counts alone."""
    config = PlacementConfig()
    forecast = Forecast(trace.starts.tolist(), torch.device("cpu"))
    hot, masks, rates = torch.zeros(trace.total_rows, dtype=torch.bool), [], []
    touches = torch.zeros(trace.total_rows, dtype=torch.int32)
    margin = config.move_cost / (16 * EVERY)
    for interval in range(intervals):
        counts = torch.from_numpy(trace.count_lookups(interval * EVERY, (interval + 1) * EVERY))
        rates.append(float(counts[hot].sum() / counts.sum()))
        touches += counts.int()
        forecast.observe(touches, EVERY)
        worth = forecast.worth()
        chosen = choose(worth, hot, SLOTS, keep=config.hysteresis, margin=2 * margin) & (hot | (worth > margin))
        coming, leaving = (chosen & ~hot).nonzero().squeeze(1), (hot & ~chosen).nonzero().squeeze(1)
        leave = max(0, len(coming) - (SLOTS - int(hot.sum())))  # no more than others need the slots of
        leaving = leaving[worth[leaving].argsort()[:leave]]
        gain = float(worth[coming].double().sum() - worth[leaving].double().sum())
        if gain >= config.min_gain * float(counts.sum()) / EVERY:
            hot = hot.clone()
            hot[coming], hot[leaving] = True, False
        masks.append(hot.numpy())
    return masks, rates


def test_the_session_hits_what_a_simulation_of_its_rule_says(trace: Trace, run: Run) -> None:
    masks, rates = simulated(trace, 13)
    assert run.slots == SLOTS
    for interval, mask in enumerate(masks):
        assert np.array_equal(run.mask(interval, trace.starts), mask), interval
    assert run.hits.tolist() == pytest.approx(rates)
    assert rates[0] == 0.0, "all rows are cold at first"
    assert sum(run.moved_rows[1:] > 0) > 5, "traffic drifts, so rows move"
    moved = [int((a ^ b).sum()) for a, b in itertools.pairwise([np.zeros_like(masks[0]), *masks])]
    assert run.moved_rows.tolist() == moved
    assert run.moved_at == [(i + 1) * EVERY for i, rows in enumerate(moved) if rows]


def test_the_oracle_bounds_all_that_replan_at_its_moments(trace: Trace, run: Run) -> None:
    comparison = Comparison(trace, run, FIRST)
    rates = comparison.rates()
    assert all(len(one) == 13 - FIRST for one in rates.values())
    generator = np.random.default_rng(0)
    for _ in range(50):
        hot = [best_rows(generator.permutation(trace.total_rows), SLOTS) for _ in comparison.counts]
        assert (comparison.of_rows(hot) <= rates["oracle"]).all()
    for name in ("static", "ours", "plan"):
        assert (rates[name] <= rates["oracle"] + 1e-12).all(), name
    # And it is reached: the best of each interval, by a sort of its own counts.
    for i, rate in enumerate(rates["oracle"]):
        counts = trace.count_lookups((FIRST + i) * EVERY, (FIRST + i + 1) * EVERY)
        assert rate == pytest.approx(np.sort(counts)[::-1][:SLOTS].sum() / counts.sum())
    # Never re-planned from the first part on: the session's rows then, and the plain counts' rows.
    assert rates["static"][0] == pytest.approx(rates["ours"][0])
    before = trace.count_lookups(0, FIRST * EVERY)
    threshold = np.sort(before)[::-1][SLOTS - 1]
    assert before[best_rows(before, SLOTS)].min() == threshold
    assert comparison.total(rates["oracle"]) == pytest.approx(
        (rates["oracle"] * comparison.lookups).sum() / comparison.lookups.sum()
    )


@pytest.mark.parametrize("kind", ["lru", "lfu"])
def test_caches_are_fbgemm_s_and_as_large(trace: Trace, run: Run, kind: str) -> None:
    sets = caches.cache_set(np.arange(trace.total_rows), 2)  # 64 slots: 60 and no set less
    if kind == "lru":
        hit = caches.simulate_lru(trace.rows, trace.batches, sets, 2)
    else:
        hit = caches.simulate_lfu(trace.rows, trace.lookups, trace.batches, sets, 2)
    expected = []
    for begin in range(FIRST * EVERY, 65, EVERY):
        part = slice(trace.batches[begin], trace.batches[begin + EVERY])
        expected.append((trace.lookups[part] * hit[part]).sum() / trace.lookups[part].sum())
    found = Comparison(trace, run, FIRST).of_cache(kind)
    assert found.tolist() == pytest.approx(expected)
    assert 0.1 < found.mean() < 1.0


def test_a_batch_of_a_trace_becomes_its_lookups(trace: Trace) -> None:
    sparse = make_synthetic(2600, 200, drift=1.0).samples.sparse
    batches = list(lookups_of(trace, 3, seed=0))
    for i, indices in enumerate(batches):
        by_table = indices.view(26, 40).sort(dim=1).values
        assert torch.equal(by_table, sparse[i * 40 : (i + 1) * 40].T.sort(dim=1).values)
    assert not torch.equal(batches[0].view(26, 40), batches[0].view(26, 40).sort(dim=1).values), "in no order"


def test_tables_can_be_left_out(trace: Trace) -> None:
    names = [table.name for table in trace.tables]
    less = without_tables(trace, ["C3", "C7"])
    assert [table.name for table in less.tables] == [name for name in names if name not in ("C3", "C7")]
    for batch in (0, 64):
        whole, part = (one.split(one.count_lookups(batch, batch + 1)) for one in (trace, less))
        assert all(np.array_equal(part[name], whole[name]) for name in part)
    with pytest.raises(ValueError, match=r"--without C99: there is no such table; there are C1, C2"):
        without_tables(trace, ["C99"])
    with pytest.raises(ValueError, match="leaves no table"):
        without_tables(trace, names)


def test_moves_are_repeated_as_they_were(trace: Trace, run: Run) -> None:
    intervals = [i for i in range(1, 13) if run.moved_rows[i]]
    before = rows_of(run)
    timings, copied = time_moves(run, intervals, rounds=3)
    assert {name: len(timing.samples) for name, timing in timings.items()} == dict.fromkeys(
        ("migrate", "index_copy", "write_alone"), 3
    )
    assert copied == run.moved_rows[intervals].sum() * (4 * 4 + 4)
    # Wherever the rows are now, each is what it was.
    assert all(torch.equal(a, b) for a, b in zip(before, rows_of(run), strict=True))


def rows_of(run: Run) -> list[Tensor]:
    """All rows' weights and optimizer state."""
    overlay = run.overlay
    return [
        overlay.look(place, torch.arange(shard.rows), which)
        for place, shard in enumerate(overlay.shards)
        for which in (0, 1)
    ]


def test_waiting_is_all_of_step_but_what_other_steps_take(run: Run) -> None:
    replans = run.session[EVERY - 1 :: EVERY]
    others = np.delete(run.session, np.arange(EVERY - 1, 65, EVERY))
    assert run.replan_seconds.tolist() == pytest.approx((replans - np.median(others)).tolist())


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "all.csv", tmp_path / "rates.png"
    main([*TINY, "--warmup", "0.2", "--budget", "0.06", "--json", "--csv", str(path), "--plot", str(picture)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(replan.PROVIDERS) <= set(result["hit_rate"]) == set(result["over_time"])
    assert all(0 < rate < 1 for rate in result["hit_rate"].values())
    assert max(result["hit_rate"][name] for name in ("static", "ours")) < result["hit_rate"]["oracle"]
    assert result["hit_rate"]["ours"] > result["hit_rate"]["static"]
    assert result["copy_ratio"] > 0
    assert 0 < result["stall_share"] < 1
    assert result["steps"] == list(range(20, 70, 5))
    assert set(result["replanned_at"]) <= set(result["steps"])
    assert result["rows_moved_a_step"] > 0 < result["rows_moved_a_second"]
    assert result["parameters"]["first_scored_step"] == 16
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["question"] for row in rows] == ["replan.hit_rate"] * 6 + ["replan.stall"] + ["replan.copy"] * 6
    by_provider = {row["provider"]: float(row["p50"]) for row in rows[:6]}
    assert by_provider == pytest.approx(result["hit_rate"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "0"], "--budget 0: give a share above 0 and below 1"),
        (["--warmup", "1"], "--warmup 1: give a share above 0 and below 1"),
        (["--batch", "0"], "--batch 0: give 1 or more"),
        (["--replan-every", "0"], "--replan-every 0: give 1 or more"),
        (["--dim", "6"], "--dim 6: FBGEMM takes multiples of 4"),
        (["--max-stall-share", "1.5"], "give a share from 0 (no limit) to 1"),
        (["--min-gain", "-1"], "--min-gain -1: give a share from 0 to 1"),
        (["--data", "nowhere.parquet"], "--data nowhere.parquet: there is no such file"),
        (["--drift", "2"], "drift is 2.0; give a share of the popular rows from 0 to 1"),
        (["--budget", "0.0001"], "of 1690 rows is none; give more"),
        (
            ["--replan-every", "50"],
            "65 batches are 1 intervals of --replan-every 50, of which 1 come before what counts",
        ),
        (["--without", "C99"], "--without C99: there is no such table"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, "--no-record", *arguments])
    assert said in capsys.readouterr().err + str(stopped.value)
