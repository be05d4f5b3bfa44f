"""The update filter on CUDA against a stock twin, as tests/tbe/test_update_filter.py on the CPU.

What FBGEMM's CUDA backward does with a compacted batch, read in its source at v1.6.0, ``fbgemm_gpu/codegen/training/
backward`` (no run has confirmed it for us yet):

* ``embedding_backward_split_template.cu`` sorts look-ups by row and hands each row's run to a warp, or, where a run is
  long, to a block; runs of more than ``max_segment_length_per_cta`` (1024) are split over blocks, whose partial sums
  meet by ``gpuAtomicAdd`` (kernel_cta_template.cu) in no fixed order. A row is live or stale as a whole in a step, so
  its run has stock's length and order and takes stock's path: bit for bit, but for what stock does not repeat itself.
  Under ``torch.use_deterministic_algorithms`` no run is split; the tests set it.
* ``indices.numel() == 0`` returns at once: a batch that is all stale updates nothing.
* ``info_B`` packs (sample, feature) by the number of bags and features, which compaction does not change.
* Mean pooling divides by the compacted length for weighted look-ups also (``grad_mean`` in
  ``embedding_backward_split_grad_template.cu`` does not ask), hence the factor that the filter multiplies by: a
  rounding in a bag that is live in part.
* ``embedding_backward_split_indice_weights_template.cu`` takes ``feature_requires_grad`` as int32 ``[T]`` on the GPU;
  all zeros skip its work. Stock accumulates one weight's gradient in one warp, without atomics.
* ``lxu_cache_locations`` is one a look-up and is sorted beside the rows, unless ``use_uniq_cache_locations_bwd``
  (prefetch_pipeline=True), which ``find_tbes`` refuses.
* 16-bit tables round stochastically by default: two steps do not compare bit for bit, so they are left out here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from torch import nn

from tests.tables import TBE, filtered, make_lookups, make_tbe, table_states
from tests.tbe.test_update_filter import FEATURES, ROWS, compare_after_step, random_live
from torchrec_slipstream import Slipstream, SlipstreamConfig, StalenessConfig

pytestmark = pytest.mark.gpu

LOCATIONS = [EmbeddingLocation.DEVICE, EmbeddingLocation.MANAGED, EmbeddingLocation.MANAGED_CACHING]
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


def pair(
    pooling: PoolingMode,
    location: EmbeddingLocation = EmbeddingLocation.DEVICE,
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
) -> tuple[TBE, TBE]:
    dims = (8, 8) if pooling == PoolingMode.NONE else (8, 16)
    stock, ours = (
        make_tbe(ROWS, dims, features=FEATURES, pooling=pooling, optimizer=optimizer, device="cuda", location=location)
        for _ in range(2)
    )
    return stock, ours


def tolerance_of(pooling: PoolingMode, optimizer: EmbOptimType) -> float:
    if pooling != PoolingMode.MEAN:
        return 0.0
    # Adam's first step is the gradient's sign: where the gradient is next to nothing a rounding shows more.
    adam = (EmbOptimType.ADAM, EmbOptimType.PARTIAL_ROWWISE_ADAM, EmbOptimType.LAMB)
    return 1e-4 if optimizer in adam else 1e-6


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_equals_stock(location: EmbeddingLocation, pooling: PoolingMode, optimizer: EmbOptimType) -> None:
    stock, ours = pair(pooling, location, optimizer)
    live = random_live(0.5)
    filtered(ours, live)
    lookups = make_lookups((50, 30, 30), (9, 9, 9), device="cuda")
    compare_after_step(stock, ours, live, lookups, tolerance=tolerance_of(pooling, optimizer))


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("variable", [False, True])
def test_weighted_and_variable_batches(
    location: EmbeddingLocation, pooling: PoolingMode, needs_gradient: bool, variable: bool
) -> None:
    stock, ours = pair(pooling, location)
    live = random_live(0.4)
    filtered(ours, live)
    lookups = make_lookups((50, 30, 30), (7, 7, 5) if variable else (7, 7, 7), weighted=True, device="cuda")
    assert lookups.weights is not None
    lookups.weights.requires_grad_(needs_gradient)
    if variable:
        lookups.batch_sizes = [[3, 4], [2, 5], [5, 0]]
    compare_after_step(stock, ours, live, lookups, tolerance=tolerance_of(pooling, ours.optimizer))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_stale_and_all_live(pooling: PoolingMode, share: float) -> None:
    stock, ours = pair(pooling)
    live = random_live(share)
    filtered(ours, live).any_stale = True
    compare_after_step(stock, ours, live, make_lookups((50, 30, 30), (9, 9, 9), device="cuda"))


def test_rows_of_long_runs() -> None:
    """Runs that a block takes, not a warp: 50 rows and thousands of look-ups."""
    stock, ours = pair(PoolingMode.SUM)
    live = random_live(0.5)
    filtered(ours, live)
    compare_after_step(stock, ours, live, make_lookups((50, 30, 30), (3000,) * 3, longest=20, device="cuda"))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_forward_does_not_wait_for_the_device(pooling: PoolingMode) -> None:
    torch.use_deterministic_algorithms(False)  # users' kernels: the deterministic ones may wait
    _, ours = pair(pooling)
    filtered(ours, random_live(0.5)).counting = True
    lookups = make_lookups((50, 30, 30), (9, 9, 9), device="cuda")
    lookups.run(ours).sum().backward()  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = lookups.run(ours)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    output.sum().backward()


@pytest.mark.parametrize("selection", ["sampling", "duty", "threshold"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_session_of_a_hundred_steps(selection: str, location: EmbeddingLocation) -> None:
    _, ours = pair(PoolingMode.SUM, location)
    start = table_states(ours)
    config = StalenessConfig(where="everywhere", selection=selection, interval=10, warmup_steps=20, max_table_share=1.0)
    session = Slipstream(nn.ModuleList([ours]), SlipstreamConfig(staleness=config))
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        output = make_lookups((50, 30, 30), (16, 16, 16), seed=step, device="cuda").run(ours)
        output.backward(torch.randn(output.shape, generator=generator).cuda())
        session.step()
    report = session.report()
    assert len(report.decisions) == 9
    assert report.measured_share == pytest.approx(0.5, abs=0.1)
    for was, now in zip(start, table_states(ours), strict=True):
        assert bool(now[0].isfinite().all())
        assert not torch.equal(was[0], now[0])
