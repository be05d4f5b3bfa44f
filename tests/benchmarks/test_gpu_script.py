"""benchmarks/gpu.sh: no part stops another, the summary says what became of each, and on a CPU all of them run."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    "smoke",
    "floor",
    "rowwise",
    "adam",
    "tests",
    "prefetch",
    "sgd",
    "update_filter",
    "throughput",
    "inputs",
    "profiler",
)


def run(out: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, **settings}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    lines = done.stdout.partition("=== summary")[2].splitlines()[1:]
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def a_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_one_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", PYTHON=a_python(tmp_path, "exit 3"))
    assert done.returncode == 1
    said = summary(done)
    assert tuple(said) == PARTS
    assert said.pop("tests") == "not run, see the log"
    assert all(one.startswith("FAILED (exit status 3)") for one in said.values()), said
    assert (tmp_path / "gpu.log").read_text() == done.stdout


def test_a_part_that_takes_too_long_is_cut_off(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", PYTHON=a_python(tmp_path, "sleep 100"), ONLY="floor", SECONDS_LEFT="50")
    assert done.returncode == 0
    assert re.fullmatch(r"CUT OFF after [5-9] s", summary(done)["floor"]), "5 s, and what a busy machine adds"


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", SECONDS_LEFT="4")
    assert done.returncode == 0
    assert all(one.startswith("not started") for one in summary(done).values())


def test_another_device_is_refused(tmp_path: Path) -> None:
    for arguments in (("--device", "tpu"), ("--fast",)):
        done = run(tmp_path, *arguments)
        assert done.returncode == 2
        assert arguments[-1] in done.stderr


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    done = run(tmp_path, "--device", "cpu", SECONDS_LEFT="280")
    assert done.returncode == 0, done.stdout
    assert {name: one.split(",")[0] for name, one in summary(done).items() if name in PARTS} == dict.fromkeys(
        PARTS, "ran"
    )
    with (tmp_path / "gpu_rows.csv").open(newline="") as file:
        questions = {row["question"].split(".")[0] for row in csv.DictReader(file)}
    assert questions == {"floor", "hbm_budget", "update_filter", "throughput", "inputs", "profiler"}
    assert "tests collected" in done.stdout
    assert "not run: adam: FBGEMM has it on CUDA only" in done.stdout
    assert "not run: ours_caching: FBGEMM's UVM cache and its prefetch are CUDA only" in done.stdout
