from __future__ import annotations

from dataclasses import fields

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.staleness.pool import RowPool

SPACE = 24
row_sets = st.sets(st.integers(0, SPACE - 1)).map(sorted)


def pool_of(rows: list[int]) -> RowPool:
    """A pool whose every field says which row it is of; the snapshots too, of two shards."""
    numbers = torch.tensor(rows, dtype=torch.float32)
    shards = [numbers[numbers < SPACE // 2], numbers[numbers >= SPACE // 2]]
    return RowPool(
        rows=numbers.long(),
        seen=numbers.int() + 100,
        rate=numbers + 200,
        updates=numbers + 300,
        duty=numbers / SPACE,
        score=numbers + 400,
        thawed=numbers % 2 == 0,
        state=numbers + 500,
        snapshots=[torch.stack([one, -one], dim=1) for one in shards],
    )


@given(row_sets, row_sets)
def test_rows_that_stay_keep_their_state_and_new_ones_start_live(before: list[int], after: list[int]) -> None:
    rows = torch.tensor(after, dtype=torch.int64)
    touches = torch.arange(len(after), dtype=torch.float32) + 1
    shards = torch.tensor([0, SPACE // 2])
    moved, fresh = pool_of(before).moved_to(rows, touches, decisions=2, shard_begins=shards)

    everything = pool_of(list(range(SPACE)))
    assert moved.rows.tolist() == after
    assert fresh.tolist() == [place for place, row in enumerate(after) if row not in before]
    new = {"seen": 0, "duty": 1.0, "score": torch.nan, "thawed": False, "state": 0.0}
    snapshots = torch.cat(moved.snapshots)
    assert [len(one) for one in moved.snapshots] == [
        sum(r < SPACE // 2 for r in after),
        sum(r >= SPACE // 2 for r in after),
    ]
    for place, row in enumerate(after):
        known = row in before
        for field in fields(RowPool):
            if field.name in ("rows", "snapshots"):
                continue
            was = getattr(everything, field.name)
            expected = was[row]
            if not known:
                starts = {"rate": touches[place] / 2, "updates": touches[place], **new}[field.name]
                expected = torch.as_tensor(starts, dtype=was.dtype)
            got = getattr(moved, field.name)
            assert got.dtype == was.dtype
            torch.testing.assert_close(got[place], expected, rtol=0, atol=0, equal_nan=True)
        expected = torch.tensor([row, -row]).float() if known else torch.full((2,), torch.nan)
        torch.testing.assert_close(snapshots[place], expected, rtol=0, atol=0, equal_nan=True)


@given(row_sets, row_sets)
def test_without_a_signal_what_is_its_alone_stays_zero(before: list[int], after: list[int]) -> None:
    if before == after:
        return
    rows, shards = torch.tensor(after, dtype=torch.int64), torch.tensor([0, SPACE // 2])
    touches = torch.ones(len(after))
    with_signal, _ = pool_of(before).moved_to(rows, touches, decisions=1, shard_begins=shards)
    without, _ = pool_of(before).moved_to(rows, touches, decisions=1, shard_begins=shards, signals=False)
    for name in ("updates", "score", "state"):
        assert not bool(getattr(without, name).any())
    for name in ("rows", "seen", "rate", "duty", "thawed"):
        assert torch.equal(getattr(without, name), getattr(with_signal, name))
