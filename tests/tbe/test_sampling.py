"""Sampled look-ups: stock forward, exact live rows, and on average the full update of sampled ones."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from tests.tables import TBE, Lookups, filtered, make_lookups, make_tbe, table_states
from torchrec_slipstream.tbe import Sampling, sampling

ROWS = (50, 30)
FEATURES = (0, 1, 1)
VARIABLE = [[3, 4], [2, 5], [5, 0]]


def pair(pooling: PoolingMode, **more: object) -> tuple[TBE, TBE]:
    dims = (8, 8) if pooling == PoolingMode.NONE else (8, 16)
    make = lambda: make_tbe(ROWS, dims, features=FEATURES, pooling=pooling, optimizer=EmbOptimType.EXACT_SGD, **more)  # noqa: E731
    return make(), make()


def uneven_gradient(output: Tensor, seed: int) -> Tensor:
    """Samples with very different gradients, as a click model's."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(output.shape, generator=generator)
    if output.dim() == 2:
        return gradient * 10 ** (3 * torch.rand(output.shape[0], 1, generator=generator) - 2)
    return gradient


@pytest.mark.parametrize(
    ("pooling", "weighted", "variable"),
    [
        *(
            (pooling, w, v)
            for pooling in (PoolingMode.SUM, PoolingMode.MEAN)
            for w in (False, True)
            for v in (False, True)
        ),
        (PoolingMode.NONE, False, False),
    ],
)
def test_mean_of_many_draws_is_the_full_update(pooling: PoolingMode, weighted: bool, variable: bool) -> None:
    stock, ours = pair(pooling)
    live = torch.arange(80) % 3 == 0
    update_filter = filtered(ours, live)
    update_filter.sampling = Sampling(scale=0.7, least=0.2)
    lookups = make_lookups((50, 30, 30), (7, 7, 5) if variable else (7, 7, 7), weighted=weighted)
    if variable:
        lookups.batch_sizes = VARIABLE
    start = table_states(ours)
    expected = lookups.run(stock)
    gradient = uneven_gradient(expected, 1)
    expected.backward(gradient)
    full = [after[0] - before[0] for after, before in zip(table_states(stock), start, strict=True)]
    draws, means, squares = 400, [torch.zeros_like(f) for f in full], [torch.zeros_like(f) for f in full]
    for step in range(draws):
        for weights, state in zip(ours.split_embedding_weights(), start, strict=True):
            weights.copy_(state[0])
        update_filter.step = step
        output = lookups.run(ours)
        assert torch.equal(output, expected)
        output.backward(gradient)
        for mean, square, after, before in zip(means, squares, table_states(ours), start, strict=True):
            moved = after[0] - before[0]
            mean += moved / draws
            square += moved.square() / draws
    assert 0 < int(update_filter.skipped.sum()) < draws * lookups.indices.numel()
    begin = 0
    for mean, square, want in zip(means, squares, full, strict=True):
        alive = live[begin : begin + want.shape[0]]
        begin += want.shape[0]
        torch.testing.assert_close(mean[alive], want[alive], rtol=1e-4, atol=1e-6)
        error = ((square - mean.square()).clamp(min=0) / draws).sqrt()
        # Five standard errors, over some thousand entries.
        assert bool(((mean - want).abs() <= 5 * error + 1e-5)[~alive].all())
        assert float(error[~alive].max()) > 0


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD])
@pytest.mark.parametrize("dtype", [SparseType.FP32, SparseType.FP16])
def test_keeping_everything_is_stock_bit_for_bit(
    pooling: PoolingMode, optimizer: EmbOptimType, dtype: SparseType
) -> None:
    dims = (8, 8) if pooling == PoolingMode.NONE else (8, 16)
    stock, ours = (
        make_tbe(ROWS, dims, features=FEATURES, pooling=pooling, optimizer=optimizer, dtype=dtype) for _ in range(2)
    )
    filtered(ours, torch.zeros(80, dtype=torch.bool)).sampling = Sampling(scale=1.0, least=1.0)
    for seed in range(3):
        lookups = make_lookups((50, 30, 30), (9, 9, 9), seed=seed)
        outputs = [lookups.run(one) for one in (stock, ours)]
        assert torch.equal(outputs[0], outputs[1])
        for output in outputs:
            output.backward(uneven_gradient(output, seed))
    for want, got in zip(table_states(stock), table_states(ours), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_large_gradients_are_kept_and_small_ones_stand_for_many() -> None:
    tbe = make_tbe((100,), (8,), optimizer=EmbOptimType.EXACT_SGD)
    update_filter = filtered(tbe, torch.zeros(100, dtype=torch.bool))
    update_filter.sampling = Sampling(scale=1.0, least=0.01)
    lookups = Lookups(torch.arange(100), torch.arange(101))
    gradient = torch.full((100, 8), 0.01)
    gradient[:10] = 1.0
    moves = torch.zeros(100)
    kept = torch.zeros(100)
    for step in range(400):
        before = table_states(tbe)[0][0]
        update_filter.step = step
        lookups.run(tbe).backward(gradient)
        moved = (table_states(tbe)[0][0] - before).abs().mean(dim=1)
        moves += moved
        kept += moved > 0
    assert bool((kept[:10] == 400).all())
    # Their magnitude is 0.01 over a mean of 0.109: kept in one step of 11, then for 11.
    assert float(kept[10:].mean() / 400) == pytest.approx(0.01 / 0.109, rel=0.1)
    assert float(moves[10:].mean() / 400) == pytest.approx(0.1 * 0.01, rel=0.1)


def test_infinite_gradient_keeps_the_step_whole() -> None:
    tbe = make_tbe((10,), (8,), optimizer=EmbOptimType.EXACT_SGD)
    update_filter = filtered(tbe, torch.zeros(10, dtype=torch.bool))
    update_filter.sampling = Sampling(scale=1e-6, least=1e-6)
    gradient = torch.ones(10, 8)
    gradient[3, 2] = float("inf")
    before = table_states(tbe)[0][0]
    Lookups(torch.arange(10), torch.arange(11)).run(tbe).backward(gradient)
    assert bool((table_states(tbe)[0][0] != before).any(dim=1).all())


def test_draws_repeat_by_step_and_differ_between_steps_and_forwards() -> None:
    tbe = make_tbe((200,), (8,), optimizer=EmbOptimType.EXACT_SGD)
    update_filter = filtered(tbe, torch.zeros(200, dtype=torch.bool))
    update_filter.sampling = Sampling(scale=0.5, least=0.01)
    lookups = Lookups(torch.arange(200), torch.arange(201))

    def moved(step: int, forwards: int = 1) -> list[bool]:
        update_filter.step = step
        update_filter._draws = (0, 0)
        for _ in range(forwards):
            before = table_states(tbe)[0][0]
            lookups.run(tbe).backward(torch.ones(200, 8))
        return (table_states(tbe)[0][0] != before).any(dim=1).tolist()

    assert moved(7) == moved(7)
    assert moved(7) != moved(8)
    assert moved(7, forwards=2) != moved(7)


def test_probed_magnitudes_rank_samples_as_the_whole_gradient_does() -> None:
    layout = sampling.Layout(PoolingMode.SUM, [16] * 26)
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (3 * torch.rand(500, 1, generator=generator))
    gradient = size * torch.randn(500, 26 * 16, generator=generator)
    found = sampling.magnitudes(gradient, layout)
    assert float(found.mean()) == pytest.approx(1.0)
    torch.testing.assert_close(found / found.sum(), (size / size.sum()).squeeze(1), rtol=0.35, atol=0)


def test_mean_pooling_into_sixteen_bits_is_not_sampled() -> None:
    half = make_tbe(pooling=PoolingMode.MEAN)
    half.output_dtype = SparseType.FP16.as_int()
    live = torch.zeros(80, dtype=torch.bool)
    assert not filtered(half, live).can_sample
    assert filtered(make_tbe(pooling=PoolingMode.MEAN), live).can_sample


def test_second_backward_through_a_retained_graph_counts_once() -> None:
    tbe = make_tbe(ROWS)
    update_filter = filtered(tbe, torch.zeros(80, dtype=torch.bool))
    update_filter.sampling = Sampling(scale=1e-9, least=0.01)
    loss = make_lookups(ROWS, (20, 20)).run(tbe).sum()
    loss.backward(retain_graph=True)
    once = update_filter.skipped.clone()
    loss.backward()
    assert int(once.sum()) > 0
    assert torch.equal(update_filter.skipped, once)


def test_sample_without_a_gradient_moves_nothing() -> None:
    """Some samples' gradients are exactly zero (masked losses); one's row must not turn into NaN for that."""
    tbe = make_tbe((10,), (8,), optimizer=EmbOptimType.EXACT_SGD)
    update_filter = filtered(tbe, torch.zeros(10, dtype=torch.bool))
    for chosen in (Sampling(scale=0.5, least=0.1), Sampling(scale=1.0, least=1.0)):
        update_filter.sampling = chosen
        for gradient in (torch.zeros(10, 8), torch.eye(10, 8)):
            Lookups(torch.arange(10), torch.arange(11)).run(tbe).backward(gradient)
    assert bool(table_states(tbe)[0][0].isfinite().all())
    start = make_tbe((10,), (8,), optimizer=EmbOptimType.EXACT_SGD)
    assert torch.equal(table_states(tbe)[0][0][8:], table_states(start)[0][0][8:])
