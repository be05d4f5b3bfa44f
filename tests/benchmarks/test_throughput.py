"""End-to-end throughput at toy size, and the configurations that it runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import throughput
from benchmarks.configurations import CONFIGURATIONS, Configuration, make_batches

TINY = ["--max-rows", "60", "--batch", "32", "--test", "400"]
KEYS = {
    "speedup",
    "speedup_p20",
    "speedup_p80",
    "mean_speedup",
    "ms",
    "samples_per_second",
    "skipped_share",
    "auc",
    "log_loss",
}
SKEWED = Configuration("skewed", 2, (1000, 5), 4, (4,), (4,), lookups=3, batch=500, positives=0.1)


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    providers = ["ours", "ours_everywhere", "torchrec_uvm", "dlrm_open_source"]
    words = [*TINY, "--configurations", "avazu", "--providers", *providers, "--rounds", "4", "--json"]
    returned = throughput.main([*words, "--csv", str(path)])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result == returned
    assert set(result) == {"configurations", "not_run"}
    assert list(result["not_run"]) == ["torchrec_uvm"]
    assert "CUDA" in result["not_run"]["torchrec_uvm"]
    assert "not run: torchrec_uvm (" in printed[-2]
    assert list(result["configurations"]) == ["avazu"]
    by_provider = result["configurations"]["avazu"]
    known = ["dlrm_open_source", "ours", "ours_everywhere", "torchrec_fused"]
    assert sorted(by_provider) == known, "stock is always run"
    stock = by_provider["torchrec_fused"]
    for one in by_provider.values():
        assert set(one) == KEYS
        assert 0 < one["speedup_p20"] <= one["speedup"] <= one["speedup_p80"]
        assert one["samples_per_second"] == pytest.approx(32 / (1e-3 * one["ms"]))
        assert 0.4 < one["auc"] <= 1.0
        assert 0.0 < one["log_loss"] < 1.0
    assert stock["speedup"] == stock["mean_speedup"] == 1.0
    assert by_provider["dlrm_open_source"]["auc"] == pytest.approx(stock["auc"], abs=1e-3)
    assert by_provider["dlrm_open_source"]["log_loss"] == pytest.approx(stock["log_loss"], abs=1e-3)
    # The default warm-up is over when skipping has begun, and was tried; it cannot pay with 32 samples a step.
    assert by_provider["ours_everywhere"]["skipped_share"] == pytest.approx(0.5, abs=0.1)
    assert stock["skipped_share"] == by_provider["dlrm_open_source"]["skipped_share"] == 0.0
    assert by_provider["ours"]["skipped_share"] == 0.0
    assert by_provider["ours_everywhere"]["log_loss"] != stock["log_loss"]

    rows = list(csv.DictReader(path.open(newline="")))
    assert {row["question"] for row in rows} == {"throughput"}
    assert sorted(row["provider"] for row in rows) == sorted(by_provider)
    for row in rows:
        parameters, quality = json.loads(row["parameters"]), json.loads(row["quality"])
        assert (parameters["configuration"], parameters["batch"], parameters["dim"]) == ("avazu", 32, 16)
        assert (parameters["tables"], parameters["max_rows"], parameters["rounds"]) == (21, 60, 4)
        assert parameters["rows"] == sum(CONFIGURATIONS["avazu"].hashed(60).table_rows)
        assert "hashed" in parameters["about"]
        assert quality == by_provider[row["provider"]]
        assert (row["unit"], row["device"]) == ("ms", "cpu")
        assert float(row["p50"]) == pytest.approx(quality["ms"], rel=1e-4)


def test_nothing_is_recorded_where_nothing_shall_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    words = ["--configurations", "avazu", "--providers", "xdl", "--rounds", "1", "--warmup", "0"]
    result = throughput.main([*TINY, *words, "--csv", str(path), "--no-record"])
    assert set(result["configurations"]["avazu"]) == {"xdl", "torchrec_fused"}
    assert result["not_run"] == {}
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--max-rows", "0"], "--max-rows 0: give 1 or more"),
        (["--batch", "-1"], "--batch -1: give 1 or more"),
        (["--test", "0"], "--test 0: give 1 or more"),
        (["--warmup", "-1"], "--warmup -1: give 0 or more"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
        (["--providers", "shotline"], "invalid choice: 'shotline'"),
        (["--configurations", "taobao"], "invalid choice: 'taobao'"),
    ],
)
def test_bad_arguments_end_it(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        throughput.main([*words, "--no-record"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--device", "cuda", "--no-record"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_published_shapes() -> None:
    kaggle, terabyte, avazu = (CONFIGURATIONS[name] for name in ("kaggle", "terabyte", "avazu"))
    # 33.8M and 9.3M rows in the papers; of Terabyte's 266M we have TorchRec's 178M.
    assert (len(kaggle.table_rows), round(sum(kaggle.table_rows), -5)) == (26, 33_800_000)
    assert (len(avazu.table_rows), round(sum(avazu.table_rows), -5)) == (21, 9_400_000)
    assert (len(terabyte.table_rows), round(sum(terabyte.table_rows), -6)) == (26, 178_000_000)
    assert [(one.dense, one.dim, one.batch, one.lookups) for one in (kaggle, terabyte, avazu)] == [
        *((13, 16, 1024, 1), (13, 64, 1024, 1), (1, 16, 1024, 1))
    ]
    assert (*kaggle.dense_sizes, kaggle.dim) == (*avazu.dense_sizes, avazu.dim) == (512, 256, 64, 16)
    assert (*terabyte.dense_sizes, terabyte.dim) == (512, 256, 64)
    assert kaggle.over_sizes == avazu.over_sizes == (512, 256)
    assert terabyte.over_sizes == (512, 512, 256)
    assert kaggle.features == [f"C{i}" for i in range(1, 27)]


def test_hashing_caps_the_large_tables_alone() -> None:
    kaggle = CONFIGURATIONS["kaggle"]
    hashed = kaggle.hashed(1000)
    for rows, left in zip(kaggle.table_rows, hashed.table_rows, strict=True):
        assert left == (rows if rows <= 1000 else 1000)
    assert hashed.table_bytes == sum(hashed.table_rows) * (16 * 4 + 4)
    assert (hashed.dim, hashed.positives, hashed.name) == (kaggle.dim, kaggle.positives, kaggle.name)
    assert max(kaggle.table_rows) > 10_000_000, "it is another one"


def test_batches_are_as_asked() -> None:
    batches, test = make_batches(SKEWED, 20, 700, seed=3)
    assert len(batches) == 20
    for batch, size in (*((one, 500) for one in batches), (test, 700)):
        assert batch.dense_features.shape == (size, 2)
        assert batch.labels.shape == (size,)
        assert (batch.dense_features.dtype, batch.sparse_features.values().dtype) == (torch.float32, torch.int64)
        assert batch.sparse_features.keys() == ["C1", "C2"]
        assert batch.sparse_features.stride() == size
        assert set(batch.sparse_features.lengths().tolist()) == {3}
        for feature, rows in zip(("C1", "C2"), SKEWED.table_rows, strict=True):
            ids = batch.sparse_features[feature].values()
            assert 0 <= int(ids.min()) <= int(ids.max()) < rows
    labels = torch.cat([one.labels for one in batches])
    assert set(labels.tolist()) == {0.0, 1.0}
    # Of 10,000: three standard deviations are 0.009.
    assert float(labels.mean()) == pytest.approx(0.1, abs=0.009)
    # Zipf's first rank has a share of 1 / zeta(1.2) = 0.18, and the rest spreads evenly over a thousand rows at most;
    # popular rows lie anywhere.
    ids = torch.cat([one.sparse_features["C1"].values() for one in batches])
    shares, order = (ids.bincount(minlength=1000) / ids.numel()).sort(descending=True)
    assert float(shares[0]) == pytest.approx(0.179, abs=0.01)
    assert float(shares[1] / shares[0]) == pytest.approx(2**-1.2, abs=0.03)
    assert int(order[:4].max()) > 100


def test_the_labels_can_be_learnt_from_the_ids_and_the_dense_features() -> None:
    one = Configuration("one", 2, (4,), 4, (4,), (4,), batch=8000, positives=0.5)
    (batch,), _ = make_batches(one, 1, 1, seed=0)
    ids, labels = batch.sparse_features.values(), batch.labels
    rates = torch.stack([labels[ids == row].mean() for row in range(4)])
    assert float(rates.max() - rates.min()) > 0.1
    slopes = np.corrcoef(np.c_[batch.dense_features.numpy(), labels.numpy()].T)[2, :2]
    assert np.abs(slopes).max() > 0.1


def test_batches_are_the_seeds() -> None:
    first, again, other = (make_batches(SKEWED, 2, 50, seed=seed) for seed in (5, 5, 6))
    for a, b in zip((*first[0], first[1]), (*again[0], again[1]), strict=True):
        assert torch.equal(a.dense_features, b.dense_features)
        assert torch.equal(a.sparse_features.values(), b.sparse_features.values())
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(first[0][0].dense_features, other[0][0].dense_features)
    assert not torch.equal(first[0][0].sparse_features.values(), other[0][0].sparse_features.values())
    assert not torch.equal(first[0][0].dense_features, first[0][1].dense_features), "each batch is a new one"
