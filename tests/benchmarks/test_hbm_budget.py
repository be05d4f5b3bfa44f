"""Step time over HBM at toy size on a CPU: the traffic, who is hot, what is counted, and what is kept when cut off."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import prefetch_overlap
from benchmarks.floor import Memories, floor_ms, step_bytes
from benchmarks.hbm_budget import main, parse_arguments
from benchmarks.tbe_exactness import difference
from benchmarks.tbe_providers import Attached, Ours, Whole, build, not_run
from benchmarks.tbe_traffic import Profile, Shape, Traffic
from benchmarks.tbe_turns import Bench, check_room

TOY = ["--tables", "3", "--rows", "2000", "--dim", "8", "--batch", "3000", "--profile", "8"]
FEW = ["--rounds", "2", "--most-rounds", "2", "--steps", "2", "--seconds", "0.1"]
SHAPE = Shape(3, 2000, 8, 3000)
OURS = ("ours", "ours_skip", "ours_skip_sampling")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def memories(tmp_path: Path) -> str:
    path = tmp_path / "memories.json"
    Memories("cpu", "made up", 32, host_read=2e6, host_write=1e6, own=8e6).save(path)
    return str(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row | {key: json.loads(row[key]) for key in ("parameters", "quality")} for row in rows]


def test_what_a_cpu_can_answer(tmp_path: Path, memories: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    result = main([*TOY, *FEW, "--budgets", "0.5", "0.05", "--memories", memories, "--csv", str(path), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    rows = rows_of(path)
    points = [(optimizer, budget) for optimizer in ("rowwise_adagrad", "sgd") for budget in (0.5, 0.05)]
    assert [(row["parameters"]["optimizer"], row["parameters"]["budget"], row["provider"]) for row in rows] == [
        (*point, name) for point in points for name in ("torchrec_fused", *OURS)
    ]
    assert {(row["question"], row["unit"], row["device"]) for row in rows} == {("hbm_budget", "ms", "cpu")}
    by_name = {(row["parameters"]["optimizer"], row["parameters"]["budget"], row["provider"]): row for row in rows}
    for optimizer, budget in points:
        stock = by_name[optimizer, budget, "torchrec_fused"]
        assert stock["quality"]["hit_rate"] == 1.0
        for name in OURS:
            row = by_name[optimizer, budget, name]
            assert row["parameters"]["lookups"] == 3000
            quality = row["quality"]
            assert quality["stock_ms"] == pytest.approx(float(stock["p50"]), rel=1e-4)
            # There is no bus here to be a multiple of.
            assert quality["floor_ms"] is None
            assert quality["floor_multiple"] is None
            assert quality["skipped_share"] == pytest.approx(0.0 if name == "ours" else 0.5, abs=0.06)
            assert quality["own_bytes"] < stock["quality"]["own_bytes"]
        assert by_name[optimizer, budget, "ours"]["quality"]["exact"] is True
        assert by_name[optimizer, budget, "ours"]["quality"]["difference_four_lookups"] < 2.4e-7
    small, large = (by_name["sgd", budget, "ours"]["quality"]["hit_rate"] for budget in (0.05, 0.5))
    assert 0.4 < small < 0.8 < large < 1.0
    assert set(result["not_run"]) == {"adam"} | {
        f"{optimizer}.{name}" for optimizer in ("rowwise_adagrad", "sgd") for name in not_run("cpu")
    }
    assert not any("uvm" in row["provider"] for row in rows)


def test_a_run_that_is_cut_off_keeps_what_it_had(tmp_path: Path, memories: str) -> None:
    path = tmp_path / "all.csv"
    long = ["--rounds", "2", "--most-rounds", "1000000", "--steps", "2", "--seconds", "1000", "--budgets", "0.1", "0.2"]

    def end() -> None:
        time.sleep(6)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(SystemExit) as ended:
        main([*TOY, *long, "--optimizers", "sgd", "--memories", memories, "--csv", str(path)])
    assert ended.value.code == 143
    rows = rows_of(path)
    assert [row["provider"] for row in rows] == ["torchrec_fused", *OURS]
    assert {row["parameters"]["budget"] for row in rows} == {0.1}
    assert min(row["parameters"]["rounds"] for row in rows) > 2
    assert rows[2]["quality"]["skipped_share"] == pytest.approx(0.5, abs=0.06)


def test_nobody_is_run_who_was_left_out(tmp_path: Path, memories: str) -> None:
    path = tmp_path / "all.csv"
    leave_out = ["--leave-out", "torchrec_fused", "ours_skip"]
    arguments = [*TOY, *FEW, "--budgets", "0.1", "--optimizers", "sgd", "--memories", memories, "--csv", str(path)]
    result = main([*arguments, *leave_out])
    rows = rows_of(path)
    assert [row["provider"] for row in rows] == ["ours", "ours_skip_sampling"]
    assert result["not_run"]["sgd.ours_skip"] == "left out by --leave-out"
    assert rows[0]["quality"]["stock_ms"] is None


def test_traffic_follows_the_law_and_never_repeats() -> None:
    traffic = Traffic(SHAPE, "cpu")
    again = Traffic(SHAPE, "cpu")
    first = traffic.batch(5)
    assert first.dtype == torch.int64
    assert torch.equal(first, again.batch(5))
    assert not torch.equal(first, traffic.batch(6))
    counts = Profile(traffic, range(100)).counts.view(3, 2000)
    expected = np.zeros(6000, dtype=np.int64)
    for number in range(100):
        np.add.at(expected, traffic.batch(number).numpy() + np.repeat(np.arange(3) * 2000, 1000), 1)
    np.testing.assert_array_equal(counts.view(-1).numpy(), expected)
    law = np.arange(1, 2001) ** -1.05
    law /= law.sum()
    for table in counts.sort(descending=True).values.numpy():
        np.testing.assert_allclose(table[:20] / 100_000, law[:20], rtol=0.1)
    places = counts.argmax(dim=1)
    assert len(set(places.tolist())) == 3, "a row's place says nothing of its popularity"


def test_the_hottest_rows_are_those_counted_most() -> None:
    profile = Profile(Traffic(SHAPE, "cpu"), range(20))
    numbers = profile.hottest(300)
    assert torch.equal(numbers, numbers.unique())
    cold = torch.ones(6000, dtype=torch.bool)
    cold[numbers] = False
    assert profile.counts[numbers].min() >= profile.counts[cold].max()
    parts = profile.by_table(numbers)
    assert torch.equal(torch.cat([parts[table] + 2000 * table for table in range(3)]), numbers)
    assert all(int(part.min()) >= 0 and int(part.max()) < 2000 for part in parts.values())
    share = float(profile.counts[profile.stale].sum() / profile.counts.sum())
    assert share == pytest.approx(0.5, abs=0.05)


def test_what_is_served_and_the_floor_are_counted_row_by_row(memories: str) -> None:
    args = parse_arguments([*TOY, "--memories", memories])
    bench = Bench(args, "rowwise_adagrad", Memories.load(Path(memories)))
    attached = Attached(build("uvm", SHAPE, "rowwise_adagrad", "cpu"), bench.profile, 200)
    hot = set(bench.profile.hottest(200).tolist())
    ours = Ours(attached, bench.traffic, bench.gradient, "skip")
    live = ours.live()
    assert live is not None
    stale = set(bench.profile.stale.tolist())
    assert set((~live).nonzero().view(-1).tolist()) == stale
    indices = bench.traffic.batch(bench.number)
    rows = (indices + bench.traffic.begins).tolist()
    assert ours.served(indices).tolist() == [row in hot for row in rows]
    ours.step(indices)
    assert int(attached.overlay.hits.sum()) == sum(row in hot for row in rows)
    assert attached.skipped_share("skip") == sum(row in stale for row in rows) / len(rows)
    attached.detach()

    expected = 0.0
    for number in (bench.number, bench.number + 1):
        distinct = set((bench.traffic.batch(number) + bench.traffic.begins).tolist())
        moved = step_bytes(
            cold=len(distinct - hot),
            cold_live=len(distinct - hot - stale),
            hot=len(distinct & hot),
            hot_live=len((distinct & hot) - stale),
            lookups=3000,
            bags=3000,
            dim=8,
            optimizer="rowwise_adagrad",
        )
        expected += floor_ms(bench.memories, moved) / 2
    mask = torch.zeros(6000, dtype=torch.bool)
    mask[list(hot)] = True
    assert bench.floor(mask, live) == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd"])
def test_ours_is_stock_bit_for_bit_with_one_look_up_a_bag(optimizer: str) -> None:
    assert difference("uvm", optimizer, "cpu", dim=8, bag=1) == 0.0
    assert 0.0 < difference("uvm", optimizer, "cpu", dim=8, bag=4) < 2.4e-7


def test_all_or_nothing_is_served_by_whole_tables() -> None:
    traffic = Traffic(SHAPE, "cpu")
    gradient = torch.randn(SHAPE.bags, 24)
    tbe = build("torchrec_fused", SHAPE, "rowwise_adagrad", "cpu")
    indices = traffic.batch(0)
    inside, outside = (Whole(tbe, traffic, gradient, in_own=here) for here in (True, False))
    assert bool(inside.served(indices).all())
    assert not bool(outside.served(indices).any())
    assert inside.own_bytes == 3 * 2000 * (4 * 8 + 4)
    assert outside.own_bytes == 0
    check_room("torchrec_fused", SHAPE, "sgd", "cpu", (), 0.0)  # a CPU's room is the system's affair


def test_budgets_are_shares() -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--budgets", "0.1", "10"])


def test_prefetch_is_listed_as_not_run_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    result = prefetch_overlap.main(["--csv", str(path)])
    assert set(result["not_run"]) == {"uvm_caching_lru", "ours_caching"}
    assert all("CUDA only" in why for why in result["not_run"].values())
    assert not path.exists()
