"""The providers of the end-to-end benchmarks: equal training, and what is left out of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from benchmarks.configurations import Configuration, make_batches
from benchmarks.outside import HostBags
from benchmarks.providers import NAMES, WARMUP_STEPS, Setting, build, not_run
from benchmarks.sparse_rowwise import SparseRowWiseAdagrad
from examples.runtime import process_group, quiet
from torchrec_slipstream import Report
from torchrec_slipstream.report.placement import PlacementReport

CPU = torch.device("cpu")
TOY = Configuration("toy", 3, (50, 40, 7), 8, (16,), (16,), lookups=2, batch=32)
# Beyond the second decision, the first whose measured share there is.
LONG = 2 * WARMUP_STEPS + 4


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    quiet()
    with process_group(CPU):
        yield


@cache
def trained(name: str, steps: int) -> tuple[Tensor, Report | None]:
    """Predictions after so many steps, each of a new batch, and the session's report."""
    batches, test = make_batches(TOY, steps, 64, seed=1)
    provider = build(name, Setting(TOY, batches, 0, CPU))
    for _ in range(steps):
        provider.step()
    report = provider.session.report() if provider.session is not None else None
    return provider.predict(test), report


@pytest.mark.parametrize("name", ["dlrm_open_source", "xdl"])
def test_others_train_to_stocks_predictions(name: str) -> None:
    stock, _ = trained("torchrec_fused", 6)
    found, report = trained(name, 6)
    assert report is None
    assert found.shape == (64,)
    torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)
    assert float((stock - trained("torchrec_fused", 1)[0]).abs().max()) > 1e-2, "training changes what is predicted"


def test_counting_changes_no_bit() -> None:
    found, report = trained("ours_counting", LONG)
    assert torch.equal(found, trained("torchrec_fused", LONG)[0])
    assert report is not None
    assert report.total.lookups == LONG * TOY.batch * TOY.lookups * len(TOY.table_rows)
    assert report.total.skipped == 0


def placement_of(report: Report | None) -> PlacementReport:
    assert report is not None
    assert report.placement is not None
    assert sum(table.hits for table in report.placement.tables.values()) > 0, "no row was hot"
    return report.placement


def test_hot_rows_train_to_stocks_predictions() -> None:
    found, report = trained("ours_hot_rows", LONG)
    placement_of(report)
    assert report is not None
    assert report.total.skipped == 0
    torch.testing.assert_close(found, trained("torchrec_fused", LONG)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ours_everywhere", "ours_tail", "ours_all"])
def test_ours_leaves_updates_out_and_nothing_before_its_warm_up(name: str) -> None:
    # A step's forward, backward and update, and the next forward.
    assert torch.equal(trained(name, 1)[0], trained("torchrec_fused", 1)[0])
    found, report = trained(name, LONG)
    assert report is not None
    assert [one.step for one in report.decisions] == [WARMUP_STEPS, 2 * WARMUP_STEPS]
    assert report.decisions[-1].measured_share > 0.2
    assert 0.1 < report.total.skipped_share < 0.5
    stock, _ = trained("torchrec_fused", LONG)
    assert 1e-4 < float((found - stock).abs().max()) < 1.0
    if name == "ours_all":
        placement_of(report)


def test_hotline_trains_to_stocks_predictions() -> None:
    found, report = trained("hotline", 12)
    torch.testing.assert_close(found, trained("torchrec_fused", 12)[0], rtol=1e-4, atol=1e-5)
    assert report is not None
    assert report.total.lookups == 12 * TOY.batch * TOY.lookups * len(TOY.table_rows), "each look-up counts once"


def test_fae_trains_on_the_same_samples_in_another_order() -> None:
    found, report = trained("fae", 12)
    stock, _ = trained("torchrec_fused", 12)
    assert 1e-4 < float((found - stock).abs().max()) < 1.0
    assert report is not None
    assert report.inputs is not None
    # The pipeline has read on into a second pass.
    assert (report.inputs.read, report.inputs.dropped) == (2 * 12 * TOY.batch, 0)


def test_weights_and_batches_are_the_seeds() -> None:
    batches, test = make_batches(TOY, 1, 64)
    first, again, other = (build("xdl", Setting(TOY, batches, seed, CPU)).predict(test) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    setting = Setting(TOY, batches, 0, CPU)
    stream = setting.stream()
    assert next(stream) is next(stream) is batches[0], "in a circle"


def test_the_host_has_the_seeds_tables_and_keeps_the_ids() -> None:
    embeddings, other = (HostBags(Setting(TOY, [], seed, CPU).tables(), CPU, 0.02) for seed in (0, 1))
    drawn = list(zip(embeddings.tbe.split_embedding_weights(), other.tbe.split_embedding_weights(), strict=True))
    for (weights, others), rows in zip(drawn, TOY.table_rows, strict=True):
        assert weights.shape == (rows, TOY.dim)
        bound = rows**-0.5
        assert 0.9 * bound < float(weights.abs().max()) <= bound
        assert not torch.equal(weights, others)
    scaled = drawn[2][0] * (TOY.table_rows[2] / TOY.table_rows[0]) ** 0.5
    assert not torch.allclose(drawn[0][0][: TOY.table_rows[2]], scaled), "every table is drawn by itself"
    (batch,), _ = make_batches(TOY, 1, 1)
    placed = embeddings.place(batch, torch.device("meta"))
    assert placed.dense_features.device.type == placed.labels.device.type == "meta"
    assert placed.sparse_features is batch.sparse_features


def test_what_cannot_run_says_so() -> None:
    setting = Setting(TOY, [], 0, CPU)
    with pytest.raises(ValueError, match=r"'shotline' is no provider; give some of dlrm_open_source, xdl"):
        build("shotline", setting)
    for name in ("torchrec_uvm", "torchrec_uvm_caching_lru", "torchrec_uvm_caching_lfu"):
        with pytest.raises(ValueError, match=f"{name} cannot run here: .* need a CUDA device"):
            build(name, setting)
    assert [name for name in NAMES if not_run(name, "cpu") is None] == [
        *("dlrm_open_source", "xdl", "torchrec_fused"),
        *("ours_counting", "ours", "ours_everywhere", "ours_tail", "random_lookups"),
        *("ours_hot_rows", "ours_all", "fae", "hotline"),
    ]
    assert not [name for name in NAMES if not_run(name, "cuda")]


def test_sparse_rowwise_adagrad_is_fbgemms() -> None:
    rows, dim, rate, eps = 12, 8, 0.1, 0.05  # an eps that can be seen
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=rate,
        eps=eps,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(0)
    bag = nn.EmbeddingBag(rows, dim, mode="sum", sparse=True)
    untouched = nn.EmbeddingBag(rows, dim, mode="sum", sparse=True)
    with torch.no_grad():
        bag.weight.copy_(torch.randn(rows, dim, generator=generator))
        tbe.split_embedding_weights()[0].copy_(bag.weight)
    optimizer = SparseRowWiseAdagrad([bag.weight, untouched.weight], lr=rate, eps=eps)
    before = bag.weight.detach().clone(), untouched.weight.detach().clone()
    for step in range(5):
        # Row 1 twice in one bag and again in others; rows from 10 on never; an empty bag.
        ids = torch.cat([torch.tensor([1, 1, 3]), torch.randint(10, (9,), generator=generator)])
        offsets = torch.tensor([0, 3, 3, 6, 12])
        upstream = torch.randn(4, dim, generator=generator)
        tbe(ids, offsets).backward(upstream)
        optimizer.zero_grad()
        bag(ids, offsets[:-1]).backward(upstream)
        optimizer.step()
        torch.testing.assert_close(
            bag.weight, tbe.split_embedding_weights()[0], rtol=1e-5, atol=1e-6, msg=f"step {step}"
        )
    (state,) = tbe.split_optimizer_states()[0]
    torch.testing.assert_close(optimizer.state[bag.weight]["sum"], state.view(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(bag.weight[10:], before[0][10:])
    assert torch.equal(untouched.weight, before[1])
