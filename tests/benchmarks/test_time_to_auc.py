"""Time to AUC: its arithmetic on hand-made curves, and one tiny run."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import time_to_auc
from benchmarks.time_to_auc import NONE, seconds_to, summarise
from examples.train_dlrm import Data

CURVE = [(10.0, 0.6), (20.0, 0.7), (30.0, 0.8)]


@pytest.mark.parametrize(
    ("target", "seconds"),
    [
        (0.7, 20.0),  # at a test
        (0.725, 22.5),  # between two
        (0.8, 30.0),
        (0.6, 10.0),
        (0.55, 5.0),  # before the first: from chance at the beginning
        (0.5, 0.0),
        (0.4, 0.0),  # worse than chance
        (0.8001, None),
    ],
)
def test_seconds_to_a_target(target: float, seconds: float | None) -> None:
    found = seconds_to(CURVE, target)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_the_first_time_counts() -> None:
    curve = [(10.0, 0.7), (20.0, 0.6), (30.0, 0.8)]
    assert seconds_to(curve, 0.7) == pytest.approx(10.0)
    assert seconds_to(curve, 0.75) == pytest.approx(27.5)
    # A first test worse than chance; a curve without a slope.
    assert seconds_to([(10.0, 0.4), (20.0, 0.6)], 0.45) == pytest.approx(12.5)
    assert seconds_to([(10.0, 0.5), (20.0, 0.5)], 0.5) == pytest.approx(10.0)
    assert seconds_to([], 0.5) is None


def test_summary_by_hand() -> None:
    # With 0.05 less, the targets are 0.75 and 0.65.
    curves = {
        NONE: [[(10.0, 0.7), (20.0, 0.8)], [(10.0, 0.6), (20.0, 0.7)]],
        "faster": [[(4.0, 0.7), (8.0, 0.8)], [(5.0, 0.65), (10.0, 0.75)]],
        "sometimes": [[(10.0, 0.7), (20.0, 0.74)], [(12.0, 0.6), (25.0, 0.7)]],
        "never": [[(10.0, 0.6), (20.0, 0.6)], [(10.0, 0.6), (20.0, 0.6)]],
    }
    result = summarise(curves, 0.05)
    assert list(result) == list(curves)
    none, faster, sometimes, never = result.values()
    assert none["seconds"] == pytest.approx([15.0, 15.0])
    assert (none["ratio"], none["reached"], none["auc_delta"], none["whole_run"]) == (1.0, 2, 0.0, 1.0)
    assert none["final_auc"] == pytest.approx(0.75)

    assert faster["seconds"] == pytest.approx([6.0, 5.0])
    assert faster["ratio"] == pytest.approx((15 / 6 + 15 / 5) / 2)
    assert faster["reached"] == 2
    assert faster["final_auc"] == pytest.approx(0.775)
    assert faster["auc_delta"] == pytest.approx(0.025)
    assert faster["whole_run"] == pytest.approx((20 / 8 + 20 / 10) / 2)

    assert sometimes["seconds"] == [None, pytest.approx(18.5)]
    assert sometimes["ratio"] == pytest.approx(15 / 18.5)
    assert sometimes["reached"] == 1
    assert sometimes["auc_delta"] == pytest.approx(-0.03)
    assert sometimes["whole_run"] == pytest.approx((20 / 20 + 20 / 25) / 2)

    assert (never["seconds"], never["ratio"], never["reached"]) == ([None, None], None, 0)
    shown = time_to_auc.show({"data": "made", "seeds": 2, "below": 0.05, "providers": result})
    assert [line.split()[1] for line in shown.splitlines()[2:]] == ["15.0", "5.5", "18.5", "never"]


def test_targets_no_better_than_chance_are_reached_at_once() -> None:
    result = summarise({NONE: [CURVE], "ours": [[(10.0, 0.3), (20.0, 0.7)]]}, 0.31)
    assert (result[NONE]["seconds"], result[NONE]["ratio"], result[NONE]["reached"]) == ([0.0], None, 1)
    assert result["ours"]["reached"] == 1
    assert result["ours"]["ratio"] is None


def test_it_ends_with_one_json_line_and_appends_to_the_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "all.csv"
    runs: list[tuple[str, int, int]] = []
    train_with = time_to_auc.train_with

    def watched(arguments: Namespace, data: Data, name: str, share: float) -> dict[str, Any]:
        runs.append((name, arguments.seed, len(data.train)))
        return train_with(arguments, data, name, share)

    monkeypatch.setattr(time_to_auc, "train_with", watched)
    job = ["--samples", "2000", "--rows-per-table", "100", "--batch-size", "50", "--embedding-dim", "8"]
    words = ["--seeds", "2", "--evaluations", "3", "--below", "0.01", "--share", "0.4", "--providers", "ours"]
    time_to_auc.main([*words, "--json", "--csv", str(path), "--job", *job, "--interval", "8"])
    # A short one that nobody is charged for, then turns: the seed's data for all, another first each time.
    assert runs == [(NONE, 0, 800), (NONE, 0, 1600), ("ours", 0, 1600), ("ours", 1, 1600), (NONE, 1, 1600)]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: result[name] for name in ("data", "seeds", "below", "share", "evaluations")} == {
        "data": "synthetic",
        "seeds": 2,
        "below": 0.01,
        "share": 0.4,
        "evaluations": 3,
    }
    assert list(result["providers"]) == [NONE, "ours"]

    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["provider"] for row in rows] == ["torchrec_fused", "ours"]
    curves = {}
    for row, (name, one) in zip(rows, result["providers"].items(), strict=True):
        assert (row["question"], row["unit"], row["device"]) == ("time_to_auc", "s", "cpu")
        parameters, quality = json.loads(row["parameters"]), json.loads(row["quality"])
        assert (parameters["share"], parameters["seeds"], parameters["job"]) == (0.4, 2, [*job, "--interval", "8"])
        curves[name] = quality.pop("curves")
        assert quality == one
        assert len(one["seconds"]) == 2
        whole = [curve[-1][0] for curve in curves[name]]
        assert min(whole) - 1e-3 <= float(row["p50"]) <= max(whole) + 1e-3
        for curve in curves[name]:
            assert len(curve) == 3
            assert [second for second, _ in curve] == sorted(second for second, _ in curve)
            assert 0.0 < curve[0][0] < curve[-1][0]
    # Until skipping begins, after a quarter of the run, they are one; here the first test is later.
    for none, ours in zip(curves[NONE], curves["ours"], strict=True):
        assert [auc for _, auc in none] != [auc for _, auc in ours]
    assert curves[NONE][0][-1][1] != curves[NONE][1][-1][1], "seeds differ"
    assert result["providers"][NONE]["reached"] == 2
    assert result["providers"][NONE]["auc_delta"] == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
        (["--evaluations", "0"], "--evaluations 0: give 1 or more"),
        (["--share", "1.5"], "is 1.5; give a number from 0 to 1"),
        (["--below", "-0.1"], "is -0.1; give a number from 0 to 1"),
        (["--providers", "luck"], "invalid choice: 'luck'"),
        (["--job", "--embedding-dim", "6"], "give a multiple of 4"),
    ],
)
def test_bad_arguments_end_it(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        time_to_auc.main(["--no-record", *words])
    assert message in capsys.readouterr().err


def test_data_that_are_not_there_end_it() -> None:
    with pytest.raises(SystemExit, match=r"benchmarks\.time_to_auc: .*nowhere\.tsv does not exist"):
        time_to_auc.main(["--data", "nowhere.tsv", "--no-record"])
