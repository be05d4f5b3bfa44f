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
    moved = pool_of(before).moved_to(rows, touches, decisions=2, shard_begins=torch.tensor([0, SPACE // 2]))

    everything = pool_of(list(range(SPACE)))
    assert moved.rows.tolist() == after
    assert moved.fresh is not None
    fresh = {"seen": 0, "duty": 1.0, "score": torch.nan, "thawed": False, "state": 0.0}
    snapshots = torch.cat(moved.snapshots)
    assert [len(one) for one in moved.snapshots] == [
        sum(r < SPACE // 2 for r in after),
        sum(r >= SPACE // 2 for r in after),
    ]
    for place, row in enumerate(after):
        known = row in before
        assert (place in moved.fresh.tolist()) is not known
        for field in fields(RowPool):
            if field.name in ("rows", "snapshots", "fresh"):
                continue
            was = getattr(everything, field.name)
            expected = was[row]
            if not known:
                starts = {"rate": touches[place] / 2, "updates": touches[place], **fresh}[field.name]
                expected = torch.as_tensor(starts, dtype=was.dtype)
            got = getattr(moved, field.name)
            assert got.dtype == was.dtype
            torch.testing.assert_close(got[place], expected, rtol=0, atol=0, equal_nan=True)
        expected = torch.tensor([row, -row]).float() if known else torch.full((2,), torch.nan)
        torch.testing.assert_close(snapshots[place], expected, rtol=0, atol=0, equal_nan=True)
