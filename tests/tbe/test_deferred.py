"""Micro-batches with deferred updates against the whole batch, given equal gradients: bit for bit, in whatever mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, PoolingMode
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tables import TBE, Lookups, filtered, make_lookups, make_tbe, move_rows, overlaid, set_live, table_states
from tests.tbe.test_overlay import DIMS, FEATURE_ROWS, FEATURES, OPTIMIZERS, ROWS, SLOTS, padding
from torchrec_slipstream import AttachError, LookupRangeError
from torchrec_slipstream.errors import InputError
from torchrec_slipstream.tbe import Sampling, UpdateFilter, find_tbes
from torchrec_slipstream.tbe.deferred import DeferredUpdates, check_can_defer

__all__ = ["padding"]  # a fixture

POOLINGS = [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE]
MODES = ["plain", "stale", "sampled", "overlay", "overlay_stale", "overlay_sampled"]


def part_of(lookups: Lookups, samples: Sequence[int], features: int = len(FEATURES)) -> tuple[Lookups, Tensor]:
    """The bags of some samples, and which of the batch's look-ups theirs are."""
    bags = (lookups.offsets.numel() - 1) // features
    places: list[int] = []
    ends = [0]
    for feature in range(features):
        for sample in samples:
            begin, end = lookups.offsets[feature * bags + sample :][:2].tolist()
            places += range(begin, end)
            ends.append(len(places))
    device = lookups.indices.device
    at = torch.tensor(places, dtype=torch.int64, device=device)
    weights = lookups.weights[at] if lookups.weights is not None else None
    return Lookups(lookups.indices[at], torch.tensor(ends, dtype=lookups.offsets.dtype, device=device), weights), at


def train_in_parts(
    tbe: TBE, lookups: Lookups, parts: Sequence[Sequence[int]], gradient_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """One step in micro-batches; the output put together. All forwards come first."""
    features = len(tbe.feature_table_map)
    sequence = tbe.pooling_mode == PoolingMode.NONE
    with DeferredUpdates([tbe._slipstream]) as updates:
        outputs, places = [], []
        for samples in parts:
            micro, at = part_of(lookups, samples, features)
            updates.next_micro_batch()
            outputs.append(micro.run(tbe))
            places.append(at if sequence else torch.tensor(samples, dtype=torch.int64, device=at.device))
        whole = torch.cat([one.detach() for one in outputs])[torch.cat(places).argsort()]
        gradient = gradient_of(whole)
        for output, at in zip(outputs, places, strict=True):
            output.backward(gradient[at])
        updates.apply([torch.tensor(samples, dtype=torch.int64) for samples in parts])
    return whole


def random_gradient(seed: int) -> Callable[[Tensor], Tensor]:
    return lambda output: torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.device)


def train_whole(tbe: TBE, lookups: Lookups, gradient_of: Callable[[Tensor], Tensor]) -> Tensor:
    output = lookups.run(tbe)
    output.backward(gradient_of(output.detach()))
    return output.detach()


def divided(bags: int, parts: int, seed: int) -> list[list[int]]:
    """Every sample in one of the parts, at random; some parts may be small or empty."""
    of = torch.randint(0, parts, (bags,), generator=torch.Generator().manual_seed(seed))
    return [(of == part).nonzero().squeeze(1).tolist() for part in range(parts)]


def assert_same_tables(one: TBE, other: TBE) -> None:
    for got, want in zip(table_states(one), table_states(other), strict=True):
        for got_state, want_state in zip(got, want, strict=True):
            assert torch.equal(got_state, want_state)


def twins(mode: str, **options: Any) -> tuple[TBE, TBE]:
    """Two equal TBEs, each in the mode: to be trained whole and in parts."""
    pair = []
    for _ in range(2):
        dims = (8, 8, 8) if options.get("pooling") == PoolingMode.NONE else DIMS
        tbe = make_tbe(ROWS, dims, features=FEATURES, **options)
        live = torch.rand(sum(ROWS), generator=torch.Generator().manual_seed(1)) < (0.5 if "_" in mode else 0.3)
        live |= mode in ("plain", "overlay")
        one = overlaid(tbe, SLOTS, live) if mode.startswith("overlay") else filtered(tbe, live)
        one.sampling = Sampling(0.7, 0.1) if mode.endswith("sampled") else None
        one.counting = one.watching = True
        pair.append(tbe)
    return pair[0], pair[1]


def compare_steps(mode: str, batches: Sequence[Lookups], seed: int, parts: int, **options: Any) -> None:
    whole, ours = twins(mode, **options)
    stock = make_tbe(
        ROWS, (8, 8, 8) if options.get("pooling") == PoolingMode.NONE else DIMS, features=FEATURES, **options
    )
    first, second = whole._slipstream, ours._slipstream
    for number, lookups in enumerate(batches):
        bags = (lookups.offsets.numel() - 1) // len(FEATURES)
        gradient_of = random_gradient(seed + number)
        for one in (first, second):
            one.step = number
            if one.overlay is not None:
                move_rows(one.overlay, number)
        expected = train_whole(whole, copy.deepcopy(lookups), gradient_of)
        output = train_in_parts(ours, lookups, divided(bags, parts, seed + number), gradient_of)
        assert torch.equal(output, expected)
        if mode == "plain":
            train_whole(stock, copy.deepcopy(lookups), gradient_of)
    assert_same_tables(ours, stock if mode == "plain" else whole)
    for name in ("touches", "lookups", "samples", "skipped"):
        assert torch.equal(getattr(second, name), getattr(first, name)), name
    assert all(torch.equal(a, b) for a, b in zip(first.magnitudes, second.magnitudes, strict=True))
    if first.overlay is not None and second.overlay is not None:
        assert torch.equal(first.overlay.hits, second.overlay.hits)
    if hasattr(ours, "iter_cpu"):
        assert torch.equal(ours.iter_cpu, whole.iter_cpu)
        assert torch.equal(ours.iter, whole.iter)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_update_of_the_whole_batch(mode: str, pooling: PoolingMode, optimizer: EmbOptimType) -> None:
    batches = [make_lookups(FEATURE_ROWS, (9,) * 4, seed=seed) for seed in range(3)]
    compare_steps(mode, batches, 0, 2, pooling=pooling, optimizer=optimizer)


@given(
    seed=st.integers(0, 2**16),
    bags=st.integers(1, 12),
    longest=st.integers(0, 6),
    pooling=st.sampled_from(POOLINGS),
    optimizer=st.sampled_from(OPTIMIZERS),
    weighted=st.booleans(),
    mode=st.sampled_from(MODES),
    parts=st.integers(1, 3),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_any_division_of_any_batch(
    seed: int,
    bags: int,
    longest: int,
    pooling: PoolingMode,
    optimizer: EmbOptimType,
    weighted: bool,
    mode: str,
    parts: int,
    index_dtype: torch.dtype,
) -> None:
    """Empty parts, empty bags, duplicates between the parts, weights; several steps."""
    weighted = weighted and pooling != PoolingMode.NONE
    batches = [
        make_lookups(FEATURE_ROWS, (bags,) * 4, longest=longest, seed=seed + i, weighted=weighted, dtype=index_dtype)
        for i in range(2)
    ]
    compare_steps(mode, batches, seed, parts, pooling=pooling, optimizer=optimizer)


def test_without_deferral_two_updates_differ() -> None:
    """Or the tests above would prove nothing."""
    whole, ours = twins("plain")
    lookups = make_lookups(FEATURE_ROWS, (9,) * 4)
    gradient = random_gradient(0)(torch.empty(9, ours.total_D))
    lookups.run(whole).backward(gradient)
    for samples in divided(9, 2, 0):
        part_of(lookups, samples)[0].run(ours).backward(gradient[samples])
    with pytest.raises(AssertionError):
        assert_same_tables(ours, whole)


def test_popular_part_that_only_the_overlay_serves() -> None:
    """And so the backing TBE has no look-up in one part; nor has the overlay in the other."""
    whole, ours = twins("overlay", optimizer=EmbOptimType.EXACT_ADAGRAD)
    for tbe in (whole, ours):
        overlay = tbe._slipstream.overlay
        for place, pool in overlay.pool_of.items():
            rows = torch.arange(10) + overlay.space.begins[place]
            slots = torch.arange(10) + 10 * pool.shards.index(place)
            overlay.promote(pool, rows, slots)
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(0, 10, (4, 3), generator=generator), 10 + torch.randint(0, 20, (4, 5))], dim=1)
    lookups = Lookups(ids.view(-1), torch.arange(33))
    for step in range(3):
        train_whole(whole, lookups, random_gradient(step))
        train_in_parts(ours, lookups, [[0, 1, 2], [3, 4, 5, 6, 7]], random_gradient(step))
    assert int(ours._slipstream.overlay.hits.sum()) == 3 * 12
    assert_same_tables(ours, whole)


def test_gradient_of_a_part_that_does_not_come_is_zero() -> None:
    whole, ours = twins("plain", optimizer=EmbOptimType.EXACT_ADAGRAD)
    lookups = make_lookups(FEATURE_ROWS, (8,) * 4)
    output = lookups.run(whole)
    output[4:].square().sum().backward()
    with DeferredUpdates([ours._slipstream]) as updates:
        outputs = []
        for samples in (range(4), range(4, 8)):
            updates.next_micro_batch()
            outputs.append(part_of(lookups, samples)[0].run(ours))
        outputs[1].square().sum().backward()
        updates.apply([torch.arange(4), torch.arange(4, 8)])
    assert_same_tables(ours, whole)


def test_tbe_that_a_forward_calls_twice() -> None:
    """The n-th calls belong together, and each pair makes an update, as in stock."""
    whole, ours = twins("plain", optimizer=EmbOptimType.EXACT_SGD)
    one, two = (make_lookups(FEATURE_ROWS, (6,) * 4, seed=seed) for seed in range(2))
    gradient = random_gradient(0)(torch.empty(6, ours.total_D))
    torch.autograd.backward([one.run(whole), two.run(whole)], [gradient, 2 * gradient])
    with DeferredUpdates([ours._slipstream]) as updates:
        for samples in ([0, 3], [1, 2, 4, 5]):
            updates.next_micro_batch()
            for scale, lookups in ((1, one), (2, two)):
                part_of(lookups, samples)[0].run(ours).backward(scale * gradient[samples])
        updates.apply([torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])])
    for got, want in zip(table_states(ours), table_states(whole), strict=True):
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bags", [[3, 4], [5, 1]])
def test_bags_that_are_not_the_batchs_samples_are_put_end_to_end(bags: list[int]) -> None:
    """As of deduplicated sequences: right, but for the order in which gradients are added up."""
    whole, ours = twins("plain", optimizer=EmbOptimType.EXACT_SGD)
    lookups = make_lookups(FEATURE_ROWS, (sum(bags),) * 4)
    gradient = random_gradient(0)(torch.empty(sum(bags), ours.total_D))
    lookups.run(whole).backward(gradient)
    with DeferredUpdates([ours._slipstream]) as updates:
        for samples in (range(bags[0]), range(bags[0], sum(bags))):
            updates.next_micro_batch()
            part_of(lookups, samples)[0].run(ours).backward(gradient[samples.start : samples.stop])
        updates.apply([torch.tensor([0, 2]), torch.tensor([1, 3])])
    assert_same_tables(ours, whole)


def untouched(tbe: TBE, call: Callable[[], object], error: type[Exception], match: str) -> None:
    """Asserts that ``call`` raises, that no row and no count changed, and that a whole step works after it."""
    one = tbe._slipstream
    before, counts = table_states(tbe), [getattr(one, name).clone() for name in ("touches", "lookups", "samples")]
    with pytest.raises(error, match=match):
        call()
    assert one.deferred is None
    for was, now in zip(before, table_states(tbe), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))
    assert all(torch.equal(a, getattr(one, n)) for a, n in zip(counts, ("touches", "lookups", "samples"), strict=True))
    make_lookups(FEATURE_ROWS, (4,) * 4).run(tbe).sum().backward()
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(before, table_states(tbe), strict=True))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weighted": True, "gradient": True}, "weights that need a gradient"),
        ({"batch_sizes": [[4], [4], [4], [4]]}, "variable size"),
        ({"total_unique_indices": 3}, r"forward\(total_unique_indices=\)"),
        ({"outside": True}, "outside of any micro-batch"),
    ],
)
@pytest.mark.parametrize("mode", ["plain", "overlay_stale"])
def test_calls_that_cannot_be_deferred_are_refused(mode: str, options: dict[str, Any], match: str) -> None:
    _, ours = twins(mode)

    def call() -> None:
        lookups = make_lookups(FEATURE_ROWS, (4,) * 4, weighted=options.get("weighted", False))
        if lookups.weights is not None:
            lookups.weights.requires_grad_()
        with DeferredUpdates([ours._slipstream]) as updates:
            if "outside" not in options:
                updates.next_micro_batch()
            ours(
                lookups.indices,
                lookups.offsets,
                lookups.weights,
                batch_size_per_feature_per_rank=options.get("batch_sizes"),
                total_unique_indices=options.get("total_unique_indices"),
            )

    untouched(ours, call, InputError, rf"(?s)table_0, table_1, table_2: .*{match}.*Train it whole")


@pytest.mark.parametrize("mode", ["plain", "overlay_stale"])
def test_step_that_fails_half_way_changes_nothing(mode: str) -> None:
    _, ours = twins(mode)
    lookups = make_lookups(FEATURE_ROWS, (9,) * 4)

    def fails(output: Tensor) -> Tensor:
        raise KeyError("the user's")

    untouched(ours, lambda: train_in_parts(ours, lookups, divided(9, 2, 0), fails), KeyError, "the user's")


def test_lookup_out_of_range_changes_nothing() -> None:
    _, ours = twins("plain", bounds_check_mode=BoundsCheckMode.FATAL)
    lookups = make_lookups(FEATURE_ROWS, (9,) * 4)
    lookups.indices[-1] = 99

    untouched(
        ours,
        lambda: train_in_parts(ours, lookups, divided(9, 2, 0), random_gradient(0)),
        LookupRangeError,
        "look-up of row 99",
    )


def test_lookups_overwritten_before_the_end_are_refused() -> None:
    _, ours = twins("plain")
    buffer = make_lookups(FEATURE_ROWS, (4,) * 4)

    def call() -> None:
        with DeferredUpdates([ours._slipstream]) as updates:
            for _ in range(2):
                updates.next_micro_batch()
                buffer.indices.fill_(3)
                buffer.run(ours).sum().backward()
            updates.apply([torch.arange(4), torch.arange(4, 8)])

    untouched(ours, call, RuntimeError, "modified by an inplace operation")


def test_tbe_that_only_one_micro_batch_looked_up_in_is_refused() -> None:
    _, ours = twins("plain")

    def call() -> None:
        with DeferredUpdates([ours._slipstream]) as updates:
            updates.next_micro_batch()
            make_lookups(FEATURE_ROWS, (4,) * 4).run(ours).sum().backward()
            updates.next_micro_batch()
            updates.apply([torch.arange(4), torch.arange(0)])

    untouched(ours, call, InputError, r"looked up in \[1, 0\] times")


def test_indices_longer_than_the_last_offset_says() -> None:
    """FBGEMM lets them pass where its bounds check is off, and reads no further than the offset."""
    whole, ours = twins("plain", bounds_check_mode=BoundsCheckMode.NONE)
    lookups = make_lookups(FEATURE_ROWS, (8,) * 4, weighted=True)
    gradient = random_gradient(0)(torch.empty(8, ours.total_D))
    lookups.run(whole).backward(gradient)
    with DeferredUpdates([ours._slipstream]) as updates:
        for samples in (range(5), range(5, 8)):
            updates.next_micro_batch()
            micro, _ = part_of(lookups, samples)
            assert micro.weights is not None
            micro.indices = torch.cat([micro.indices, torch.tensor([10**6, 3])])
            micro.weights = torch.cat([micro.weights, torch.ones(2)])
            micro.run(ours).backward(gradient[samples.start : samples.stop])
        updates.apply([torch.arange(5), torch.arange(5, 8)])
    assert_same_tables(ours, whole)


def test_evaluation_in_between_is_not_part_of_the_batch() -> None:
    whole, ours = twins("stale")
    lookups = make_lookups(FEATURE_ROWS, (9,) * 4)

    def evaluates(output: Tensor) -> Tensor:
        with torch.no_grad():
            lookups.run(ours)
        return random_gradient(0)(output)

    train_whole(whole, lookups, random_gradient(0))
    train_in_parts(ours, lookups, divided(9, 2, 0), evaluates)
    assert_same_tables(ours, whole)


def test_detached_filter_is_refused() -> None:
    """Its TBE's forward would be stock, and update at once."""
    _, ours = twins("plain")
    update_filter = ours._slipstream
    update_filter.detach()
    with pytest.raises(AttachError, match="was detached"), DeferredUpdates([update_filter]):
        pass


def test_tables_that_would_be_updated_twice_are_refused() -> None:
    attached, excluded = make_tbe(), make_tbe(table_names=["c", "d"])
    model = nn.ModuleDict({"one": attached, "two": excluded})
    filters = [UpdateFilter(one) for one in find_tbes(model, frozenset({"c", "d"}))]
    with pytest.raises(
        AttachError, match=r"(?s)tables of two are not the session's .*StalenessConfig\(target_share=0\)"
    ):
        check_can_defer(model, filters)
    check_can_defer(model, [UpdateFilter(one) for one in find_tbes(model)])


@pytest.mark.parametrize(
    ("name", "match"),
    [("prefetch_pipeline", "prefetch_pipeline=True"), ("use_writeback_bwd_prehook", "write-back hook")],
)
def test_options_that_do_not_go_with_it_are_refused(name: str, match: str) -> None:
    tbe = make_tbe()
    update_filter = filtered(tbe, torch.ones(80, dtype=torch.bool))
    set_live(update_filter, torch.ones(80, dtype=torch.bool))
    setattr(tbe, name, True)
    with pytest.raises(AttachError, match=match):
        check_can_defer(nn.ModuleList([tbe]), [update_filter])
