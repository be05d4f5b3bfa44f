"""The overlay on CUDA against a stock twin: in HBM, over a backing TBE in UVM, as tests/tbe/test_overlay.py on the CPU.

What FBGEMM's CUDA kernels do with a side's padding, read in its source at v1.6.0 and v1.8.0 (no run has confirmed it
for us yet), is said where the package relies on it: ``tbe/routing.py``, ``preparing.py``, ``backing.py``,
``overlay_tbe.py``. The rest that makes the equality hold:

* a row's look-ups are all on one side, in the batch's order, so that its run has stock's length and order and takes the
  kernel (warp or block) that stock's takes; ``max_D`` and with it the kernel's template are the same, since the overlay
  has the dims of the features;
* a bag of one look-up adds a zero to it;
* ``torch.use_deterministic_algorithms`` keeps long runs from being split over blocks (test_update_filter_cuda.py).

16-bit tables round stochastically by default, two steps do not compare bit for bit: they are left out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm, EmbeddingLocation, PoolingMode
from torch import nn

from tests.tables import TBE, Lookups, make_lookups, make_tbe, move_rows, overlaid, set_live, table_states
from tests.tbe.test_overlay import (
    FEATURE_ROWS,
    FEATURES,
    ROWS,
    SLOTS,
    assert_near,
    assert_same_states,
    dims_of,
    step,
    train,
    variable,
)
from torchrec_slipstream.tbe import UpdateFilter, find_tbes
from torchrec_slipstream.tbe.overlay import Overlay

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# A cache of one set of 32 rows: nearly every batch evicts.
CACHED = {"location": EmbeddingLocation.MANAGED_CACHING, "cache_sets": 1}
BACKINGS = {
    "uvm": {"location": EmbeddingLocation.MANAGED},
    "host-mapped": {"location": EmbeddingLocation.MANAGED, "uvm_host_mapped": True},
    "lru": CACHED | {"cache_algorithm": CacheAlgorithm.LRU},
    "lfu": CACHED | {"cache_algorithm": CacheAlgorithm.LFU},
}
POOLINGS = [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE]
OPTIMIZERS = [
    EmbOptimType.EXACT_SGD,
    EmbOptimType.EXACT_ADAGRAD,
    EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    EmbOptimType.ADAM,
    EmbOptimType.PARTIAL_ROWWISE_ADAM,
    EmbOptimType.LAMB,
    EmbOptimType.LARS_SGD,
]


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def one_tbe(backing: str, pooling: PoolingMode, optimizer: EmbOptimType, **more: object) -> TBE:
    return make_tbe(
        ROWS,
        dims_of(pooling),
        features=FEATURES,
        pooling=pooling,
        optimizer=optimizer,
        device=DEVICE,
        **BACKINGS[backing],  # type: ignore[arg-type]
        **more,
    )


def cuda_twins(
    backing: str, pooling: PoolingMode = PoolingMode.SUM, optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD
) -> tuple[TBE, TBE, Overlay]:
    stock, ours = (one_tbe(backing, pooling, optimizer) for _ in range(2))
    overlay = overlaid(ours, SLOTS).overlay
    assert overlay is not None
    return stock, ours, overlay


def batches_of(count: int = 9, *, longest: int = 1, weighted: bool = False, vary: bool = False) -> list[Lookups]:
    bags = (7, 7, 5, 6) if vary else (7,) * 4
    batches = [
        make_lookups(FEATURE_ROWS, bags, longest=longest, seed=seed, weighted=weighted, device=DEVICE)
        for seed in range(count)
    ]
    return [variable(lookups) for lookups in batches] if vary else batches


def rounding(optimizer: EmbOptimType) -> float:
    # Adam's first step is the gradient's sign: where the gradient is next to nothing a rounding shows more.
    adam = (EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM, EmbOptimType.LAMB)
    return 1e-4 if optimizer in adam else 1e-5


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_stock(backing: str, pooling: PoolingMode, optimizer: EmbOptimType) -> None:
    train(*cuda_twins(backing, pooling, optimizer), batches_of(), tolerance=0.0)
    longer, near = batches_of(longest=5), rounding(optimizer)
    train(
        *cuda_twins(backing, pooling, optimizer),
        longer,
        tolerance=0.0 if pooling == PoolingMode.NONE else near,
        states=near if pooling == PoolingMode.MEAN else 0.0,
    )


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_stock_with_users_kernels(backing: str, pooling: PoolingMode) -> None:
    """Scatters, fills and copies of rows run other kernels where determinism is asked for, as it is in this file."""
    torch.use_deterministic_algorithms(False)
    train(*cuda_twins(backing, pooling, EmbOptimType.EXACT_ROWWISE_ADAGRAD), batches_of(longest=5), tolerance=1e-5)


@pytest.mark.parametrize("backing", ["uvm", "lru"])
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("vary", [False, True])
def test_weighted_and_variable_batches(backing: str, pooling: PoolingMode, needs_gradient: bool, vary: bool) -> None:
    batches = batches_of(longest=5, weighted=True, vary=vary)
    for lookups in batches:
        assert lookups.weights is not None
        lookups.weights.requires_grad_(needs_gradient)
    train(*cuda_twins(backing, pooling), batches, tolerance=1e-5)


@pytest.mark.parametrize("backing", ["uvm", "lru"])
@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.ADAM])
def test_variable_batches_without_weights(backing: str, optimizer: EmbOptimType) -> None:
    batches = batches_of(longest=5, vary=True)
    train(*cuda_twins(backing, PoolingMode.MEAN, optimizer), batches, tolerance=rounding(optimizer))


def test_an_output_that_several_tbes_share() -> None:
    """``vbe_output``, as TorchRec gives it: the other TBEs' part of it stays, and is counted once."""
    stock, ours, overlay = cuda_twins("uvm")
    move_rows(overlay, 0)
    lookups = batches_of(1, longest=5, vary=True)[0]
    assert lookups.batch_sizes is not None
    dims, ranks = [dims_of(PoolingMode.SUM)[table] for table in FEATURES], 2
    begins, at = [], 3  # three values of another TBE come first
    for rank in range(ranks):
        begins.append([])
        for feature, dim in enumerate(dims):
            begins[-1].append(at)
            at += lookups.batch_sizes[feature][rank] * dim
    outputs = []
    for tbe in (stock, ours):
        shared = torch.full((at + 2,), 7.0, device=DEVICE)
        outputs.append(
            tbe(
                lookups.indices,
                lookups.offsets,
                batch_size_per_feature_per_rank=lookups.batch_sizes,
                vbe_output=shared,
                vbe_output_offsets=torch.tensor(begins, device=DEVICE),
            )
        )
        outputs[-1].backward(torch.linspace(-1, 1, at + 2, device=DEVICE).view_as(outputs[-1]))
    assert_near(outputs[1], outputs[0], 1e-5)
    assert outputs[1].view(-1)[:3].tolist() == [7.0] * 3
    assert_same_states(ours, stock, 1e-5)


@pytest.mark.parametrize("backing", ["lru", "lfu"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_moved_between_prefetch_and_forward(backing: str, pooling: PoolingMode) -> None:
    stock, ours, overlay = cuda_twins(backing, pooling)
    for number, lookups in enumerate(batches_of(12, longest=5)):
        for tbe in (stock, ours):
            tbe.prefetch(lookups.indices, lookups.offsets)
        if number % 3 == 2:
            ours.flush()  # a checkpoint: released when the forward comes
        move_rows(overlay, number)
        step(stock, ours, lookups, tolerance=1e-5, seed=number)
    assert_same_states(ours, stock, 1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_prefetch_pipeline(pooling: PoolingMode) -> None:
    """As PrefetchTrainPipelineSparseDist does: the next batch is prefetched on a stream of its own before the backward.

    ``find_tbes`` refuses such a TBE for the update filter's sake; the overlay alone can live with it.
    """
    optimizer = EmbOptimType.EXACT_ROWWISE_ADAGRAD
    stock, ours = (one_tbe("lru", pooling, optimizer, prefetch_pipeline=True) for _ in range(2))
    found = replace(find_tbes(nn.ModuleList([one_tbe("lru", pooling, optimizer)]))[0], tbe=ours)
    update_filter = UpdateFilter(found)
    update_filter.overlay = overlay = Overlay(found, SLOTS)
    update_filter.attach()
    main, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    batches = batches_of(12, longest=5)

    def prefetch(lookups: Lookups) -> None:
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            for tbe in (stock, ours):
                tbe.prefetch(lookups.indices, lookups.offsets, main)

    prefetch(batches[0])
    for number, lookups in enumerate(batches):
        main.wait_stream(beside)
        expected, output = lookups.run(stock), lookups.run(ours)
        assert_near(output, expected, 1e-5)
        if number + 1 < len(batches):
            prefetch(batches[number + 1])
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(number)).to(DEVICE)
        expected.backward(gradient)
        output.backward(gradient)
        overlay.wait_for_prefetch()
        move_rows(overlay, number)
    assert_same_states(ours, stock, 1e-5)
    assert int(ours.lxu_cache_locking_counter.sum()) == 0


@pytest.mark.parametrize("backing", ["lru", "lfu"])
def test_rows_that_come_back_before_the_forward(backing: str) -> None:
    """Prefetched into the cache, made hot, and cold again: they are no longer where the prefetch found them."""
    stock, ours, overlay = cuda_twins(backing)
    for number, lookups in enumerate(batches_of(6, longest=5)):
        for tbe in (stock, ours):
            tbe.prefetch(lookups.indices, lookups.offsets)
        for again in range(3):
            move_rows(overlay, 10 * number + again)
        for place, pool in overlay.pool_of.items():
            overlay.demote(pool, overlay.hot_rows(place) + overlay.space.begins[place])
        step(stock, ours, lookups, tolerance=1e-5, seed=number)
    assert_same_states(ours, stock, 1e-5)


def test_newer_rows_of_the_cache_are_not_lost() -> None:
    """Trained while cached and never flushed, then promoted, and read from the table without another step."""
    stock, ours, overlay = cuda_twins("lru")
    step(stock, ours, batches_of(1, longest=5)[0], tolerance=0.0, seed=0)
    move_rows(overlay, 0)
    assert_same_states(ours, stock, 0.0)
    assert not overlay.dirty or overlay.released


@pytest.mark.parametrize("backing", ["uvm", "lru"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_with_the_update_filter(backing: str, pooling: PoolingMode) -> None:
    stock, ours, overlay = cuda_twins(backing, pooling)
    live = torch.rand(sum(ROWS), generator=torch.Generator().manual_seed(1)) < 0.5
    for number, lookups in enumerate(batches_of(6, longest=5)):
        move_rows(overlay, number)
        before = table_states(ours)
        set_live(ours._slipstream, live)
        step(stock, ours, lookups, tolerance=1e-5, seed=number)
        begin = 0
        for was, got, want in zip(before, table_states(ours), table_states(stock), strict=True):
            alive = live[begin : begin + len(was[0])]
            begin += len(was[0])
            for was_state, got_state, want_state in zip(was, got, want, strict=True):
                assert torch.equal(got_state[~alive], was_state[~alive])
                assert_near(got_state[alive], want_state[alive], 1e-5)
        # From here on both again: the stale rows as they are with us.
        copy_states(ours, stock)


def copy_states(source: TBE, target: TBE) -> None:
    target.flush()
    target.reset_cache_states()
    for which in ("split_embedding_weights", "split_optimizer_states"):
        for mine, theirs in zip(getattr(source, which)(), getattr(target, which)(), strict=True):
            pairs = [(mine, theirs)] if isinstance(mine, torch.Tensor) else zip(mine, theirs, strict=True)
            for values, there in pairs:
                there.copy_(values)


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("stale", [False, True])
def test_forward_does_not_wait_for_the_device(backing: str, pooling: PoolingMode, stale: bool) -> None:
    torch.use_deterministic_algorithms(False)  # users' kernels: the deterministic ones may wait
    _, ours, overlay = cuda_twins(backing, pooling, EmbOptimType.ADAM)
    move_rows(overlay, 0)
    update_filter = ours._slipstream
    update_filter.counting, update_filter.any_stale = True, stale
    weighted = pooling != PoolingMode.NONE
    lookups = batches_of(1, longest=5, weighted=weighted)[0]
    if lookups.weights is not None:
        lookups.weights.requires_grad_()
    lookups.run(ours).sum().backward()  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = lookups.run(ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    output.sum().backward()
