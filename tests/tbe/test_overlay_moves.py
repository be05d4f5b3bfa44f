"""Rows on their way in and out of an overlay: who has which slot, what a failure leaves, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tables import TBE, make_lookups, make_tbe, move_rows, overlaid, table_states
from tests.tbe.test_overlay import (
    FEATURE_ROWS,
    FEATURES,
    ROWS,
    SLOTS,
    assert_same_states,
    batches_of,
    padding,
    step,
    twins,
)
from torchrec_slipstream import AttachError, LookupRangeError
from torchrec_slipstream.tbe import find_tbes
from torchrec_slipstream.tbe.compaction import positions_of
from torchrec_slipstream.tbe.overlay import Overlay
from torchrec_slipstream.tbe.part import Call
from torchrec_slipstream.tbe.preparing import checked_call, take_prefetched, without_hot
from torchrec_slipstream.tbe.routing import route

__all__ = ["padding"]  # a fixture


def assert_whole(overlay: Overlay) -> None:
    """Every hot row has a slot of its pool, no two the same, and the slot knows it."""
    for pool in overlay.pools:
        taken: list[int] = []
        for place in pool.shards:
            rows = torch.arange(overlay.shards[place].rows)
            slots = overlay.slots_of(place, rows)
            hot = rows[slots >= 0]
            assert torch.equal(overlay.hot_rows(place), hot)
            assert torch.equal(pool.owner[slots[hot]], hot + overlay.space.begins[place])
            taken += slots[hot].tolist()
        assert len(set(taken)) == len(taken)
        assert sorted(taken) == positions_of(overlay.taken(pool)).tolist()
        assert all(slot < pool.slots for slot in taken)


@given(seed=st.integers(0, 2**16), share=st.sampled_from([0.0, 0.1, 0.6, 1.0]), moves=st.integers(1, 6))
def test_slots_and_owners_agree(seed: int, share: float, moves: int) -> None:
    tbe = make_tbe(ROWS, (8, 16, 8), features=FEATURES)
    overlay = overlaid(tbe, {8: round(90 * share), 16: round(30 * share)}).overlay
    assert overlay is not None
    before = table_states(tbe)
    for number in range(moves):
        if (seed + number) % 3 == 0:
            overlay.release()
        elif (seed + number) % 3 == 1:
            overlay.hold()
        move_rows(overlay, seed + number)
        assert_whole(overlay)
        for place, states in enumerate(before):
            for which, values in enumerate(states):
                assert torch.equal(overlay.look(place, torch.arange(ROWS[place]), which), values)
    for was, now in zip(before, table_states(tbe), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True))


class _FailsAt(TorchDispatchMode):
    """Raises in place of the ``last``-th tensor operation."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._left = last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def demote(overlay: Overlay) -> None:
    for place, pool in overlay.pool_of.items():
        overlay.demote(pool, overlay.hot_rows(place)[::2] + overlay.space.begins[place])


def promote(overlay: Overlay) -> None:
    for place, pool in overlay.pool_of.items():
        rows = torch.arange(overlay.shards[place].rows)
        cold, free = rows[overlay.slots_of(place, rows) < 0], positions_of(~overlay.taken(pool))
        count = min(len(cold), len(free), 3)
        overlay.promote(pool, cold[:count] + overlay.space.begins[place], free[:count])


def flush_and_promote(overlay: Overlay) -> None:
    overlay.release()
    promote(overlay)
    overlay.hold()


@pytest.mark.parametrize("move", [demote, promote, Overlay.release, flush_and_promote, lambda o: move_rows(o, 9)])
def test_a_failure_anywhere_leaves_every_row_with_one_truth(move: Callable[[Overlay], None]) -> None:
    """Whatever operation fails, training goes on as stock's."""
    batches = batches_of(3, longest=3)
    last = 0
    while True:
        stock, ours, overlay = twins(optimizer=EmbOptimType.EXACT_ADAGRAD)
        move_rows(overlay, 0)
        step(stock, ours, batches[0], tolerance=1e-5, seed=0)
        try:
            with _FailsAt(last):
                move(overlay)
        except KeyboardInterrupt:
            failed = True
        else:
            failed = False
        for number in (1, 2):
            step(stock, ours, batches[number], tolerance=1e-5, seed=number)
            move_rows(overlay, number)
        assert_whole(overlay)
        assert_same_states(ours, stock, 1e-5)
        if not failed:
            break
        last += 1
    assert last > 10


def test_keeps_class_and_state_and_gives_all_rows_back() -> None:
    stock, ours, overlay = twins()
    stock_class = type(stock)
    move_rows(overlay, 0)
    assert isinstance(ours, TBE)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert not list(ours.children())
    with pytest.raises(AttachError, match="detach"):
        copy.deepcopy(nn.ModuleList([ours]))
    with pytest.raises(AttachError, match="cannot be pickled; save the model's state_dict"):
        pickle.dumps(ours)
    first, second = batches_of(2, longest=3)
    step(stock, ours, first, tolerance=1e-5, seed=0)
    update_filter = ours._slipstream
    update_filter.detach()
    assert type(ours) is stock_class
    assert_same_states(ours, stock, 1e-5)
    step(stock, ours, second, tolerance=1e-5, seed=1)
    update_filter.attach()  # the same rows are hot again, as they are now
    assert len(overlay.hot_rows(0)) > 0
    step(stock, ours, first, tolerance=1e-5, seed=2)
    assert_same_states(ours, stock, 1e-5)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("mode", [BoundsCheckMode.FATAL, BoundsCheckMode.NONE])
@pytest.mark.parametrize(
    ("row", "says"), [(30, "row 30, but it has rows 0 to 29"), (-1, "row -1"), (10**6, "row 1000000")]
)
def test_out_of_range_lookup_changes_nothing(mode: BoundsCheckMode, row: int, says: str) -> None:
    """Where FBGEMM's check is off or lets -1 pass, its kernels refuse the row; they must not see some slot instead."""
    tbe = make_tbe((50, 30), bounds_check_mode=mode)
    update_filter = overlaid(tbe, {8: 10, 16: 10})
    assert update_filter.overlay is not None
    move_rows(update_filter.overlay, 0)
    update_filter.counting = True
    before = table_states(tbe)
    with pytest.raises(LookupRangeError, match=f"table table_1: look-up of {says}"):
        tbe(torch.tensor([3, row]), torch.tensor([0, 1, 2]))
    assert int(update_filter.touches.sum()) == int(update_filter.overlay.hits.sum()) == 0
    for was, now in zip(before, table_states(tbe), strict=True):
        assert torch.equal(was[0], now[0])


@pytest.mark.usefixtures("padding")
def test_out_of_range_lookup_is_of_the_row_that_fbgemm_put_in() -> None:
    pair = [make_tbe((50, 30), bounds_check_mode=BoundsCheckMode.WARNING) for _ in range(2)]
    overlay = overlaid(pair[1], {8: 50, 16: 30}).overlay
    assert overlay is not None
    move_rows(overlay, 0)
    outputs = [tbe(torch.tensor([3, 30]), torch.tensor([0, 1, 2])) for tbe in pair]
    assert torch.equal(*outputs)


@pytest.mark.usefixtures("padding")
@pytest.mark.parametrize("weighted", [False, True])
def test_indices_longer_than_the_last_offset_says(weighted: bool) -> None:
    stock, ours, overlay = twins(bounds_check_mode=BoundsCheckMode.NONE)
    move_rows(overlay, 0)
    lookups = make_lookups(FEATURE_ROWS, (9,) * 4, weighted=weighted)
    lookups.indices = torch.cat([lookups.indices, torch.tensor([10**6, 3])])
    if lookups.weights is not None:
        lookups.weights = torch.cat([lookups.weights, torch.ones(2)])
    step(stock, ours, lookups, tolerance=1e-5, seed=0)
    assert_same_states(ours, stock, 1e-5)


@pytest.mark.usefixtures("padding")
def test_prefetches_what_is_cold_and_finds_it_again() -> None:
    """Of a batch whose rows moved after the prefetch (which itself needs a GPU)."""
    _, ours, overlay = twins()
    move_rows(overlay, 0)
    lookups = batches_of(1, longest=3)[0]
    call = Call(lookups.indices, lookups.offsets, None, None, None)
    update_filter = ours._slipstream
    words = overlay.words[overlay.space.of_lookups(call.indices, checked_call(update_filter, call)[1].bounds.diff())]
    prefetched = without_hot(update_filter, overlay, call).indices
    assert torch.equal(prefetched, call.indices.masked_fill(words >= 0, -1))
    assert 0 < int((prefetched < 0).sum()) < len(prefetched)
    locations = torch.where(prefetched >= 0, torch.arange(len(prefetched)), -1)
    move_rows(overlay, 1)
    call, batch = checked_call(update_filter, call)
    cold, _ = route(batch, overlay.words[overlay.space.of_lookups(batch.indices, batch.bounds.diff())])
    ours.lxu_cache_locations_list = [locations]
    take_prefetched(ours, cold)
    found = ours.lxu_cache_locations_list.pop()
    assert len(found) == len(cold.indices)
    mine = cold.chosen.positions
    assert bool((cold.indices[len(mine) :] == -1).all())
    assert torch.equal(found[: len(mine)], locations[mine])
    assert bool((found[len(mine) :] == -1).all())
    assert bool((found[: len(mine)] == -1).any())
    assert bool((found >= 0).any())


def test_only_wanted_tables_have_hot_rows() -> None:
    tbe = make_tbe(ROWS, (8, 16, 8), features=FEATURES)
    found = find_tbes(nn.ModuleList([tbe]))[0]
    overlay = Overlay(found, SLOTS, [False, False, True])
    assert [pool.shards for pool in overlay.pools] == [(2,), ()]
    assert overlay.words.numel() == 1 + 1 + ROWS[2]
    assert overlay.hbm_bytes >= 30 * (8 + 1) * 4 + 10 * (16 + 1) * 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": SparseType.INT8}, "table_0, table_1: weights of int8 carry their scale"),
        ({"features": (0, 1, 0)}, r"feature_table_map \[0, 1, 0\]"),
    ],
)
def test_refuses_what_it_cannot_hold(options: dict[str, Any], says: str) -> None:
    tbe = make_tbe((50, 30), (8, 8), optimizer=EmbOptimType.EXACT_SGD, **options)
    with pytest.raises(AttachError, match=says):
        overlaid(tbe, {8: 10})
    assert not hasattr(tbe, "_slipstream")


def test_compile_is_refused() -> None:
    _, ours, overlay = twins()
    move_rows(overlay, 0)
    lookups = batches_of(1)[0]

    def run() -> torch.Tensor:
        return ours(lookups.indices, lookups.offsets)

    with pytest.raises(Exception, match="cannot trace a TBE with hot rows"):
        torch.compile(run, backend="eager", fullgraph=True)()
