"""Deferred updates and the second stream on CUDA, as tests/tbe/test_deferred.py and tests/inputs/test_hotline.py.

What is relied on besides (``tests/gpu/test_update_filter_cuda.py`` has the rest; no run has confirmed it for us yet):

* FBGEMM's backward takes the number of samples from the offsets that it unpacks and from the gradient, as the forward
  had them; ``info_B_num_bits`` depends on the number of features, and on that of samples above 2^26 only.
* With a cache, the joint batch's locations are looked up when it is put together (``cache_locations``): the second
  micro-batch's forward may have evicted the first's rows, which are then misses, read and written in the table. The
  forward over empty bags prefetches nothing (its one index is -1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from torch import Tensor, nn
from torchrec.datasets.utils import Batch

from tests.inputs.clicks import DIM, ROWS, is_popular, make_batch
from tests.tables import make_lookups, make_tbe, table_states
from tests.tbe.test_deferred import MODES, POOLINGS, compare_steps
from tests.tbe.test_overlay import FEATURE_ROWS
from torchrec_slipstream.inputs.hotline import Hotline
from torchrec_slipstream.tbe import UpdateFilter, find_tbes

pytestmark = pytest.mark.gpu

LOCATIONS = [EmbeddingLocation.DEVICE, EmbeddingLocation.MANAGED, EmbeddingLocation.MANAGED_CACHING]
OPTIMIZERS = [
    EmbOptimType.EXACT_SGD,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    EmbOptimType.ADAM,  # counts steps
    EmbOptimType.PARTIAL_ROWWISE_ADAM,
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("location", LOCATIONS)
def test_one_update_of_the_whole_batch(
    mode: str, pooling: PoolingMode, optimizer: EmbOptimType, location: EmbeddingLocation
) -> None:
    if mode.startswith("overlay") and location == EmbeddingLocation.DEVICE:
        pytest.skip("rows that are in fast memory anyway have no overlay")
    batches = [make_lookups(FEATURE_ROWS, (9,) * 4, seed=seed, device=DEVICE) for seed in range(3)]
    compare_steps(mode, batches, 0, 2, pooling=pooling, optimizer=optimizer, device=DEVICE, location=location)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
def test_weighted_lookups(mode: str, pooling: PoolingMode) -> None:
    batches = [make_lookups(FEATURE_ROWS, (9,) * 4, seed=seed, weighted=True, device=DEVICE) for seed in range(3)]
    compare_steps(mode, batches, 0, 2, pooling=pooling, device=DEVICE, location=EmbeddingLocation.MANAGED)


def test_cache_that_the_second_micro_batch_evicts() -> None:
    """One set of 32 ways for 120 rows: the first's rows are out of it by the time of the update."""
    batches = [make_lookups(FEATURE_ROWS, (60,) * 4, seed=seed, device=DEVICE) for seed in range(5)]
    location = EmbeddingLocation.MANAGED_CACHING
    compare_steps("plain", batches, 0, 2, device=DEVICE, location=location, cache_sets=1)


class Clicks(nn.Module):
    """Tables in a bare TBE, and a dense part."""

    def __init__(self, location: EmbeddingLocation) -> None:
        super().__init__()
        self.tbe = make_tbe(ROWS, (DIM,) * len(ROWS), device=DEVICE, location=location)
        torch.manual_seed(0)
        self.over = nn.Sequential(nn.Linear(len(ROWS) * DIM, 16), nn.ReLU(), nn.Linear(16, 1)).to(DEVICE)

    def forward(self, batch: Batch) -> Tensor:
        features = batch.sparse_features
        logits = self.over(self.tbe(features.values(), features.offsets())).squeeze(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)


def hotline_of(location: EmbeddingLocation) -> tuple[Clicks, Hotline, list[Tensor]]:
    """A model, its hotline, and where to put the next batch's mask."""
    model = Clicks(location)
    filters = [UpdateFilter(one) for one in find_tbes(model)]
    for one in filters:
        one.attach()
    masks: list[Tensor] = []
    return model, Hotline(model, filters, lambda batch: masks.pop()), masks


@pytest.mark.parametrize("location", LOCATIONS)
def test_step_as_stock_but_for_rounding(location: EmbeddingLocation) -> None:
    stock = Clicks(location)
    ours, hotline, masks = hotline_of(location)
    dense = [torch.optim.SGD(model.over.parameters(), lr=0.1) for model in (stock, ours)]
    streams = []

    def forward(batch: Batch) -> Tensor:
        streams.append(torch.cuda.current_stream() if DEVICE == "cuda" else None)
        return ours(batch)

    for step in range(20):
        batch = make_batch((torch.arange(64) % 3 > 0).tolist(), step)
        masks.append(is_popular(batch))
        batch = batch.to(torch.device(DEVICE))
        for one in dense:
            one.zero_grad()
        want = stock(batch)
        want.backward()
        got = hotline.backward(batch, forward)
        torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)
        for one in dense:
            one.step()
    assert hotline.divided_steps == 20
    for got_table, want_table in zip(table_states(ours.tbe), table_states(stock.tbe), strict=True):
        for got_state, want_state in zip(got_table, want_table, strict=True):
            torch.testing.assert_close(got_state, want_state, rtol=1e-3, atol=1e-5)
    beside = DEVICE == "cuda" and location != EmbeddingLocation.MANAGED_CACHING
    assert all((second != first) == beside for first, second in zip(streams[::2], streams[1::2], strict=True))


def test_second_forward_runs_beside_the_firsts_backward() -> None:
    ours, hotline, masks = hotline_of(EmbeddingLocation.DEVICE)
    batch = make_batch((torch.arange(64) % 3 > 0).tolist(), 0)
    mask, batch = is_popular(batch), batch.to(torch.device(DEVICE))
    masks.append(mask)
    hotline.backward(batch, ours)  # kernels are loaded at their first launch, which may wait for the device
    torch.cuda.synchronize()
    events: dict[str, Any] = {name: torch.cuda.Event(enable_timing=True) for name in ("begun", "first", "second")}
    forwards = backwards = 0

    def forward(batch: Batch) -> Tensor:
        nonlocal forwards
        forwards += 1
        if forwards == 1:
            events["begun"].record()
            return ours(batch)
        torch.cuda._sleep(500_000_000)  # cycles: a quarter of a second or so, as if rows came slowly
        loss = ours(batch)
        events["second"].record()
        return loss

    def count(gradient: Tensor) -> None:
        nonlocal backwards
        backwards += 1
        if backwards == 1:
            events["first"].record()

    ours.over[0].weight.register_hook(count)

    masks.append(mask)
    hotline.backward(batch, forward)
    torch.cuda.synchronize()
    assert (forwards, backwards) == (2, 2)
    assert events["begun"].elapsed_time(events["first"]) < events["begun"].elapsed_time(events["second"]) / 2


def test_nothing_waits_for_the_device_but_the_division() -> None:
    """What the ranks agree on is on the host; the joint batch and its update are launched without waiting."""
    torch.use_deterministic_algorithms(False)  # users' kernels: the deterministic ones may wait
    ours, hotline, masks = hotline_of(EmbeddingLocation.DEVICE)
    batch = make_batch((torch.arange(64) % 3 > 0).tolist(), 0)
    mask, batch = is_popular(batch), batch.to(torch.device(DEVICE))
    masks.append(mask)
    hotline.backward(batch, ours)  # what is set up once may wait
    runs, train = [], hotline._train_divided

    def strict(*arguments: Any) -> Tensor:
        runs.append(len(arguments))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return train(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    hotline._train_divided = strict  # type: ignore[method-assign, assignment]
    masks.append(mask)
    hotline.backward(batch, ours)
    assert len(runs) == 1
