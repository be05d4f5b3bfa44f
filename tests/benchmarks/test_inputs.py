"""The benchmark of input methods, tiny, and the candidates that are its own."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import inputs
from benchmarks.input_methods import DROPPING, Commonness, Scaled, Surprise
from benchmarks.input_orders import REORDERING
from examples.samples import batches
from examples.synthetic import make_synthetic
from torchrec_slipstream.inputs.choice import Choice

TINY = ["--samples", "6000", "--rows-per-table", "100", "--batch-size", "50", "--embedding-dim", "8"]
KEYS = {
    *("auc", "auc_delta", "auc_delta_sd", "log_loss", "logloss_delta", "logloss_delta_sd", "calibration"),
    *("dropped_share", "dropped_positives", "hot_share", "trained", "time"),
}
AGAINST = {"vs_negatives", "vs_negatives_se"}


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    inputs.main([*TINY, "--seeds", "1", "--share", "0.4", "--json", "--csv", str(path)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    methods = result["share"]["0.4"]
    assert set(methods) == set(DROPPING)
    assert set(result["undropped"]) == {"balanced", *REORDERING}
    for name, one in methods.items():
        assert set(one) == KEYS | AGAINST, name
        assert abs(one["auc_delta"]) < 0.2, name
        if name != "slipstream":  # whose inputs need every look-up stale
            assert one["dropped_share"] == pytest.approx(0.4, abs=0.12), name
        # A rest of less than a batch goes out as well: all that was kept is trained on.
        assert one["trained"] == pytest.approx((1 - one["dropped_share"]) * 4800, abs=1), name
    for name in ("negatives", "thinning", "ours", "rarity", "surprise"):
        assert methods[name]["dropped_positives"] == 0.0, name
    assert methods["random"]["dropped_positives"] == pytest.approx(0.4, abs=0.1)
    for name, one in result["undropped"].items():
        assert set(one) == KEYS, name
        assert (one["dropped_share"], one["trained"]) == (0.0, 4800), name
        assert name == "balanced" or 0.05 < one["hot_share"] < 0.95, name
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["provider"] for row in rows] == [*DROPPING, "balanced", *REORDERING]
    parameters = json.loads(rows[0]["parameters"])
    assert (parameters["share"], parameters["rows_per_table"]) == (0.4, 100)
    (run,) = json.loads(rows[1]["quality"])["runs"]
    assert run["auc_delta"] == pytest.approx(run["auc"] - run["auc_none"])


def test_ours_and_plain_negative_sampling_differ_in_weights_alone(capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--methods", "negatives", "thinning", "ours", "random", "--undropped", "balanced"]
    result = inputs.main([*TINY, "--seeds", "2", "--share", "0.5", *methods, "--no-record"])
    found = result["share"]["0.5"] | result["undropped"]
    negatives = found["negatives"]
    for name in ("thinning", "ours"):
        assert found[name]["trained"] == negatives["trained"]
        assert found[name]["dropped_share"] == negatives["dropped_share"]
        assert found[name]["auc"] != negatives["auc"], "weights make a difference"
        assert found[name]["vs_negatives"] == pytest.approx(found[name]["auc"] - negatives["auc"])
    assert found["thinning"]["auc"] == found["ours"]["auc"]  # enough are positive: none weighs
    # Without the shift of the logits they would predict about twice as many clicks as there are.
    for name in ("thinning", "ours", "balanced"):
        assert found[name]["calibration"] == pytest.approx(1.0, abs=0.4), name


def test_bad_shares_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inputs.main([*TINY, "--share", "1", "--no-record"])
    assert "--share 1: give a share above 0 and below 1" in capsys.readouterr().err


@pytest.mark.parametrize("score", [Commonness, Surprise])
def test_candidates_meet_their_share_and_weigh_by_the_inverse_probability(
    score: type[Commonness] | type[Surprise],
) -> None:
    samples = make_synthetic(20_000, 300, seed=1).samples
    selector = Scaled(score(samples.table_rows), 0.3, seed=0)
    choices: list[tuple[torch.Tensor, Choice]] = [
        (batch.labels, selector.choose(batch)) for batch in batches(samples, 100)
    ]
    keep = torch.cat([choice.keep for _, choice in choices])
    weight = torch.cat([choice.weight for _, choice in choices if choice.weight is not None])
    labels = torch.cat([labels for labels, _ in choices])
    assert float(keep.double().mean()) == pytest.approx(0.7, abs=0.01)
    assert bool(keep[labels == 1].all())
    assert bool((weight[labels == 1] == 1).all())
    # The kept ones stand for all: 20,000 give or take what a draw varies by.
    assert float(weight[keep].sum()) == pytest.approx(20_000, rel=0.02)
    assert weight.numel() == 20_000


def test_surprise_is_less_where_the_label_can_be_told() -> None:
    samples = make_synthetic(4_000, 300, seed=1).samples
    coin = torch.rand(4_000, generator=torch.Generator().manual_seed(0)).round()
    of_a_row = (samples.sparse[:, int(np.argmax(samples.table_rows))] % 2).float()
    last = []
    for labels in (of_a_row, coin):
        surprise = Surprise(samples.table_rows)
        scores = [float(surprise(batch).mean()) for batch in batches(replace(samples, labels=labels), 100)]
        last.append(sum(scores[-5:]))
    assert last[0] < 0.7 * last[1]


def test_common_rows_score_higher() -> None:
    samples = make_synthetic(4_000, 300, seed=1).samples
    commonness = Commonness(samples.table_rows)
    for batch in batches(samples, 100):
        commonness(batch)
    popular = samples.sparse.mode(dim=0).values
    rare = torch.tensor([int(rows) - 1 for rows in samples.table_rows])
    pair = replace(samples, dense=samples.dense[:2], sparse=torch.stack([popular, rare]), labels=samples.labels[:2])
    first, second = commonness(pair.batch(torch.arange(2)))
    assert first > 2 * second
