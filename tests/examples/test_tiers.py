"""Hot rows in the main job: planned or found while training, one process and two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.arguments import parse_arguments
from examples.runtime import process_group
from examples.show import show
from examples.synthetic import make_synthetic
from examples.tiers import budget_bytes, tiers_for
from examples.train_dlrm import train
from tests.examples.test_train_dlrm import SMALL, run
from torchrec_slipstream import ConfigError, PlacementReport

SHORT = [
    *SMALL,
    "--samples",
    "16000",
    "--evaluations",
    "1",
    "--batch-size",
    "64",
    "--hbm-budget",
    "15%",
    "--sharding",
    "table_wise",
]
CPU = torch.device("cpu")


def trained(*arguments: str) -> dict[str, Any]:
    with process_group(CPU):
        return train(parse_arguments([*SHORT, "--device", "cpu", *arguments]))


def test_planned_rows_are_hit_as_predicted_and_change_no_result() -> None:
    stock, planned = trained(), trained("--placement", "planned")
    report = PlacementReport.from_dict(planned["slipstream"]["placement"])
    assert report.predicted_hit_rate is not None
    assert 0.3 < report.predicted_hit_rate < 0.999, "a budget of a share holds a part"
    assert report.total.hit_rate == pytest.approx(report.predicted_hit_rate, abs=0.03)
    assert report.hbm_bytes == report.predicted_bytes
    # One look-up a bag: where a row is changes no bit of the tables, and the order of sums nothing.
    assert planned["test"] == stock["test"]
    assert {table["kernel"] for table in planned["plan"].values()} <= {"fused", "fused_uvm"}
    assert "hot rows" in show({"off": planned})


def test_rows_found_while_training_come_near_planned_ones(tmp_path: Path) -> None:
    picture = tmp_path / "hit_rate.png"
    live = trained("--placement", "live", "--replan-every", "20", "--plot", str(picture))
    report = PlacementReport.from_dict(live["slipstream"]["placement"])
    assert report.replans
    assert report.moved_rows > 0
    assert report.hit_rates()[0][1] < report.hit_rates()[-1][1] > 0.3
    assert report.predicted_hit_rate is None
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_two_ranks_move_their_own_rows(tmp_path: Path) -> None:
    out = tmp_path / "two.json"
    arguments = ["--placement", "planned", "--replan-every", "10", "--sharding", "row_wise", "--skip", "everywhere"]
    done = run([*SHORT, *arguments, "--json", str(out)], ranks=2)
    assert done.returncode == 0, done.stderr
    assert "both tiers are in host memory" in done.stderr
    assert "re-plans" in done.stdout
    result = json.loads(out.read_text())
    report = PlacementReport.from_dict(result["slipstream"]["placement"])
    assert report.total.lookups == 16_000 * 8 // 10 // 128 * 128 * 26, "of both ranks"
    assert report.replans, "the first is made whatever it costs"
    assert result["slipstream"]["skipped_share"] > 0


def test_a_budget_is_bytes_or_a_share() -> None:
    assert budget_bytes("1MiB", [10, 20], 36, 2) == 2**20
    assert budget_bytes(0.5, [10, 20], 36, 2) == 270
    with pytest.raises(ConfigError, match="'much' is not a size"):
        budget_bytes("much", [10], 36, 1)


def test_a_profile_file_is_planned_from(tmp_path: Path) -> None:
    samples = make_synthetic(1000, 100, seed=0).samples
    path = tmp_path / "profile.npz"
    measured = tiers_for(samples, None, 0.1, embedding_dim=8, world_size=1).profile
    assert measured.samples == 100
    measured.save(path)
    assert tiers_for(samples, path, 0.1, embedding_dim=8, world_size=1).profile == measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--placement", "live"], "give --replan-every"),
        (["--placement", "planned", "--hbm-budget", "150%"], "is 1.5; give a number from 0 to 1"),
        (["--placement", "planned", "--hbm-budget", "lots"], "'lots' is not a size of memory"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err
