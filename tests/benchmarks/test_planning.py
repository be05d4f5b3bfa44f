"""The planning benchmark, tiny: what it reports and records, and that plans are made apart and from equal inputs."""

from __future__ import annotations

import csv
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torchrec.distributed.types import CacheParams

from benchmarks import harness
from benchmarks.forks import in_a_fork
from benchmarks.planning import PROVIDERS, main
from benchmarks.problems import Problem, Shape, cached_share, make_profile

TINY = ["--samples", "2e4", "--devices", "2", "--dim", "16", "--batch", "32", "--rounds", "1"]
TINY += ["--budget", "0.5"]


def _grow(size: int) -> int:
    before = harness.peak_bytes()
    held = np.ones(size, dtype=np.uint8)
    return harness.peak_bytes() - before if held.all() else 0


def _fail() -> None:
    raise ValueError("no room\nat all")


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    main([*TINY, "--rows", "4e4", "1e5", "--tables", "3", "4", "--json", "--csv", str(path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = ["40,000 x 3", "100,000 x 3", "40,000 x 4"]
    assert result["not_run"] == {}
    for key in ("seconds", "peak_bytes", "predicted_hit_rate"):
        assert list(result[key]) == sizes
        assert all(set(by_provider) == set(PROVIDERS) for by_provider in result[key].values())
    assert all(0.0 < seconds < 120.0 for one in result["seconds"].values() for seconds in one.values())
    assert all(0.0 < rate <= 1.0 for one in result["predicted_hit_rate"].values() for rate in one.values())
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["question"], row["provider"], row["unit"]) for row in rows] == [
        ("planning", name, "s") for _ in sizes for name in PROVIDERS
    ]
    assert [json.loads(row["parameters"])["rows"] for row in rows[::3]] == [40_000, 100_000, 40_000]
    assert set(json.loads(rows[0]["quality"])) == {"peak_bytes", "predicted_hit_rate"}


def test_what_has_no_plan_is_said_and_not_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    options = [*TINY, "--rows", "4e4", "--tables", "3", "--providers", "ours", "torchrec", "--limit", "0.001"]
    result = main([*options, "--csv", str(path)])
    assert result["seconds"] == {}
    assert result["not_run"] == {"40,000 x 3": dict.fromkeys(("ours", "torchrec"), "not done within 0.001 s")}
    assert "not done within 0.001 s" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 1, "the header alone"


def test_a_fork_says_what_it_took_and_what_went_wrong() -> None:
    grown = in_a_fork(partial(_grow, 96 << 20), 30.0)
    assert isinstance(grown, int)
    assert 90 << 20 < grown < 120 << 20
    assert in_a_fork(_fail, 30.0) == "ValueError: no room"
    began = time.perf_counter()
    assert in_a_fork(partial(time.sleep, 60.0), 0.2) == "not done within 0.2 s"
    assert time.perf_counter() - began < 20.0


def test_a_profile_has_the_look_ups_that_were_asked_for_and_popular_rows_everywhere() -> None:
    (table,) = make_profile([Shape(10_000, 16, exponent=1.2, pooling=3.0)], 50_000, seed=0).tables.values()
    assert table.lookups == pytest.approx(150_000, rel=0.01)
    assert table.row_bytes == 16 * 4 + 4
    halves = table.counts[:5000].sum(), table.counts[5000:].sum()
    top = table.top_rows(100)
    assert 30 < (top < 5000).sum() < 70, halves
    assert table.hit_rate(100) > 0.3


def test_providers_get_one_topology_and_a_budget_besides_inputs_and_outputs() -> None:
    shapes = [Shape(1000, 16), Shape(3000, 32, pooling=2.0)]
    problem = Problem(shapes, make_profile(shapes, 1000, 0), devices=4, batch=8, budget=0.5)
    assert problem.hbm == (1000 * 68 + 3000 * 132) // 2 // 4
    by_row = 8 * 4 * (4 * 16 + 8) + 8 * 4 * (4 * 32 + 16)
    assert {one.storage.hbm for one in problem.topology().devices} == {problem.hbm + by_row}
    assert problem.with_hbm(7).topology().devices[0].storage.hbm == 7 + by_row
    for provider in PROVIDERS:
        devices = problem.planner(provider)._topology.devices
        assert [one.storage for one in devices] == [one.storage for one in problem.topology().devices]


def test_the_share_that_a_torchrec_plan_holds() -> None:
    assert cached_share("fused", None) == cached_share("dense", None) == 1.0
    assert cached_share("fused_uvm", None) == 0.0
    assert cached_share("fused_uvm_caching", None) == cached_share("fused_uvm_caching", CacheParams()) == 0.2
    assert cached_share("fused_uvm_caching", CacheParams(load_factor=0.03)) == 0.03
