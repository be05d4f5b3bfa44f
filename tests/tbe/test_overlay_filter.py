"""The overlay together with the update filter and the counts: as without an overlay, wherever rows are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tables import TBE, Lookups, filtered, make_lookups, make_tbe, move_rows, overlaid, set_live, table_states
from tests.tbe.test_overlay import DIMS, FEATURE_ROWS, FEATURES, OPTIMIZERS, ROWS, SLOTS, assert_near, padding, variable
from torchrec_slipstream.tbe import Sampling, UpdateFilter, part
from torchrec_slipstream.tbe.compaction import Compaction, Padded

__all__ = ["padding"]  # a fixture

POOLINGS = [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE]


def live_rows(seed: int, share: float = 0.5) -> Tensor:
    return torch.rand(sum(ROWS), generator=torch.Generator().manual_seed(seed)) < share


def filter_twins(
    pooling: PoolingMode, optimizer: EmbOptimType = EmbOptimType.EXACT_ADAGRAD
) -> tuple[TBE, TBE, UpdateFilter, UpdateFilter]:
    """Two TBEs with a filter each, the second with an overlay besides."""
    dims = (8, 8, 8) if pooling == PoolingMode.NONE else DIMS
    plain, ours = (make_tbe(ROWS, dims, features=FEATURES, pooling=pooling, optimizer=optimizer) for _ in range(2))
    first, second = filtered(plain, live_rows(0)), overlaid(ours, SLOTS, live_rows(0))
    for one in (first, second):
        one.counting = True
    return plain, ours, first, second


def compare(
    plain: TBE, ours: TBE, first: UpdateFilter, second: UpdateFilter, batches: list[Lookups], *, tolerance: float
) -> None:
    """Steps with moves in between, the stale rows changing; asserts updates, counts and what was left out equal."""
    assert second.overlay is not None
    for number, lookups in enumerate(batches):
        if number % 2 == 0:
            move_rows(second.overlay, number)
        if number == 2:
            second.overlay.release()
        live = live_rows(number // 3)
        results = []
        for tbe, one in ((plain, first), (ours, second)):
            set_live(one, live)
            one.step = number
            mine = copy.deepcopy(lookups)
            before = table_states(tbe) if number == 4 else None
            output = mine.run(tbe)
            output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(number)))
            results.append((output, mine.weights.grad if mine.weights is not None else None))
            if before is not None and one.sampling is None:
                begin = 0
                for was, now in zip(before, table_states(tbe), strict=True):
                    stale = ~live[begin : begin + len(was[0])]
                    begin += len(was[0])
                    assert all(torch.equal(a[stale], b[stale]) for a, b in zip(was, now, strict=True))
        (expected, expected_gradient), (output, gradient) = results
        assert_near(output, expected, tolerance)
        if expected_gradient is not None:
            assert_near(gradient, expected_gradient, tolerance)
    for got, want in zip(table_states(ours), table_states(plain), strict=True):
        for got_state, want_state in zip(got, want, strict=True):
            assert_near(got_state, want_state, tolerance)
    for name in ("touches", "lookups", "samples"):
        assert torch.equal(getattr(second, name), getattr(first, name)), name
    if first.sampling is None:
        assert torch.equal(second.skipped, first.skipped)
        assert int(first.skipped.sum()) > 0
    hits = second.overlay.hits
    assert int(hits.sum()) > 0
    assert bool((hits <= second.lookups).all())


def batches_of(longest: int, *, weighted: bool = False, gradient: bool = False, vary: bool = False) -> list[Lookups]:
    batches = []
    for seed in range(7):
        bags = (7, 7, 5, 6) if vary else (7,) * 4
        lookups = make_lookups(FEATURE_ROWS, bags, longest=longest, seed=seed, weighted=weighted)
        if lookups.weights is not None:
            lookups.weights.requires_grad_(gradient)
        batches.append(variable(lookups) if vary else lookups)
    return batches


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("longest", [1, 5])
def test_stale_rows_stay_and_live_rows_move(optimizer: EmbOptimType, pooling: PoolingMode, longest: int) -> None:
    pair = filter_twins(pooling, optimizer)
    exact = optimizer != EmbOptimType.EXACT_ROWWISE_ADAGRAD and (longest == 1 or pooling == PoolingMode.NONE)
    compare(*pair, batches_of(longest), tolerance=0.0 if exact else 1e-5)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("vary", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_weighted_and_variable_batches(pooling: PoolingMode, gradient: bool, vary: bool, sampled: bool) -> None:
    pair = filter_twins(pooling, EmbOptimType.EXACT_SGD)
    for one in pair[2:]:
        one.sampling = Sampling(0.5, 0.1) if sampled else None  # type: ignore[union-attr]
    compare(*pair, batches_of(5, weighted=True, gradient=gradient, vary=vary), tolerance=1e-5)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("pooling", POOLINGS)
def test_sampling_draws_the_same(pooling: PoolingMode) -> None:
    """Magnitudes and draws come from the batch as a whole, not from its sides."""
    pair = filter_twins(pooling)
    for one in pair[2:]:
        one.sampling, one.watching = Sampling(0.5, 0.1), True  # type: ignore[union-attr]
    compare(*pair, batches_of(5), tolerance=1e-5)
    first, second = pair[2:]
    assert torch.equal(torch.cat(second.magnitudes), torch.cat(first.magnitudes))
    assert torch.equal(second.skipped, first.skipped)
    assert 0 < int(first.skipped.sum()) < int(first.lookups.sum())


class _SeenByBackwards(TorchDispatchMode):
    """The indices and offsets that FBGEMM's backwards get."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        if "_backward_codegen_" in func._schema.name and {"indices", "offsets"} <= set(names):
            self.seen.append((args[names.index("indices")], args[names.index("offsets")]))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_backwards_see_no_padding(stale: bool, pooling: PoolingMode) -> None:
    """A CUDA backward sorts all the indices that it is given, whatever the offsets say."""
    _, ours, _, update_filter = filter_twins(pooling)
    assert update_filter.overlay is not None
    move_rows(update_filter.overlay, 0)
    update_filter.any_stale = stale
    output = batches_of(5)[0].run(ours)
    with _SeenByBackwards() as mode:
        output.sum().backward()
    assert len(mode.seen) == 2
    for indices, offsets in mode.seen:
        assert 0 < indices.numel() == int(offsets[-1])
        assert bool((indices >= 0).all())


def test_padding_gives_weights_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA kernel leaves there what stood there before: here NaN."""

    def uncleared(tbe: TBE, *rest: Any) -> Callable[[Tensor], Tensor]:
        gradient, end = weight_gradient(tbe, *rest), int(tbe._offsets[-1])
        return lambda output: torch.cat([gradient(output)[:end], torch.full((tbe._indices.numel() - end,), torch.nan)])

    weight_gradient = part.weight_gradient
    monkeypatch.setattr(part, "weight_gradient", uncleared)
    monkeypatch.setattr(Compaction, "of", Padded)
    compare(*filter_twins(PoolingMode.SUM), batches_of(5, weighted=True, gradient=True), tolerance=1e-5)


def test_hits_are_the_look_ups_of_hot_rows() -> None:
    _, ours, _, update_filter = filter_twins(PoolingMode.SUM)
    overlay = update_filter.overlay
    assert overlay is not None
    move_rows(overlay, 0)
    lookups = batches_of(5)[0]
    lookups.run(ours)
    with torch.no_grad():
        lookups.run(ours)  # which does not count
    hot = []
    for feature, table in enumerate(FEATURES):
        rows = lookups.indices[lookups.offsets[feature * 7] : lookups.offsets[(feature + 1) * 7]]
        hot.append(int(torch.isin(rows, overlay.hot_rows(table)).sum()))
    assert overlay.hits.tolist() == hot


@given(
    seed=st.integers(0, 2**16),
    share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    pooling=st.sampled_from(POOLINGS),
    sampled=st.booleans(),
    weighted=st.booleans(),
    padded=st.booleans(),
)
def test_any_step(seed: int, share: float, pooling: PoolingMode, sampled: bool, weighted: bool, padded: bool) -> None:
    """Everything stale, next to nothing, and everything live but the hooks kept."""
    plain, ours, first, second = filter_twins(pooling, EmbOptimType.EXACT_SGD)
    assert second.overlay is not None
    lookups = make_lookups(FEATURE_ROWS, (3,) * 4, seed=seed, weighted=weighted and pooling != PoolingMode.NONE)
    with pytest.MonkeyPatch.context() as patch:
        if padded:
            patch.setattr(Compaction, "of", Padded)
        for number in range(2):
            move_rows(second.overlay, seed + number)
            outputs = []
            for tbe, one in ((plain, first), (ours, second)):
                set_live(one, live_rows(seed, share))
                one.any_stale = True
                one.sampling = Sampling(0.5, 0.1) if sampled else None
                outputs.append(lookups.run(tbe))
                outputs[-1].backward(torch.randn(outputs[-1].shape, generator=torch.Generator().manual_seed(seed)))
            assert_near(outputs[1], outputs[0], 1e-5)
    for got, want in zip(table_states(ours), table_states(plain), strict=True):
        assert_near(got[0], want[0], 1e-5)
    assert torch.equal(second.skipped, first.skipped)
