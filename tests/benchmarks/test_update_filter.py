"""The update filter's benchmark, tiny: what it reports, records, and does not let pass."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.tables import Sizes, choose_stale, count_lookups, make_batches
from benchmarks.update_filter import KINDS, main
from torchrec_slipstream.tbe import UpdateFilter

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--tables", "3", "--rows", "400", "--dim", "8", "--batch", "64", "--batches", "6", "--rounds", "4"]
TINY += ["--more-dims", "4"]
TINY += ["--overhead-rounds", "60", "--warmup", "2", "--shares", "0.5", "0.95"]


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path) -> None:
    path = tmp_path / "all.csv"
    command = [sys.executable, "-m", "benchmarks.update_filter", *TINY, "--json", "--csv", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["exact"] is True
    assert result["overhead_at_0"] > 0
    assert result["overhead_at_0_mean"] > 0
    for key in (*KINDS, *(f"{kind}_backward" for kind in KINDS)):
        assert set(result[key]) == {"0.5", "0.95"}
        assert all(value > 0 for value in result[key].values())
    sampled = result["measured_share"].pop("speedup_sampling")
    assert sampled == pytest.approx({"0.5": 0.5, "0.95": 0.95}, abs=0.08), "drawn a sample, 64 a step"
    for shares in result["measured_share"].values():
        # Rows are stale or not as a whole, so a share is met from below, to within a popular row's.
        assert all(float(share) - 0.1 < measured <= float(share) for share, measured in shares.items()), shares
    rows = list(csv.DictReader(path.open(newline="")))
    assert [(row["question"], row["provider"]) for row in rows] == [
        ("update_filter.overhead_at_0", "stock"),
        ("update_filter.overhead_at_0", "session"),
        *[(f"update_filter.{key}", one) for key in KINDS for one in ("stock", "filter 0.5", "filter 0.95")],
        *[("update_filter.speedup", one) for one in ("stock", "filter 0.5", "filter 0.95")],
    ]
    assert [json.loads(row["parameters"])["dim"] for row in rows] == [8] * 11 + [4] * 3
    assert set(result["speedup_by_dim"]) == {"8", "4"}
    assert {row["threads"] for row in rows} == {"1"}
    assert all(json.loads(row["quality"])["exact"] for row in rows)
    assert [json.loads(row["parameters"])["rounds"] for row in rows[:3]] == [60, 60, 4]
    assert json.loads(rows[4]["parameters"])["share"] == 0.95
    assert json.loads(rows[4]["quality"])["speedup"] == result["speedup"]["0.95"]


def test_no_record_leaves_the_csv_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    main([*TINY, "--no-record", "--csv", str(path)])
    assert not path.exists()
    assert "exact: yes" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["all live", "shifted", "all stale"])
def test_a_broken_filter_is_found_out(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose = UpdateFilter.choose_live

    def wrong(self: UpdateFilter, rows: Tensor) -> Tensor:
        live = choose(self, rows)
        return {"all live": live | True, "shifted": live.roll(1), "all stale": live & False}[broken]

    monkeypatch.setattr(UpdateFilter, "choose_live", wrong)
    result = main([*TINY, "--no-record"])
    assert result["exact"] is False
    printed = capsys.readouterr()
    assert "NOT EXACT" in printed.err
    assert "exact: NO" in printed.out


def test_a_forward_that_is_not_stocks_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = UpdateFilter.forward
    monkeypatch.setattr(
        UpdateFilter, "forward", lambda self, *a, **k: forward(self, *a, **k) * (1.0 + 2.0**-20 * self.any_stale)
    )
    assert main([*TINY, "--no-record"])["exact"] is False


def test_stale_rows_are_chosen_by_share_and_by_popularity() -> None:
    sizes = Sizes(tables=3, rows=500, dim=4, batch=128, batches=8)
    batches, offsets = make_batches(sizes)
    assert len(batches) == 8
    assert offsets.tolist() == list(range(3 * 128 + 1))
    assert len({tuple(batch.tolist()) for batch in batches}) == 8, "all different"
    counts = count_lookups(sizes, batches)
    assert counts.sum() == 8 * 3 * 128
    assert counts[:500].sum() == counts[500:1000].sum() == 8 * 128, "a table's look-ups fall on its own rows"
    tops = counts.view(3, 500).argmax(dim=1).tolist()
    assert len(set(tops)) > 1, "popularity lies elsewhere in every table"
    # Zipf's law with exponent 1.2 gives the first id 1 / zeta(1.2) = 17.9% of the look-ups.
    assert counts.max() / (8 * 128) == pytest.approx(0.179, abs=0.05)
    for share in (0.5, 0.95):
        popular = choose_stale(counts, share, "popular")
        random = choose_stale(counts, share, "random")
        assert counts[popular].min() >= counts[~popular].max()
        assert counts[popular].sum() <= share * counts.sum()
        assert random.sum() > 1.5 * popular.sum()
        assert not torch.equal(random, choose_stale(counts, share, "random", seed=1))
