"""The overlay of one TBE against a stock twin, while rows move: outputs, weights and optimizer state.

Everything runs twice: as on a CPU, and with the padding that a GPU has behind a side's look-ups
(``tbe/compaction.py``), which FBGEMM's CPU kernels read past as its CUDA kernels do.

Outputs are equal bit for bit where a bag has one look-up, and to the rounding of one more addition otherwise; what a
row is updated by does not depend on where it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tables import TBE, Lookups, make_lookups, make_tbe, move_rows, overlaid, table_states
from torchrec_slipstream.tbe.compaction import Compaction, Padded
from torchrec_slipstream.tbe.overlay import Overlay

OPTIMIZERS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]
# Features of mixed dims, the first and the last table's in one pool though another dim's stand between them.
ROWS, DIMS, FEATURES = (50, 30, 40), (8, 16, 8), (0, 1, 1, 2)
SLOTS = {8: 30, 16: 10}
FEATURE_ROWS = [ROWS[table] for table in FEATURES]


@pytest.fixture(params=["counted", "padded"])
def padding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "padded":
        monkeypatch.setattr(Compaction, "of", Padded)


def dims_of(pooling: PoolingMode) -> tuple[int, ...]:
    return (8, 8, 8) if pooling == PoolingMode.NONE else DIMS


def twins(**more: object) -> tuple[TBE, TBE, Overlay]:
    """A stock TBE, its twin with an overlay, and the overlay."""
    dims = dims_of(more.get("pooling", PoolingMode.SUM))  # type: ignore[arg-type]
    stock, ours = (make_tbe(ROWS, dims, features=FEATURES, **more) for _ in range(2))  # type: ignore[arg-type]
    overlay = overlaid(ours, SLOTS).overlay
    assert overlay is not None
    return stock, ours, overlay


def assert_near(got: Tensor, want: Tensor, tolerance: float) -> None:
    if tolerance == 0.0:
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def step(stock: TBE, ours: TBE, lookups: Lookups, *, tolerance: float, seed: int) -> None:
    """One training step on both."""
    twin = copy.deepcopy(lookups)
    expected, output = twin.run(stock), lookups.run(ours)
    assert_near(output, expected, tolerance)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    gradient = gradient.to(output.device, output.dtype)
    expected.backward(gradient)
    output.backward(gradient)
    if lookups.weights is not None and lookups.weights.requires_grad:
        assert twin.weights is not None
        assert_near(lookups.weights.grad, twin.weights.grad, tolerance)  # type: ignore[arg-type]


def assert_same_states(ours: TBE, stock: TBE, tolerance: float) -> None:
    for got, want in zip(table_states(ours), table_states(stock), strict=True):
        for got_state, want_state in zip(got, want, strict=True):
            assert_near(got_state, want_state, tolerance)


def train(
    stock: TBE,
    ours: TBE,
    overlay: Overlay,
    batches: Sequence[Lookups],
    *,
    tolerance: float,
    states: float | None = None,
) -> None:
    """Steps with moves, releases and test passes in between; ``states``: the tolerance of weights and states."""
    states = tolerance if states is None else states
    for number, lookups in enumerate(batches):
        if number % 2 == 0:
            move_rows(overlay, number)
        step(stock, ours, lookups, tolerance=tolerance, seed=number)
        if number % 3 == 1:
            with torch.no_grad():
                assert_near(lookups.run(ours), lookups.run(stock), tolerance)
        if number % 4 == 3:
            assert_same_states(ours, stock, states)  # which flushes: the rows are released
            if number % 8 == 3:
                move_rows(overlay, number + 100)  # while released
    assert_same_states(ours, stock, states)
    assert int(overlay.hits.sum()) > 0


def batches_of(count: int = 9, *, longest: int = 1, bags: Sequence[int] = (7,) * 4, **more: object) -> list[Lookups]:
    return [make_lookups(FEATURE_ROWS, bags, longest=longest, seed=i, **more) for i in range(count)]  # type: ignore[arg-type]


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
@pytest.mark.parametrize("dtype", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_equals_stock(
    optimizer: EmbOptimType, pooling: PoolingMode, dtype: SparseType, index_dtype: torch.dtype
) -> None:
    kinds = {"optimizer": optimizer, "pooling": pooling, "dtype": dtype}
    one_each = batches_of(dtype=index_dtype)
    train(*twins(**kinds), one_each, tolerance=0.0)
    longer = batches_of(longest=5, dtype=index_dtype)
    rounding = 1e-5 if dtype == SparseType.FP32 or pooling == PoolingMode.SUM else 5e-3
    train(
        *twins(**kinds),
        longer,
        tolerance=0.0 if pooling == PoolingMode.NONE else rounding,
        states=0.0 if pooling != PoolingMode.MEAN else rounding,
    )


def variable(lookups: Lookups) -> Lookups:
    lookups.batch_sizes = [[3, 4], [2, 5], [5, 0], [1, 5]]
    return lookups


VARIABLE_BAGS = (7, 7, 5, 6)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("weights_need_gradient", [False, True])
@pytest.mark.parametrize("vary", [False, True])
@pytest.mark.parametrize("longest", [1, 5])
def test_weighted_and_variable_batches(
    pooling: PoolingMode, optimizer: EmbOptimType, weights_need_gradient: bool, vary: bool, longest: int
) -> None:
    if vary and optimizer == EmbOptimType.EXACT_ADAGRAD:
        return  # FBGEMM has no variable batches for it
    batches = batches_of(7, longest=longest, weighted=True, bags=VARIABLE_BAGS if vary else (7,) * 4)
    for lookups in batches:
        assert lookups.weights is not None
        lookups.weights.requires_grad_(weights_need_gradient)
        if vary:
            variable(lookups)
    train(*twins(pooling=pooling, optimizer=optimizer), batches, tolerance=0.0 if longest == 1 else 1e-5)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD])
def test_variable_batches_without_weights(pooling: PoolingMode, optimizer: EmbOptimType) -> None:
    batches = [variable(lookups) for lookups in batches_of(7, longest=5, bags=VARIABLE_BAGS)]
    train(*twins(pooling=pooling, optimizer=optimizer), batches, tolerance=1e-5)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
def test_sixteen_bit_outputs(pooling: PoolingMode) -> None:
    train(*twins(pooling=pooling, output=SparseType.FP16), batches_of(longest=4), tolerance=5e-3)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_clipping_clips_the_full_bags_gradient(pooling: PoolingMode, weighted: bool) -> None:
    pair = twins(pooling=pooling, gradient_clipping=True, max_gradient=0.3)
    train(*pair, batches_of(longest=5, weighted=weighted), tolerance=1e-5)


@pytest.mark.usefixtures("padding")
def test_learning_rate_and_hyper_parameters_are_the_backings() -> None:
    stock, ours, overlay = twins(optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, weight_decay=0.01)
    for number, lookups in enumerate(batches_of(longest=5)):
        move_rows(overlay, number)
        for tbe in (stock, ours):
            if number == 3:
                tbe.set_learning_rate(0.5)
            if number == 5:
                tbe.update_hyper_parameters({"lr": 0.2, "eps": 0.01, "weight_decay": 0.1})
        step(stock, ours, lookups, tolerance=1e-5, seed=number)
    assert_same_states(ours, stock, 1e-5)


@pytest.mark.usefixtures("padding")
def test_two_forwards_before_the_backwards() -> None:
    """As gradients are accumulated, or a pipeline runs ahead; a checkpoint may come before the backwards."""
    stock, ours, overlay = twins()
    first, second = batches_of(2, longest=5)
    move_rows(overlay, 0)
    expected, outputs = ([lookups.run(tbe) for lookups in (first, second)] for tbe in (stock, ours))
    ours.flush()
    for number, (want, got) in enumerate(zip(expected, outputs, strict=True)):
        gradient = torch.randn(want.shape, generator=torch.Generator().manual_seed(number))
        want.backward(gradient)
        got.backward(gradient)
    assert_same_states(ours, stock, 1e-5)


def test_moves_between_a_forward_and_its_backward_are_refused() -> None:
    _, ours, overlay = twins()
    for meddle in (lambda: move_rows(overlay, 1), ours._slipstream.detach):
        move_rows(overlay, 0)
        output = batches_of(1, longest=5)[0].run(ours)
        meddle()
        before = table_states(ours)
        with pytest.raises(RuntimeError, match="moved between a forward and its backward"):
            output.sum().backward()
        for was, now in zip(before, table_states(ours), strict=True):
            assert torch.equal(was[0], now[0])


def test_what_is_written_into_the_stock_views_is_what_trains_on() -> None:
    """As a checkpoint is loaded: into the weights and the states that the backing TBE shows, while released."""
    stock, ours, overlay = twins()
    batches = batches_of(4, longest=3)
    move_rows(overlay, 0)
    for number, lookups in enumerate(batches):
        step(stock, ours, lookups, tolerance=1e-5, seed=number)
        ours.flush()
        for tbe in (stock, ours):
            generator = torch.Generator().manual_seed(number)
            for weights, states in zip(tbe.split_embedding_weights(), tbe.split_optimizer_states(), strict=True):
                for tensor in (weights, *states):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator))
    assert_same_states(ours, stock, 1e-5)


@given(
    seed=st.integers(0, 2**16),
    bags=st.integers(1, 9),
    longest=st.integers(0, 6),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    pooling=st.sampled_from([PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE]),
    optimizer=st.sampled_from(OPTIMIZERS),
    dtype=st.sampled_from([SparseType.FP32, SparseType.FP16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    weighted=st.sampled_from(["no", "yes", "with gradient"]),
    split=st.integers(-1, 9),
    features=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    dims=st.lists(st.sampled_from([4, 8, 16]), min_size=3, max_size=3),
    padded=st.booleans(),
)
def test_any_batch(
    seed: int,
    bags: int,
    longest: int,
    share: float,
    pooling: PoolingMode,
    optimizer: EmbOptimType,
    dtype: SparseType,
    index_dtype: torch.dtype,
    weighted: str,
    split: int,
    features: list[int],
    dims: list[int],
    padded: bool,
) -> None:
    """Over shapes, empty bags, duplicates, weights, variable batches, dtypes, features a table, sizes of the pools."""
    sequence = pooling == PoolingMode.NONE
    tables = sorted({0, 1, 2} | set(features))
    features = sorted([*features, *tables])
    dims = [8, 8, 8] if sequence else dims
    stock, ours = (
        make_tbe((9, 5, 7), dims, features=features, pooling=pooling, optimizer=optimizer, dtype=dtype, seed=seed)
        for _ in range(2)
    )
    slots = {dim: round(share * sum((9, 5, 7)[t] for t in tables if dims[t] == dim)) for dim in set(dims)}
    overlay = overlaid(ours, slots).overlay
    assert overlay is not None
    vary = 0 <= split <= bags and not sequence and optimizer != EmbOptimType.EXACT_ADAGRAD
    if vary:
        index_dtype = torch.int64  # FBGEMM 1.8's CPU writes past its memory for variable batches of int32
    with pytest.MonkeyPatch.context() as patch:
        if padded:
            patch.setattr(Compaction, "of", Padded)
        for number in range(3):
            counts = [split if vary and f % 2 else bags for f in range(len(features))]
            lookups = make_lookups(
                [(9, 5, 7)[t] for t in features],
                counts,
                longest=longest,
                seed=seed + number,
                dtype=index_dtype,
                weighted=weighted != "no" and not sequence,
            )
            if lookups.weights is not None:
                lookups.weights.requires_grad_(weighted == "with gradient")
            if vary:
                lookups.batch_sizes = [[0, count] if f % 3 else [count, 0] for f, count in enumerate(counts)]
            move_rows(overlay, seed + number)
            if (lookups.weights is not None and lookups.weights.requires_grad) and not lookups.weights.numel():
                continue
            step(stock, ours, lookups, tolerance=1e-5 if dtype == SparseType.FP32 else 1e-2, seed=number)
    assert_same_states(ours, stock, 1e-5 if dtype == SparseType.FP32 else 1e-2)
