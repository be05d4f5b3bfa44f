"""The update filter against a stock twin: exact forward, live rows as stock, stale rows untouched."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tables import TBE, Lookups, filtered, make_lookups, make_tbe, overlaid, set_live, table_states
from torchrec_slipstream import AttachError, LookupRangeError
from torchrec_slipstream.tbe import Sampling

OPTIMIZERS = [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_ROWWISE_ADAGRAD]
FEATURES = (0, 1, 1)  # the second table is shared by two features
ROWS = (50, 30)


def compare_after_step(
    stock: TBE, ours: TBE, live: Tensor, lookups: Lookups, *, gradient_seed: int = 0, tolerance: float = 0.0
) -> None:
    """One step on both; asserts the output equal, live rows equal to stock's, stale rows as they were."""
    before = table_states(ours)
    twin = Lookups(
        lookups.indices,
        lookups.offsets,
        lookups.weights.detach().clone().requires_grad_(lookups.weights.requires_grad)
        if lookups.weights is not None
        else None,
        lookups.batch_sizes,
    )
    expected, output = twin.run(stock), lookups.run(ours)
    assert torch.equal(output, expected)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(gradient_seed)).to(output.device)
    expected.backward(gradient)
    output.backward(gradient)
    if lookups.weights is not None and lookups.weights.requires_grad:
        assert twin.weights is not None
        assert torch.equal(lookups.weights.grad, twin.weights.grad)
    begin = 0
    for was, got, want in zip(before, table_states(ours), table_states(stock), strict=True):
        rows = was[0].shape[0]
        alive = live[begin : begin + rows]
        begin += rows
        for was_state, got_state, want_state in zip(was, got, want, strict=True):
            assert torch.equal(got_state[~alive], was_state[~alive])
            if tolerance == 0.0:
                assert torch.equal(got_state[alive], want_state[alive])
            else:
                torch.testing.assert_close(got_state[alive], want_state[alive], rtol=tolerance, atol=tolerance)


def random_live(share: float, seed: int = 1) -> Tensor:
    return torch.rand(sum(ROWS), generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
@pytest.mark.parametrize("dtype", [SparseType.FP32, SparseType.FP16])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_step_equals_stock(
    optimizer: EmbOptimType, pooling: PoolingMode, dtype: SparseType, index_dtype: torch.dtype
) -> None:
    dims = (8, 8) if pooling == PoolingMode.NONE else (8, 16)
    stock, ours = (
        make_tbe(ROWS, dims, features=FEATURES, optimizer=optimizer, pooling=pooling, dtype=dtype) for _ in range(2)
    )
    live = random_live(0.5)
    filtered(ours, live)
    lookups = make_lookups((50, 30, 30), (9, 9, 9), dtype=index_dtype)
    # A mean-pooled bag that is live in part has its gradient scaled and divided instead of divided once.
    tolerance = 0.0 if pooling != PoolingMode.MEAN else (1e-6 if dtype == SparseType.FP32 else 2e-3)
    compare_after_step(stock, ours, live, lookups, tolerance=tolerance)


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN])
@pytest.mark.parametrize("weights_need_gradient", [False, True])
@pytest.mark.parametrize("variable", [False, True])
def test_weighted_step_equals_stock(pooling: PoolingMode, weights_need_gradient: bool, variable: bool) -> None:
    stock, ours = (make_tbe(ROWS, features=FEATURES, pooling=pooling) for _ in range(2))
    live = random_live(0.4)
    filtered(ours, live)
    lookups = make_lookups((50, 30, 30), (7, 7, 5) if variable else (7, 7, 7), weighted=True)
    assert lookups.weights is not None
    lookups.weights.requires_grad_(weights_need_gradient)
    if variable:
        lookups.batch_sizes = [[3, 4], [2, 5], [5, 0]]
    compare_after_step(stock, ours, live, lookups)


@pytest.mark.parametrize("wanted", [[1, 0, 1], [0, 0, 0]])
def test_feature_requires_grad_is_the_callers(wanted: list[int]) -> None:
    """The filter passes its own feature_requires_grad to FBGEMM, yet the caller's decides the weights' gradient."""
    gradients = []
    for attach in (False, True):
        tbe = make_tbe(ROWS, features=FEATURES)
        if attach:
            filtered(tbe, random_live(0.5))
        lookups = make_lookups((50, 30, 30), (6, 6, 6), weighted=True)
        assert lookups.weights is not None
        weights = lookups.weights.requires_grad_()
        flags = torch.tensor(wanted, dtype=torch.int32)
        output = tbe(lookups.indices, lookups.offsets, per_sample_weights=weights, feature_requires_grad=flags)
        output.sum().backward()
        gradients.append(weights.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert bool((gradients[0] != 0).any()) == (1 in wanted)


@given(
    seed=st.integers(0, 2**16),
    bags=st.integers(1, 12),
    longest=st.integers(0, 6),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    pooling=st.sampled_from([PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE]),
    optimizer=st.sampled_from(OPTIMIZERS),
    weighted=st.booleans(),
    split=st.integers(-1, 12),
)
def test_any_batch(
    seed: int,
    bags: int,
    longest: int,
    share: float,
    pooling: PoolingMode,
    optimizer: EmbOptimType,
    weighted: bool,
    split: int,
) -> None:
    """Over shapes, empty bags, duplicates, weights, variable batches, everything live and everything stale."""
    sequence = pooling == PoolingMode.NONE
    stock, ours = (
        make_tbe(ROWS, (8, 8), features=FEATURES, pooling=pooling, optimizer=optimizer, seed=seed) for _ in range(2)
    )
    live = random_live(share, seed)
    filtered(ours, live)
    variable = 0 <= split <= bags and not sequence and optimizer != EmbOptimType.EXACT_ADAGRAD
    counts = (bags, split, bags) if variable else (bags,) * 3
    lookups = make_lookups((50, 30, 30), counts, longest=longest, seed=seed, weighted=weighted and not sequence)
    if variable:
        lookups.batch_sizes = [[split, bags - split], [split, 0], [0, bags]]
    compare_after_step(stock, ours, live, lookups, gradient_seed=seed, tolerance=1e-6)


def test_nothing_stale_takes_the_stock_path(monkeypatch: pytest.MonkeyPatch) -> None:
    tbe = make_tbe()
    filtered(tbe, torch.ones(80, dtype=torch.bool))

    def forbidden(*_: object) -> None:
        raise AssertionError("hooks were set though nothing is stale")

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", forbidden)
    lookups = make_lookups(ROWS, (4, 4))
    lookups.run(tbe).sum().backward()
    set_live(tbe._slipstream, torch.zeros(80, dtype=torch.bool))
    with torch.no_grad():
        lookups.run(tbe)  # a test pass needs no hooks either
    with pytest.raises(AssertionError, match="hooks were set"):
        lookups.run(tbe)


def test_gradient_clipping_clips_the_full_bags_gradient() -> None:
    clip = {"gradient_clipping": True, "max_gradient": 0.3}
    stock, ours = (make_tbe(ROWS, pooling=PoolingMode.MEAN, **clip) for _ in range(2))
    live = random_live(0.5)
    filtered(ours, live)
    compare_after_step(stock, ours, live, make_lookups(ROWS, (20, 20)), tolerance=1e-6)


def test_two_forwards_before_the_backwards() -> None:
    """Each backward cuts down its own forward's look-ups, also when the stale rows changed in between."""
    stock, ours = (make_tbe(ROWS, optimizer=EmbOptimType.EXACT_SGD) for _ in range(2))
    first, second = make_lookups(ROWS, (5, 5), seed=1), make_lookups(ROWS, (8, 8), seed=2)
    update_filter = filtered(ours, torch.zeros(80, dtype=torch.bool))
    before = table_states(ours)
    out_first = first.run(ours)
    set_live(update_filter, random_live(1.0))
    update_filter.any_stale = True  # keep the hooks, with every row live
    out_second = second.run(ours)
    out_first.sum().backward()
    for was, now in zip(before, table_states(ours), strict=True):
        assert torch.equal(was[0], now[0])
    out_second.sum().backward()
    second.run(stock).sum().backward()
    for want, now in zip(table_states(stock), table_states(ours), strict=True):
        assert torch.equal(want[0], now[0])


def test_backward_twice_through_a_retained_graph() -> None:
    stock, ours = (make_tbe(ROWS, optimizer=EmbOptimType.EXACT_SGD) for _ in range(2))
    live = random_live(0.5)
    filtered(ours, live)
    lookups = make_lookups(ROWS, (6, 6))
    for tbe in (stock, ours):
        loss = lookups.run(tbe).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert torch.equal(table_states(ours)[0][0][live[:50]], table_states(stock)[0][0][live[:50]])


def test_phase_selects_the_bit_of_the_pattern() -> None:
    tbe = make_tbe((4,), (8,), optimizer=EmbOptimType.EXACT_SGD)
    update_filter = filtered(tbe, torch.ones(4, dtype=torch.bool))
    update_filter.set_patterns(torch.tensor([0, 1]), torch.tensor([0b00000001, 0b10000000], dtype=torch.uint8))
    lookups = Lookups(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3]))
    for phase, moved in (
        (0, [True, False, True, False]),
        (7, [False, True, True, False]),
        (3, [False, False, True, False]),
    ):
        update_filter.phase = phase
        before = table_states(tbe)[0][0]
        lookups.run(tbe).sum().backward()
        assert (table_states(tbe)[0][0] != before).any(dim=1).tolist() == moved


def test_counts_lookups_touches_and_skips_by_feature() -> None:
    tbe = make_tbe(ROWS, features=FEATURES)
    live = random_live(0.5)
    update_filter = filtered(tbe, live)
    update_filter.counting = True
    begins = (0, 50, 50)
    expected = torch.zeros(80, dtype=torch.int32)
    skipped = [0, 0, 0]
    for seed in range(3):
        lookups = make_lookups((50, 30, 30), (9, 9, 9), seed=seed)
        lookups.run(tbe).sum().backward()
        for feature, begin in enumerate(begins):
            start, end = lookups.offsets[feature * 9], lookups.offsets[(feature + 1) * 9]
            rows = lookups.indices[start:end] + begin
            expected += torch.bincount(rows, minlength=80).to(torch.int32)
            skipped[feature] += int((~live[rows]).sum())
    assert torch.equal(update_filter.touches, expected)
    assert int(update_filter.lookups.sum()) == int(expected.sum())
    assert update_filter.skipped.tolist() == skipped
    update_filter.counting = False
    lookups.run(tbe)
    assert torch.equal(update_filter.touches, expected)


def test_keeps_class_state_and_detaches() -> None:
    tbe = make_tbe()
    stock_class, keys = type(tbe), list(tbe.state_dict())
    update_filter = filtered(tbe, random_live(0.0))
    assert isinstance(tbe, TBE)
    assert list(tbe.state_dict()) == keys
    with pytest.raises(AttachError, match="attached"):
        update_filter.attach()
    with pytest.raises(AttachError, match="detach"):
        copy.deepcopy(nn.ModuleList([tbe]))
    with pytest.raises(AttachError, match="cannot be pickled; save the model's state_dict"):
        pickle.dumps(tbe)
    update_filter.detach()
    update_filter.detach()
    assert type(tbe) is stock_class
    assert "_slipstream" not in vars(tbe)
    compare_after_step(make_tbe(), tbe, torch.ones(80, dtype=torch.bool), make_lookups(ROWS, (6, 6)))


def test_out_of_range_lookup_changes_nothing() -> None:
    """FBGEMM's bounds check stops it before any row or count moves; the message says which look-up it was."""
    tbe = make_tbe(ROWS, bounds_check_mode=BoundsCheckMode.FATAL)
    update_filter = filtered(tbe, random_live(0.5))
    update_filter.counting = True
    before = table_states(tbe)
    with pytest.raises(LookupRangeError, match=r"table table_1: look-up of row 30, but it has rows 0 to 29"):
        tbe(torch.tensor([3, 30]), torch.tensor([0, 1, 2]))
    with pytest.raises(LookupRangeError, match="table table_0: look-up of row -2"):
        tbe(torch.tensor([-2, 3, 3]), torch.tensor([0, 1, 2, 3]), batch_size_per_feature_per_rank=[[1], [2]])
    assert int(update_filter.touches.sum()) == 0
    assert int(update_filter.lookups.sum()) == 0
    for was, now in zip(before, table_states(tbe), strict=True):
        assert torch.equal(was[0], now[0])


def test_out_of_range_lookup_counts_for_the_row_that_fbgemm_put_in() -> None:
    tbe = make_tbe(ROWS, bounds_check_mode=BoundsCheckMode.WARNING)
    update_filter = filtered(tbe, torch.arange(80) != 1)
    update_filter.counting = True
    tbe(torch.tensor([3, 30]), torch.tensor([0, 1, 2])).sum().backward()
    assert update_filter.touches.nonzero().squeeze(1).tolist() == [3, 50]


def test_unknown_way_of_saving_fails_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """If an FBGEMM saved a copy of the indices, nothing would be left out in silence."""
    from torchrec_slipstream.tbe import backward

    tbe = make_tbe()
    filtered(tbe, random_live(0.5))
    before = table_states(tbe)
    monkeypatch.setattr(backward, "_same_memory", lambda one, other: False)
    with pytest.raises(RuntimeError, match=r"saves \['indices', 'offsets'\]"):
        make_lookups(ROWS, (4, 4)).run(tbe)
    for was, now in zip(before, table_states(tbe), strict=True):
        assert torch.equal(was[0], now[0])


def test_more_arguments_by_position() -> None:
    """FBGEMM's forward takes ten; TorchRec passes the later ones by name, others need not."""
    stock, ours = (make_tbe(ROWS) for _ in range(2))
    filtered(ours, random_live(0.5))
    lookups = make_lookups(ROWS, (9, 9))
    expected, output = (one(lookups.indices, lookups.offsets, *[None] * 8) for one in (stock, ours))
    assert torch.equal(output, expected)
    output.sum().backward()
    with pytest.raises(TypeError):
        ours(lookups.indices, lookups.offsets, *[None] * 9)


def test_total_unique_indices_reaches_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make_tbe(ROWS)
    seen = []
    stock = TBE.forward
    monkeypatch.setattr(TBE, "forward", lambda *a, **k: (seen.append(k["total_unique_indices"]), stock(*a, **k))[1])
    filtered(ours, random_live(0.5))
    lookups = make_lookups(ROWS, (9, 9))
    ours(lookups.indices, lookups.offsets, total_unique_indices=7)
    ours(lookups.indices, lookups.offsets, None, None, None, 8)
    assert seen == [7, 8]


@pytest.mark.parametrize("weighted", [False, True])
def test_indices_longer_than_the_last_offset_says(weighted: bool) -> None:
    """FBGEMM lets them pass where its bounds check is off, and reads no further than the offset."""
    stock, ours = (make_tbe(ROWS, bounds_check_mode=BoundsCheckMode.NONE) for _ in range(2))
    live = random_live(0.5)
    update_filter = filtered(ours, live)
    update_filter.counting = True
    lookups = make_lookups(ROWS, (9, 9), weighted=weighted)
    count = lookups.indices.numel()
    lookups.indices = torch.cat([lookups.indices, torch.tensor([10**6, 3])])
    if lookups.weights is not None:
        lookups.weights = torch.cat([lookups.weights, torch.ones(2)])
    compare_after_step(stock, ours, live, lookups)
    assert int(update_filter.touches.sum()) == int(update_filter.lookups.sum()) == count


@pytest.mark.parametrize("changed", ["indices", "weights"])
def test_inplace_change_before_the_backward_is_refused_as_by_autograd(changed: str) -> None:
    """Or a buffer that the user refills would send the gradient to other rows in silence."""
    for attach in (False, True):
        tbe = make_tbe(ROWS)
        if attach:
            filtered(tbe, random_live(0.5))
        lookups = make_lookups(ROWS, (9, 9), weighted=True)
        before = table_states(tbe)
        output = lookups.run(tbe)
        getattr(lookups, changed).zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        for was, now in zip(before, table_states(tbe), strict=True):
            assert torch.equal(was[0], now[0])


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
@pytest.mark.parametrize("samples", [False, True])
def test_batch_that_the_overlay_serves_alone(pooling: PoolingMode, samples: bool) -> None:
    """The backing TBE gets a batch without look-ups, of which there is nothing to leave out."""
    rows = (20, 10)
    stock, ours = (make_tbe(rows, (8, 8), pooling=pooling) for _ in range(2))
    live = torch.arange(30) % 3 > 0
    filtered(stock, live)
    update_filter = overlaid(ours, {8: 30}, live)
    overlay = update_filter.overlay
    assert overlay is not None
    overlay.promote(overlay.pools[0], torch.arange(30), torch.arange(30))
    for step in range(3):
        lookups = make_lookups(rows, (6, 6), seed=step)
        for tbe in (stock, ours):
            if samples:
                tbe._slipstream.sampling = Sampling(scale=1.0, least=0.1)
            lookups.run(tbe).square().sum().backward()
    assert int(overlay.hits.sum()) == int(update_filter.lookups.sum()) > 0
    for want, got in zip(table_states(stock), table_states(ours), strict=True):
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)
