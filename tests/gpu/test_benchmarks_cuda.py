"""The GPU benchmarks at toy size on a GPU: every provider runs, and a cache that was resized is like one built so."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from benchmarks import floor, hbm_budget, prefetch_overlap
from benchmarks.tbe_exactness import difference
from benchmarks.tbe_providers import ALGORITHMS, BACKINGS, WAYS, build, resize_cache, states_of
from benchmarks.tbe_traffic import Shape, Traffic

pytestmark = pytest.mark.gpu

TOY = ["--device", "cuda", "--tables", "3", "--rows", "4000", "--dim", "32", "--batch", "3000", "--profile", "8"]


@pytest.mark.parametrize("algorithm", ["lru", "lfu"])
def test_a_resized_cache_is_as_one_that_was_built_so(algorithm: str) -> None:
    shape = Shape(3, 4000, 32, 3000)
    traffic = Traffic(shape, "cuda")
    sets = 20
    resized = build("uvm_caching", shape, "rowwise_adagrad", "cuda")
    for slots, kind in ((50, "lru"), (3000, "lfu"), (sets * WAYS, algorithm)):
        resize_cache(resized, slots, kind)
    built = build(
        "uvm_caching", shape, "rowwise_adagrad", "cuda", cache_sets=sets, cache_algorithm=ALGORITHMS[algorithm]
    )
    for number in range(6):
        outputs = [tbe(traffic.batch(number), traffic.offsets) for tbe in (resized, built)]
        assert torch.equal(*outputs)
        for output in outputs:
            output.backward(torch.ones_like(output))
        mine, theirs = (tbe.lxu_cache_state.sort(dim=1).values for tbe in (resized, built))
        assert torch.equal(mine, theirs)
    assert int((mine >= 0).sum()) > sets * WAYS // 2


def test_rows_trained_in_a_cache_outlive_its_resizing() -> None:
    shape = Shape(3, 4000, 32, 3000)
    traffic = Traffic(shape, "cuda")
    tbes = [build(backing, shape, "rowwise_adagrad", "cuda") for backing in ("uvm_caching", "torchrec_fused")]
    for number, (slots, algorithm) in enumerate([(640, "lru"), (64, "lfu"), (3000, "lru")]):
        resize_cache(tbes[0], slots, algorithm)
        outputs = [tbe(traffic.batch(number), traffic.offsets) for tbe in tbes]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.backward(torch.ones_like(output))
    tbes[0].flush()
    for mine, theirs in zip(*map(states_of, tbes), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backing", [name for name in BACKINGS if name != "torchrec_fused"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "sgd", "adam"])
def test_ours_is_stock(backing: str, optimizer: str) -> None:
    assert difference(backing, optimizer, "cuda", dim=32, bag=1) == 0.0
    assert difference(backing, optimizer, "cuda", dim=32, bag=4) < (1e-4 if optimizer == "adam" else 1e-5)


def test_every_provider_runs_and_has_a_floor(tmp_path: Path) -> None:
    path, memories = tmp_path / "all.csv", tmp_path / "memories.json"
    sizes = ["--row-bytes", "128", "--buffer-bytes", str(1 << 26), "--moved-bytes", str(1 << 24), "--rounds", "3"]
    found = floor.main(["--device", "cuda", *sizes, "--out", str(memories), "--no-record"])
    assert 1 < found["best"]["host_read"] / 1e6 < found["best"]["own"] / 1e6
    few = ["--rounds", "2", "--most-rounds", "2", "--steps", "2", "--seconds", "0.5", "--budgets", "0.1"]
    result = hbm_budget.main([*TOY, *few, "--memories", str(memories), "--csv", str(path)])
    assert result["not_run"] == {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {"torchrec_fused", "uvm", "uvm_host_mapped", "uvm_caching_lru", "uvm_caching_lfu", "ours"}
    expected |= {"ours_skip", "ours_skip_sampling", "ours_caching", "ours_host_mapped"}
    for optimizer in ("rowwise_adagrad", "sgd", "adam"):
        mine = [row for row in rows if json.loads(row["parameters"])["optimizer"] == optimizer]
        assert {row["provider"] for row in mine} == expected
        for row in mine:
            quality = json.loads(row["quality"])
            assert row["provider"] == "ours_skip_sampling" or quality["floor_multiple"] > 0
            if row["provider"].startswith("ours") or "caching" in row["provider"]:
                assert 0.3 < quality["hit_rate"] < 1.0, row["provider"]


def test_prefetching_steps_run(tmp_path: Path) -> None:
    few = ["--dense-ms", "0", "2", "--warm", "4", "--steps", "4", "--rounds", "2", "--budget", "0.3"]
    result = prefetch_overlap.main([*TOY, *few, "--csv", str(tmp_path / "all.csv")])
    assert set(result["hidden_share"]) == {f"{name}.{ms}" for name in prefetch_overlap.PROVIDERS for ms in (0, 2)}
