"""The projection, tiny: everything says that it is one, and plans are rated by one model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from torchrec.distributed.planner.types import ShardingOption

from benchmarks.problems import SHARDERS, Problem, Shape, make_profile
from benchmarks.projection import PROVIDERS, main, production_shapes, project_ours, project_torchrec, rate
from benchmarks.traces import Production, make_production
from torchrec_slipstream.placement.calibration import Bandwidths

SHAPES = [Shape(20_000, 32), Shape(50_000, 64, 1.2, pooling=3.0), Shape(30_000, 32, 0.8)]


def problem_of(hbm: int, devices: int = 2, **more: float) -> Problem:
    profile = make_profile(SHAPES, 100_000, seed=0)
    return Problem(SHAPES, profile, devices=devices, batch=256, hbm=hbm, bandwidths=more, room_by_row=False)


def test_every_line_and_row_is_marked_as_a_projection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    speeds = tmp_path / "speeds.json"
    Bandwidths(hbm_mem_bw=2e9, hbm_to_ddr_mem_bw=5e7, row_bytes=256, threads=1, machine="a GPU").save(speeds)
    options = [
        "--data",
        "terabyte",
        "--max-rows",
        "20000",
        "--devices",
        "2",
        "4",
        "--samples",
        "20000",
        "--batch",
        "64",
    ]
    main([*options, "--budget", "0.3", "--bandwidths", str(speeds), "--json", "--csv", str(path)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("PROJECTION  ") for line in lines)
    result = json.loads(last)
    assert result["projection"] is True
    assert result["topology"]["2"]["gb_per_s"]["hbm_to_ddr_mem_bw"] == 50.0
    source = "measured on a GPU: hbm_mem_bw, hbm_to_ddr_mem_bw; assumed, TorchRec's constants: the others"
    assert result["topology"]["2"]["bandwidths_from"] == source
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["question"], row["provider"], row["unit"]) for row in rows] == [
        ("projection", name, "ms") for _ in (2, 4) for name in PROVIDERS
    ]
    for row in rows:
        devices = str(json.loads(row["parameters"])["devices"])
        quality = json.loads(row["quality"])
        assert quality["projection"] is True
        assert quality["bandwidths_from"] == source
        assert float(row["p50"]) == pytest.approx(result["projected_ms"][devices][row["provider"]], rel=1e-5)


def test_a_plan_that_holds_everything_waits_for_no_bus() -> None:
    whole = sum(shape.bytes for shape in SHAPES)
    ours, theirs = project_ours(problem_of(2 * whole)), project_torchrec(problem_of(2 * whole))
    assert ours.cold_rows == theirs.cold_rows == 0
    assert ours.predicted_hit_rate == theirs.predicted_hit_rate == 1.0
    slow = project_ours(problem_of(2 * whole, hbm_to_ddr_mem_bw=1e5))
    assert slow.projected_ms == ours.projected_ms


def test_less_memory_and_slower_buses_cost_time() -> None:
    small = sum(shape.bytes for shape in SHAPES) // 10
    for project in (project_ours, project_torchrec):
        found = project(problem_of(small))
        assert found.cold_rows > 0
        assert 0 < found.predicted_hit_rate < 1
        slower = project(problem_of(small, hbm_to_ddr_mem_bw=1e6))
        assert slower.projected_ms > 2 * found.projected_ms
        assert found.pinned_ms <= found.projected_ms, "what is looked up most is the best to hold"


def test_torchrec_s_plans_are_rated_as_ours_are() -> None:
    # Ours with FBGEMM's cache is a TorchRec plan: its caches filled with the most looked-up rows, rated as TorchRec's.
    problem = problem_of(sum(shape.bytes for shape in SHAPES) // 10)
    chosen: list[ShardingOption] = []
    planner = problem.planner("ours", callbacks=[lambda options: chosen.extend(options) or options])
    planner.plan(problem.model, SHARDERS)
    milliseconds, cold_rows, taken = rate(problem, chosen, "static")
    assert milliseconds == pytest.approx(planner.placement.expected_ms, rel=0.02)
    assert cold_rows == pytest.approx(sum(shard.misses for shard in planner.placement.shards), rel=0.02)
    assert 0.8 < taken <= 1.0


def test_production_shapes_are_those_of_the_traces() -> None:
    sizes = Production(tables=7, largest=5000, sample=1, batches=1, batch_size=8, seed=3)
    trace = make_production(sizes)
    shapes = production_shapes(sizes)
    assert [(one.rows, one.dim) for one in shapes] == [(table.rows, table.dim) for table in trace.tables]
    assert all(0.6 <= one.exponent <= 1.4 and 0.5 <= one.pooling <= 20.0 for one in shapes)
    assert np.unique([one.pooling for one in shapes]).size == 7
