"""Rows on their way between an overlay and its backing TBE: against plain lists, and with every step failing."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tables import TBE, make_lookups, make_tbe, overlaid, table_states
from tests.watching import FailingAt, InjectedError, LargestTensor
from torchrec_slipstream import PlanError
from torchrec_slipstream.placement.migration import Moved, migrate
from torchrec_slipstream.tbe import find_tbes
from torchrec_slipstream.tbe.overlay import Overlay

# Two tables share the slots of dim 8.
ROWS, DIMS, SLOTS = (40, 25, 30), (8, 16, 8), {8: 20, 16: 6}


def twins(optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD) -> tuple[TBE, TBE, Overlay]:
    """A stock TBE, an equal one with an overlay, and that overlay."""
    stock, ours = (make_tbe(ROWS, DIMS, optimizer=optimizer) for _ in range(2))
    overlay = overlaid(ours, SLOTS).overlay
    assert overlay is not None
    return stock, ours, overlay


def train(stock: TBE, ours: TBE, seed: int) -> None:
    """A step of both; bags of one look-up, so that they agree bit for bit."""
    lookups = make_lookups(ROWS, (15, 15, 15), longest=1, seed=seed)
    for tbe in (stock, ours):
        lookups.run(tbe).square().sum().backward()


def assert_consistent(stock: TBE, overlay: Overlay) -> None:
    """Every row has one whole truth, weights and state, and no slot two rows."""
    for place, tensors in enumerate(table_states(stock)):
        for which, want in enumerate(tensors):
            assert torch.equal(overlay.look(place, torch.arange(ROWS[place]), which), want)
    for pool in overlay.pools:
        slots = torch.cat([overlay.slots_of(place, overlay.hot_rows(place)) for place in pool.shards])
        assert slots.unique().numel() == slots.numel()
        assert int(overlay.taken(pool).sum()) == slots.numel()


def assert_equal_tables(stock: TBE, ours: TBE) -> None:
    for want, got in zip(table_states(stock), table_states(ours), strict=True):
        for a, b in zip(want, got, strict=True):
            assert torch.equal(a, b)


def hot_of(overlay: Overlay) -> dict[int, list[int]]:
    return {place: overlay.hot_rows(place).tolist() for place in range(len(ROWS))}


def wanted_of(rows: dict[int, set[int]]) -> dict[int, Tensor]:
    return {place: torch.tensor(sorted(of), dtype=torch.int64) for place, of in rows.items()}


def subsets(place: int, most: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, ROWS[place] - 1), max_size=most)


# Tables 0 and 2 have 20 slots together: any two of these fit.
WANTED = st.fixed_dictionaries({}, optional={0: subsets(0, 10), 1: subsets(1, 6), 2: subsets(2, 10)})


@settings(max_examples=40)
@given(
    plans=st.lists(st.tuples(WANTED, st.booleans(), st.booleans()), min_size=1, max_size=5),
    chunk_bytes=st.sampled_from([1, 100, 300, 10_000]),
    optimizer=st.sampled_from([EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD]),
)
def test_against_plain_lists_of_rows(
    plans: list[tuple[dict[int, set[int]], bool, bool]], chunk_bytes: int, optimizer: EmbOptimType
) -> None:
    stock, ours, overlay = twins(optimizer)
    hot: dict[int, set[int]] = {place: set() for place in range(len(ROWS))}
    for seed, (wanted, trains, checkpoint) in enumerate(plans):
        moved = migrate(overlay, wanted_of(wanted), chunk_bytes)
        demoted = [(place, row) for place, rows in wanted.items() for row in hot[place] - rows]
        promoted = [(place, row) for place, rows in wanted.items() for row in rows - hot[place]]
        size = sum(overlay.pool_of[place].row_bytes for place, _ in demoted + promoted)
        assert moved == Moved(len(demoted), len(promoted), size)
        hot |= wanted  # a shard without an entry keeps its rows
        assert hot_of(overlay) == {place: sorted(rows) for place, rows in hot.items()}
        assert_consistent(stock, overlay)
        if trains:
            train(stock, ours, seed)
            assert_consistent(stock, overlay)
        if checkpoint:
            overlay.release()
            assert_consistent(stock, overlay)
    assert_equal_tables(stock, ours)


def test_copies_one_chunk_at_a_time() -> None:
    rows, dim, chunk = 20_000, 32, 2**14
    tbe = make_tbe((rows,), (dim,))
    overlay = overlaid(tbe, {dim: rows // 2}).overlay
    assert overlay is not None
    even, odd = torch.arange(0, rows, 2), torch.arange(1, rows, 2)
    for wanted in (even, odd, even[:0]):
        with LargestTensor() as largest:
            moved = migrate(overlay, {0: wanted}, chunk)
        assert moved.bytes >= 10_000 * (4 * dim + 4)
        assert chunk // 2 < largest.row_bytes <= chunk
        assert largest.bytes <= 8 * rows  # row numbers are not cut into chunks
    one_row = overlay.pools[0].row_bytes
    with LargestTensor() as largest:
        assert migrate(overlay, {0: torch.arange(5)}, 1) == Moved(0, 5, 5 * one_row)
    assert largest.row_bytes <= one_row


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({0: [3, 2]}, "table table_0: its hot rows from 3 to 2 are not ascending rows of this shard's 40"),
        ({0: [3, 3]}, "table table_0: its hot rows from 3 to 3 are not ascending"),
        ({0: [-1, 3]}, "table table_0: its hot rows from -1 to 3"),
        ({2: [0, 30]}, "table table_2: its hot rows from 0 to 30 are not ascending rows of this shard's 30"),
        ({1: list(range(7))}, r"table\(s\) table_1: 7 rows shall be hot, but their overlay has 6 slots; give fewer"),
        # 12 of table 2 are hot already.
        ({0: list(range(9))}, r"table\(s\) table_0, table_2: 21 rows shall be hot, but their overlay has 20 slots"),
        ({0: [1], 1: [2], 2: [5, 4]}, "table table_2: its hot rows from 5 to 4"),
    ],
)
def test_refused_before_anything_changes(wanted: dict[int, list[int]], message: str) -> None:
    stock, ours, overlay = twins()
    migrate(overlay, wanted_of({0: {5, 6}, 2: set(range(12))}), 100)
    train(stock, ours, 0)
    before = hot_of(overlay)
    with FailingAt() as watched, pytest.raises(PlanError, match=message):
        migrate(overlay, {place: torch.tensor(rows) for place, rows in wanted.items()}, 100)
    assert watched.operations > 0
    assert hot_of(overlay) == before
    assert_consistent(stock, overlay)
    train(stock, ours, 1)
    assert_equal_tables(stock, ours)


def test_refused_for_a_shard_left_out() -> None:
    overlay = Overlay(find_tbes(nn.ModuleList([make_tbe(ROWS, DIMS)]))[0], SLOTS, [True, False, True])
    with pytest.raises(PlanError, match="table table_1: 2 rows shall be hot, but the overlay leaves it out"):
        migrate(overlay, wanted_of({0: {1}, 1: {2, 3}}), 100)
    assert hot_of(overlay) == {0: [], 1: [], 2: []}
    assert migrate(overlay, wanted_of({0: {1}, 1: set()}), 100).promoted == 1


# ------------------------------------------------------------------------------------------- failures

# From one to the other, rows come, go, and stay; table 2 keeps its rows, as it has no entry.
FIRST = wanted_of({0: set(range(9)), 1: {0, 1, 2, 3, 4, 5}})
SECOND = wanted_of({0: set(range(5, 15)), 1: {4, 5, 6, 7, 8}})
OTHERS = wanted_of({2: set(range(0, 20, 2))})


@pytest.mark.parametrize("released", [False, True])
def test_failure_at_every_operation_of_a_migration(released: bool) -> None:
    stock, ours, overlay = twins()
    migrate(overlay, FIRST | OTHERS, 100)
    train(stock, ours, 0)
    fails, passed, half_way = 0, 0, 0
    old, new = FIRST, SECOND
    while passed < 2:  # there and back
        if released:
            overlay.release()
        before = hot_of(overlay)
        try:
            with FailingAt(fails):
                migrate(overlay, new, 100)
            passed += 1
        except InjectedError:
            passed = 0
        assert overlay.released == released
        now = hot_of(overlay)
        half_way += now not in (before, {place: rows.tolist() for place, rows in (OTHERS | new).items()})
        assert now[2] == OTHERS[2].tolist()
        for place in (0, 1):  # what was to stay is still there, and nobody came who was not asked
            assert set(old[place].tolist()) & set(new[place].tolist()) <= set(now[place])
            assert set(now[place]) <= set(old[place].tolist()) | set(new[place].tolist())
        assert_consistent(stock, overlay)
        train(stock, ours, 2 * fails)
        assert_consistent(stock, overlay)
        migrate(overlay, new, 100)
        assert hot_of(overlay) == {place: rows.tolist() for place, rows in (OTHERS | new).items()}
        assert_consistent(stock, overlay)
        train(stock, ours, 2 * fails + 1)
        old, new = new, old
        fails += 1
    assert fails > 100
    assert half_way > 50
    assert_equal_tables(stock, ours)


def test_failure_at_every_operation_of_a_checkpoint() -> None:
    """While rows are written back for it, or read again after it."""
    stock, ours, overlay = twins()
    migrate(overlay, FIRST | OTHERS, 100)
    for write_back in (True, False):
        fails, failed = 0, True
        while failed:
            train(stock, ours, fails)
            failed = False
            if not write_back:
                overlay.release()
            try:
                with FailingAt(fails):
                    overlay.release() if write_back else overlay.hold()
            except InjectedError:
                failed = True
            assert_consistent(stock, overlay)
            if fails % 2:
                train(stock, ours, 1000 + fails)
                assert_consistent(stock, overlay)
            else:
                assert_equal_tables(stock, ours)
            fails += 1
        assert fails > 20
    assert_equal_tables(stock, ours)


def test_failure_leaves_a_migration_to_the_next_one() -> None:
    """As re-plans do: another placement, not the one that failed, is asked for next."""
    stock, ours, overlay = twins()
    migrate(overlay, FIRST, 100)
    for fails in range(0, 120, 7):
        train(stock, ours, fails)
        with pytest.raises(InjectedError), FailingAt(fails):
            migrate(overlay, SECOND, 100)
        third = wanted_of({0: {20 + fails % 10, 30}, 1: {fails % 20}, 2: set(range(18))})
        migrate(overlay, third, 100)
        assert hot_of(overlay) == {place: rows.tolist() for place, rows in third.items()}
        assert_consistent(stock, overlay)
        migrate(overlay, FIRST | wanted_of({2: set()}), 100)
    assert_equal_tables(stock, ours)
