"""The profiler's benchmark, tiny: what it reports and records, and that what it measures is what it says."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import Timing
from benchmarks.profiler import COUNTERS, main, recall, weighted_median

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--tables", "3", "--rows", "2000", "--dim", "8", "--batch", "64", "--batches", "6", "--rounds", "24"]
TINY += ["--warmup", "2", "--steps", "40", "--every", "4", "--sketch-rows", "768"]


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    command = [sys.executable, "-m", "benchmarks.profiler", *TINY, "--json", "--csv", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for key in ("ratio", "counted_step", "recall", "recall_lookups", "bytes_per_row"):
        assert set(result[key]) == set(COUNTERS)
        assert all(value > 0 for value in result[key].values())
    # All steps are counted exactly, so all hot rows are found; a sample of ten steps misses some.
    assert result["recall"]["exact"] == result["recall_lookups"]["exact"] == 1.0
    for counter in ("sampled", "sketch"):
        assert 0.3 < result["recall"][counter] <= 1.0
        assert 0.7 < result["recall_lookups"][counter] <= 1.0
    assert result["bytes_per_row"]["exact"] == result["bytes_per_row"]["sampled"] == 4.0
    assert result["bytes_per_row"]["sketch"] == pytest.approx(result["sketch_bytes"] / 2000)
    assert 1024 * 18 < result["sketch_bytes"] <= 1024 * 18 + 768 * 32
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["question"], row["provider"]) for row in rows] == [("profiler", name) for name in ("off", *COUNTERS)]
    assert json.loads(rows[1]["quality"])["recall"] == 1.0
    assert json.loads(rows[2]["quality"])["ratio"] == result["ratio"]["sampled"]
    parameters = json.loads(rows[3]["parameters"])
    assert (parameters["every"], parameters["sketch_rows"], parameters["rounds"]) == (4, 768, 24)


def test_without_datasketches_the_sketch_is_listed_as_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.profiler.find_spec", lambda name: None)
    result = main([*TINY, "--rounds", "4", "--counters", "exact", "sketch", "--no-record"])
    assert result["not_run"] == {"sketch": "needs datasketches"}
    assert set(result["recall"]) == {"exact"}
    assert "not run: sketch: needs datasketches" in capsys.readouterr().out


def test_no_record_leaves_the_csv_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    main([*TINY, "--rounds", "4", "--no-record", "--csv", str(path)])
    assert not path.exists()
    assert "hottest 1% of the rows found after 40 steps" in capsys.readouterr().out


def test_recall() -> None:
    true = np.array([9, 5, 5, 1, 0])
    assert recall(true, true, 2) == (1.0, 1.0)
    assert recall(true, np.array([9, 0, 5, 1, 0]), 2) == (1.0, 1.0), "a tie with the least hot row is as hot"
    assert recall(true, np.array([0, 0, 0, 7, 8]), 2) == (0.0, 1 / 14)
    assert recall(true, np.array([3, 0, 0, 2, 1]), 2) == (0.5, 10 / 14)


def test_counted_steps_are_charged_by_their_share() -> None:
    timing = Timing((1.0, 1.0, 5.0, 1.0, 7.0, 1.0))
    counted = [False, False, True, False, True, False]
    assert weighted_median(timing, counted, 0.25) == (0.25 * 6.0 + 0.75 * 1.0, 6.0)
    assert weighted_median(Timing((2.0, 4.0)), [True, True], 1.0) == (3.0, 3.0)
