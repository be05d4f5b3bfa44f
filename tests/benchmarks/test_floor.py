"""The floor: its bytes by hand, and bandwidths that are those of what was moved."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks.floor import Memories, StepBytes, buffers, floor_ms, main, measure, step_bytes
from benchmarks.harness import COLUMNS

TINY = ["--row-bytes", "64", "256", "--buffer-bytes", "1048576", "--moved-bytes", "65536", "--rounds", "3"]
STEP = {"cold": 7, "cold_live": 5, "hot": 11, "hot_live": 3, "lookups": 40, "bags": 20, "dim": 8}


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        # A row of weights is 32 bytes; 20 outputs with their gradients 1,280; 40 indices 320.
        ("sgd", StepBytes(7 * 32, 5 * 32, (11 + 3) * 32 + 1280 + 320)),
        # Four bytes a live row, read and written, in HBM wherever the row is.
        ("rowwise_adagrad", StepBytes(7 * 32, 5 * 32, (11 + 3) * 32 + 2 * 4 * 8 + 1280 + 320)),
        # Two moments as large as the weights, where the row is, of live rows alone.
        ("adam", StepBytes(7 * 32 + 5 * 64, 5 * 96, (11 + 3) * 32 + 2 * 3 * 64 + 1280 + 320)),
    ],
)
def test_bytes_of_a_step(optimizer: str, expected: StepBytes) -> None:
    assert step_bytes(**STEP, optimizer=optimizer) == expected


def test_the_floor_adds_up_at_the_best_bandwidths() -> None:
    memories = Memories("cuda", "a GPU", 512, host_read=10.0, host_write=5.0, own=100.0)
    assert floor_ms(memories, StepBytes(host_read=200, host_write=50, own=1000)) == pytest.approx(20 + 10 + 10)


def test_bandwidths_are_bytes_over_time() -> None:
    held = buffers("cpu", 1 << 22)
    memories, speeds = measure("cpu", 256, held, moved_bytes=1 << 20, rounds=3)
    assert set(speeds) == {"read_rows_own", "write_rows_own", "copy_own"}
    assert {len(one.samples) for one in speeds.values()} == {3}
    # Of a memory in bytes a millisecond: from an old laptop's to a cache's.
    assert all(1e4 < sample < 1e9 for one in speeds.values() for sample in one.samples)
    assert memories.own == max(one.p50 for one in speeds.values())
    assert memories.host_read == memories.host_write == memories.own
    assert memories.device == "cpu"
    assert bool(torch.all(held["own"] == 1.0)), "what was read was written back"


@pytest.mark.parametrize(("row_bytes", "moved"), [(2, 1024), (6, 1024), (64, 32), (64, 4096)])
def test_sizes_that_cannot_be_are_refused(row_bytes: int, moved: int) -> None:
    with pytest.raises(ValueError, match=f"row_bytes={row_bytes}, moved_bytes={moved}, buffers of 4096"):
        measure("cpu", row_bytes, buffers("cpu", 4096), moved_bytes=moved, rounds=1)


def test_rows_and_a_file_for_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "all.csv", tmp_path / "memories.json"
    result = main([*TINY, "--csv", str(path), "--out", str(out), "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == result
    assert "no GPU: one memory is measured, no bus" in printed.err
    memories = Memories.load(out)
    assert memories.row_bytes == 64, "the first of --row-bytes"
    assert result["best"]["own"] == memories.own
    rows = list(csv.DictReader(path.open(newline="")))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["question"], row["provider"], row["unit"]) for row in rows] == [
        ("floor", name, "GB/s") for _ in (64, 256) for name in ("read_rows_own", "write_rows_own", "copy_own")
    ]
    assert [json.loads(row["parameters"])["row_bytes"] for row in rows] == [64] * 3 + [256] * 3
    assert float(rows[2]["p50"]) == pytest.approx(result["gigabytes_a_second"]["64"]["copy_own"], rel=1e-4)
