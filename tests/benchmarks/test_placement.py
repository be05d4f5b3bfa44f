"""The placement benchmark, tiny: its traces, its policies, and what it reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.placement import POLICIES, Comparison, _deal_sets, main
from benchmarks.policies import TorchRecScaleup, densest, profile_of, uniform
from benchmarks.traces import Production, Trace, make_production, read_trace

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
TINY = Production(tables=12, largest=20_000, pooling=(1.0, 20.0), batch_size=1024, batches=40, sample=4)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_production(TINY)


def write_events(path: Path, columns: dict[str, list[int | None]]) -> Path:
    pq.write_table(pa.table({name: pa.array(values, pa.int64()) for name, values in columns.items()}), path)
    return path


def test_a_file_becomes_requests_with_their_lookups(tmp_path: Path) -> None:
    names = ("user", "session", "product", "subcat", "cat", "brand", "etype")
    columns: dict[str, list[int | None]] = {name: [5, 5, None, 7, 5, 9, 5] for name in names}
    path = write_events(tmp_path / "events.parquet", columns)
    trace = read_trace(path, batch_size=3, dim=8, headroom=2.0)
    assert [(table.name, table.rows, table.row_bytes) for table in trace.tables] == [(name, 8, 36) for name in names]
    assert trace.total_bytes == 7 * 8 * 36
    # Six of the seven samples fill two batches: 5 5 null, and 7 5 9.
    assert np.diff(trace.batches).tolist() == [7 * 2, 7 * 3]
    first = trace.split(trace.count_lookups(0, 1))["user"]
    second = trace.split(trace.count_lookups(1, 2))["user"]
    assert sorted(first.tolist()) == [0] * 6 + [1, 2]
    assert sorted(second.tolist()) == [0] * 5 + [1] * 3
    assert second[first == 2].tolist() == [1], "the same id is the same row in both"
    assert trace.split(trace.count_batches(0, 2))["user"][first == 2].tolist() == [2]
    shuffled = read_trace(path, batch_size=3, dim=8, headroom=2.0, shuffle=True, seed=3)
    assert shuffled.lookups.sum() == trace.lookups.sum() == 6 * 7


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lacks the columns brand, cat, etype, product, session, subcat; give a"):
        read_trace(write_events(tmp_path / "other.parquet", {"user": [1]}), batch_size=1, dim=4)


def test_production_traffic_is_what_its_sizes_say(trace: Trace) -> None:
    assert len(trace.tables) == 12
    assert len(trace.batches) == 41
    assert trace.about.startswith("synthetic: 12 tables of 100 to 20000 rows")
    for begin, end in zip(trace.batches[:-1], trace.batches[1:], strict=True):
        assert (np.diff(trace.rows[begin:end]) > 0).all(), "distinct rows, ascending"
    counts = trace.count_lookups(0, 40)
    assert (trace.lookups > 0).all()
    assert counts.sum() == trace.lookups.sum()
    # No drift: both halves are drawn alike.
    early, late = trace.count_lookups(0, 20), trace.count_lookups(20, 40)
    popular = counts > 200
    assert popular.sum() > 20
    assert np.abs(early[popular] / counts[popular] - 0.5).mean() < 0.03
    again = make_production(TINY)
    assert np.array_equal(again.rows, trace.rows)
    assert np.array_equal(late, again.count_lookups(20, 40))


def test_a_production_model_s_lookups_are_those_that_were_asked_for() -> None:
    whole = make_production(
        Production(tables=5, largest=5000, pooling=(2.0, 2.0), batch_size=1000, batches=10, sample=1)
    )
    lookups = [whole.split(whole.count_lookups(0, 10))[table.name].sum() for table in whole.tables]
    assert lookups == pytest.approx([20_000] * 5, rel=0.05)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_policies_spend_the_budget_and_no_more(trace: Trace, share: float) -> None:
    budget = int(share * trace.total_bytes)
    profile = profile_of(trace, 0, 20)
    row_bytes = trace.row_bytes
    largest = max(table.row_bytes for table in trace.tables)
    placed = {
        "ours": densest(trace, trace.count_lookups(0, 20), budget),
        "uniform": uniform(trace, profile, budget),
        "scaleup": TorchRecScaleup(trace, profile).hot_rows(budget),
    }
    for name, hot in placed.items():
        spent = int(row_bytes[hot].sum())
        assert spent <= budget, name
        # TorchRec rounds load factors to float32, and promotes at 0.9999.
        slack = largest if name == "ours" else len(trace.tables) * largest + trace.total_bytes // 1000
        assert spent >= budget - slack, name
    sets = _deal_sets(trace, share, budget)
    spent = sum(number * 32 * (4 * dim + 4) for dim, number in sets.items())
    assert budget - 32 * 6 * largest <= spent <= budget


def test_torchrec_gives_more_to_tables_that_are_looked_up_more(trace: Trace) -> None:
    factors = TorchRecScaleup(trace, profile_of(trace, 0, 20)).load_factors(trace.total_bytes // 10)
    assert set(factors) == {table.name for table in trace.tables}
    assert len(set(factors.values())) > 6
    assert all(0 <= factor <= 1 for factor in factors.values())


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_bounds_hold_and_ours_is_near_the_best(trace: Trace, share: float) -> None:
    found = Comparison(trace, 20).rates(share)
    for metric, rates in found.items():
        assert tuple(rates) == POLICIES
        assert max(rates.values()) == rates["belady"] <= 1 + 1e-9, metric
        fixed = ("ours", "ours_counts", "torchrec_scaleup", "uniform")
        # But for the last row, which does not fit.
        assert max(rates[name] for name in fixed) <= rates["static_best"] + 1e-4, metric
    rates = found["budget"]
    assert rates["ours"] >= 0.95 * rates["static_best"]
    assert rates["ours"] >= max(rates["torchrec_scaleup"], rates["uniform"])


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    options = [
        "--data",
        "production",
        "--tables",
        "8",
        "--batches",
        "6",
        "--sample",
        "4096",
        "--budgets",
        "0.05",
        "0.25",
    ]
    main([*options, "--json", "--csv", str(path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["budget"]) == set(result["requests"]) == {"0.05", "0.25"}
    assert set(result["budget"]["0.05"]) == set(POLICIES)
    assert (
        result["of_static_best"]["0.25"] == result["budget"]["0.25"]["ours"] / result["budget"]["0.25"]["static_best"]
    )
    rows = list(csv.DictReader(path.open(newline="")))
    assert len(rows) == 2 * 2 * len(POLICIES)
    assert {row["question"] for row in rows} == {"placement.hit_rate", "placement.hit_rate_requests"}
    (row,) = [
        row
        for row in rows
        if row["provider"] == "ours"
        and row["question"] == "placement.hit_rate"
        and json.loads(row["parameters"])["budget"] == 0.25
    ]
    assert float(row["p50"]) == pytest.approx(result["budget"]["0.25"]["ours"], rel=1e-4)


def test_scale_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--scale", "--tables", "20", "--rows", "1000000", "--json", "--csv", str(tmp_path / "all.csv")])
    scale = json.loads(capsys.readouterr().out.splitlines()[-1])["scale"]
    assert scale["rows"] == 1_000_000
    assert 50_000 < scale["hot_rows"] < 1_000_000
    assert 0 < scale["seconds"] < 6
    assert scale["peak_gib"] > 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("name", ["criteo_tb_80k", "rees46_events_242k"])
def test_ours_is_at_least_torchrec_s_on_real_traffic(name: str) -> None:
    trace = read_trace(SHARED / f"{name}.parquet", batch_size=2048, dim=64)
    first = (len(trace.batches) - 1) // 2
    comparison = Comparison(trace, first)
    worth = comparison.worth["budget"]
    for share in (0.01, 0.05, 0.1, 0.25):
        budget = int(share * trace.total_bytes)
        ours = worth[densest(trace, comparison.counts, budget, comparison.values)].sum()
        assert ours >= worth[comparison.scaleup.hot_rows(budget)].sum(), share
