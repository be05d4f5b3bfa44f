"""The ranks benchmark, tiny, on real gloo ranks: a session that counts equals stock, and what is recorded."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import PROVIDERS, main, same_state

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow  # it starts processes
def test_two_ranks_against_one(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    options = [
        "--max-rows",
        "300",
        "--batch",
        "256",
        "--warmup",
        "24",
        "--rounds",
        "6",
        "--test",
        "2",
        "--shardings",
        "row_wise",
    ]
    command = [sys.executable, "-m", "benchmarks.ranks", *options, "--json", "--csv", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    found = result["row_wise"]
    assert found["exact"] == {"1": True, "2": True}
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["question"], row["provider"], row["unit"]) for row in rows] == 2 * [
        ("ranks", name, "ms") for name in PROVIDERS
    ]
    assert [json.loads(row["parameters"])["ranks"] for row in rows] == [1, 1, 1, 2, 2, 2]
    assert all(json.loads(row["quality"])["enough_cores"] == (result["cores"] >= 2) for row in rows[3:])
    for name in PROVIDERS:
        alone, both = found[name]["1"], found[name]["2"]
        assert alone["scaling"] == 1.0
        assert both["samples_per_second"] == pytest.approx(2 * 256 * 1000 / both["ms"])
        assert both["scaling"] == pytest.approx(both["samples_per_second"] / 2 / alone["samples_per_second"])
        for one in (alone, both):
            assert 0.02 < one["log_loss"] < 1.0
            assert (one["skipped_share"] > 0.01) == (name == "ours")
        assert both["log_loss"] != alone["log_loss"], "two ranks see twice the samples"
    for ranks in ("1", "2"):  # equal weights, equal predictions
        assert found["ours_counting"][ranks]["log_loss"] == found["torchrec_fused"][ranks]["log_loss"]
        assert found["ours"][ranks]["log_loss"] != found["torchrec_fused"][ranks]["log_loss"]


def test_states_are_compared_whole() -> None:
    one = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert same_state(one, {name: value.clone() for name, value in one.items()})
    assert not same_state(one, {"a": torch.ones(3)})
    assert not same_state(one, {**one, "b": torch.full((2,), 1e-30)})
    assert not same_state({}, {}), "nothing compared is nothing shown"


def test_more_gpus_than_there_are_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda", "--ranks", "1000"])
    assert "--ranks 1000: torch sees" in capsys.readouterr().err
