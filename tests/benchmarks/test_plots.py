"""The figures: which rows are drawn, that each is made, and that a provider is told from its neighbours."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from benchmarks import drawing, harness, plots
from benchmarks.harness import Row, Timing, record
from benchmarks.plots import QUESTIONS, choose, read, small_print

DATA = {"synthetic": 2.0, "x/day.parquet": 1.0}
BUDGET = {"rows": 100, "dim": 8, "optimizer": "sgd", "budget": 0.1, "rounds": 5}


def row(question: str, provider: str, p50: float, parameters: Mapping[str, Any], device: str = "cpu", **q: Any) -> Row:
    return Row(question, provider, parameters, Timing((0.9 * p50, p50, 1.2 * p50)), "ms", q, device)


def write(path: Path, rows: list[Row], day: int = 1, **columns: str) -> Path:
    """Record rows, as if on that day and with those columns."""
    record([one for one in rows if one.device == "cpu"], path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines[len(lines) - len(rows) :]:
        line |= {"date": f"2026-01-{day:02d}T00:00:00+00:00", "commit": f"c{day}", **columns}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, harness.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


def chosen(path: Path, question: str) -> dict[tuple[str, Any], float]:
    """p50 by provider and budget (or share)."""
    found = choose(read(path), QUESTIONS[question])
    result = {(one.provider, one.parameters.get("budget", one.parameters.get("share"))): one.p50 for one in found}
    assert len(result) == len(found)
    return result


def test_the_newest_row_of_a_provider_and_point_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    write(path, [row("hbm_budget", "ours", 9.0, BUDGET), row("hbm_budget", "uvm", 8.0, BUDGET)], day=2)
    # Standing last in the file does not make it newest; another number of rounds does not make it another point.
    write(path, [row("hbm_budget", "ours", 5.0, BUDGET | {"rounds": 40})], day=3)
    write(path, [row("hbm_budget", "ours", 7.0, BUDGET), row("hbm_budget", "ours", 6.0, BUDGET | {"budget": 0.5})])
    assert chosen(path, "hbm_budget") == {("ours", 0.1): 5.0, ("ours", 0.5): 6.0, ("uvm", 0.1): 8.0}


def test_of_rows_as_old_the_later_is_the_newer(tmp_path: Path) -> None:
    path = write(tmp_path / "all.csv", [row("hbm_budget", "ours", 9.0, BUDGET), row("hbm_budget", "ours", 5.0, BUDGET)])
    assert chosen(path, "hbm_budget") == {("ours", 0.1): 5.0}


@pytest.mark.parametrize("other", [{"rows": 999}, {"new": 1}])
def test_rows_of_other_parameters_are_not_drawn(tmp_path: Path, other: dict[str, int]) -> None:
    path = tmp_path / "all.csv"
    write(path, [row("hbm_budget", "uvm", 8.0, BUDGET | other)], day=1)
    write(path, [row("hbm_budget", "ours", 5.0, BUDGET)], day=2)
    assert chosen(path, "hbm_budget") == {("ours", 0.1): 5.0}


@pytest.mark.parametrize("column", ["processor", "torch", "fbgemm", "torchrec", "threads"])
def test_rows_of_other_machines_and_versions_are_not_drawn(tmp_path: Path, column: str) -> None:
    path = tmp_path / "all.csv"
    write(path, [row("hbm_budget", "uvm", 8.0, BUDGET)], day=1, **{column: "another"})
    write(path, [row("hbm_budget", "ours", 5.0, BUDGET)], day=2)
    assert chosen(path, "hbm_budget") == {("ours", 0.1): 5.0}


def test_a_panel_has_its_own_sizes_but_one_of_them(tmp_path: Path) -> None:
    common = {"about": "a", "batch": 4, "seed": 0, "budget": 0.1}
    path = tmp_path / "all.csv"
    write(path, [row("placement.hit_rate", "lfu", 0.1, common | {"batch": 9})], day=1)  # older, of another batch
    write(path, [row("placement.hit_rate", "lfu", 0.2, common | {"about": "c", "seed": 7})], day=2)  # another seed
    write(path, [row("placement.hit_rate", "lru", 0.3, common)], day=3)
    write(path, [row("placement.hit_rate", "ours", 0.4, common | {"about": "b", "batch": 5})], day=4)
    assert chosen(path, "placement.hit_rate") == {("lru", 0.1): 0.3, ("ours", 0.1): 0.4}


def test_aucs_are_compared_within_a_run(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    found = {"configuration": "kaggle", "rounds": 25}
    write(path, [row("throughput", name, 1.0, found, auc=0.7) for name in ("torchrec_fused", "xdl")])
    later = found | {"rounds": 31}
    rows = {"torchrec_fused": 0.75, "ours": 0.74}
    write(path, [row("throughput", name, 1.0, later, auc=auc) for name, auc in rows.items()], day=2)
    deltas = {one.provider: one.quality["auc_delta"] for one in choose(read(path), QUESTIONS["throughput"])}
    assert deltas == pytest.approx({"torchrec_fused": 0.0, "xdl": 0.0, "ours": -0.01})


def test_curves_over_time_are_of_one_run(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    names = ("torchrec_fused", "ours", "ours_tail")
    write(path, [row("time_to_auc", name, 1.0, {"seeds": 3}) for name in names], day=1)
    write(path, [row("time_to_auc", name, 2.0, {"seeds": 3}) for name in names[:2]], day=2)
    assert chosen(path, "time_to_auc") == {("torchrec_fused", None): 2.0, ("ours", None): 2.0}


def test_made_up_data_is_for_where_there_is_no_other(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    rows = {data: row("convergence", "ours", p50, {"data": data, "share": 0.5}) for data, p50 in DATA.items()}
    write(path, [rows["synthetic"]], day=1)
    assert chosen(path, "convergence") == {("ours", 0.5): 2.0}
    write(path, [rows["x/day.parquet"]], day=2)
    write(path, [rows["synthetic"]], day=3)
    assert chosen(path, "convergence") == {("ours", 0.5): 1.0}


def test_small_print(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    for day in (1, 2, 3):
        write(path, [row("hbm_budget", f"p{day}", 1.0, BUDGET | {"budget": day / 10, "rows": 100_000})], day=day)
    text = small_print(choose(read(path), QUESTIONS["hbm_budget"])).replace("\n", " ")  # as it is wrapped
    for part in (
        "cpu: ",
        "1 thread;",
        "torch 2",
        "commit c3, c2 and 1 more",
        "2026-01-01 to 2026-01-03",
        "rows 100,000",
    ):
        assert part in text
    assert "budget" not in text  # which differs


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Two or more points of every question."""
    rows = []
    for name in ("speedup", "speedup_popular", "speedup_sampling"):
        for dim in (8, 16):
            rows.append(row(f"update_filter.{name}", "stock", 2.0, {"dim": dim}))
            for share in (0.5, 0.9):
                found = {"dim": dim, "share": share}
                rows.append(row(f"update_filter.{name}", f"filter {share}", 1.0, found, speedup=2.0))
    overhead = {"dim": 8, "count_every": 4}
    rows += [row("update_filter.overhead_at_0", name, 2.0, overhead) for name in ("stock", "session")]
    for name in ("torchrec_fused", "ours", "never heard of"):
        for budget in (0.0, 0.1, 0.5):
            found = BUDGET | {"budget": budget}
            rows.append(row("hbm_budget", name, 1.0, found, hit_rate=0.5, floor_ms=0.7 if budget else None))
        runs = [{"share": share, "seeds": 2} for share in (0.3, 0.5)]
        rows += [row("convergence", name, 0.0, found, auc_delta=0.1, auc_delta_sd=0.1) for found in runs]
        losses = {"logloss_delta": 0.1, "logloss_delta_sd": 0.1}
        rows += [row("inputs", name, 0.0, found, auc_delta=0.1, auc_delta_sd=0.1, **losses) for found in runs]
        configurations = [{"configuration": one} for one in ("kaggle", "avazu")]
        rows += [row("throughput", name, 1.0, found, speedup=1.5, auc=0.7) for found in configurations]
        curves = [[[1.0, 0.6], [2.0, 0.7]], [[1.1, 0.65], [2.0, 0.72]]]
        rows.append(row("time_to_auc", name, 2.0, {"seeds": 2, "below": 0.001}, curves=curves))
        for size in (1000, 10_000):
            for tables in (4, 8):
                rows.append(row("planning", name, 1.0, {"rows": size, "tables": tables}))
                rows.append(row("memory", name, 1e6, {"rows": size, "dim": tables}, bytes_per_row=9.0))
        for ranks in (1, 2):
            found = {"ranks": ranks, "sharding": "row_wise"}
            rows.append(row("ranks", name, 1.0, found, samples_per_second=10.0, cores=1, enough_cores=ranks < 2))
            rows.append(row("projection", name, 1.0, {"devices": 8 * ranks, "data": "production", "tables": 3}))
        for budget in (0.01, 0.1):
            rows.append(row("placement.hit_rate", name, 0.5, {"about": "x.parquet, file order", "budget": budget}))
            rows.append(row("replan.hit_rate", name, 0.5, {"about": "x, without a, b", "budget": budget}))
        rows.append(row("profiler", name, 1.0, {"hot_share": 0.01}, ratio=1.1, recall=0.9))
    return write(tmp_path / "all.csv", rows)


def test_every_question_is_drawn(toy: Path, tmp_path: Path) -> None:
    """The slowest: all figures, once."""
    made = plots.main(["--csv", str(toy), "--out", str(tmp_path / "out")])
    assert sorted(one.stem for one in made) == sorted(name.replace(".", "_") for name in QUESTIONS)
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 80_000


def test_a_figure_a_device_and_questions_without_rows_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path / "all.csv", [row("profiler", "exact", 1.0, {"hot_share": 0.1}, ratio=1.1, recall=0.9)], day=1
    )
    write(path, [row("profiler", "exact", 1.0, {"hot_share": 0.1}, ratio=1.1, recall=0.9)], day=2, device="cuda")
    made = plots.main(["--csv", str(path), "--out", str(tmp_path), "--only", "profiler", "ranks"])
    assert [one.name for one in made] == ["profiler.png", "profiler_cuda.png"]
    assert f"ranks: skipped, {path} has no rows of it" in capsys.readouterr().out
    again = [one.read_bytes() for one in made]
    assert again[0] != again[1]  # the small print says which is which
    plots.main(["--csv", str(path), "--out", str(tmp_path), "--only", "profiler"])
    assert [one.read_bytes() for one in made] == again


def test_another_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match=r"other\.csv has the header"):
        plots.main(["--csv", str(path), "--out", str(tmp_path)])


def test_all_recorded_providers_have_a_style_and_neighbours_differ() -> None:
    records = read(harness.CSV)
    for name, question in QUESTIONS.items():
        if name == "update_filter":  # its curves are not providers
            continue
        providers = {one.provider for one in choose(records, question)}
        assert providers <= drawing.STYLES.keys()
        for a, b in combinations(sorted(providers), 2):
            assert drawing.STYLES[a] != drawing.STYLES[b], f"{a} and {b} look alike in {name}"
            if name in ("throughput", "replan.hit_rate", "memory"):  # of bars, which have no markers
                assert drawing.STYLES[a][0] != drawing.STYLES[b][0], f"{a} and {b} look alike in {name}"
