"""Compaction against a loop over the look-ups."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.staleness.compaction import Compaction, positions_of

bags_of_live = st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=20)


def parts(bags: list[list[bool]], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    live = torch.tensor([one for bag in bags for one in bag], dtype=torch.bool)
    offsets = torch.tensor([0, *torch.tensor([len(bag) for bag in bags]).cumsum(0).tolist()], dtype=dtype)
    return live, offsets


@given(bags=bags_of_live, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_positions_offsets_and_counts(bags: list[list[bool]], dtype: torch.dtype) -> None:
    live, offsets = parts(bags, dtype)
    compaction = Compaction(live, offsets)
    expected = [i for i, one in enumerate(live.tolist()) if one]
    assert compaction.positions.tolist() == expected
    assert compaction.count == len(expected)
    assert compaction.offsets().dtype == dtype
    assert compaction.offsets().tolist() == [sum(sum(bag) for bag in bags[:i]) for i in range(len(bags) + 1)]
    rows = torch.arange(live.numel() * 2).view(-1, 2)
    assert torch.equal(compaction.take(rows), rows[live])
    assert positions_of(live).tolist() == expected


@given(bags=bags_of_live)
def test_mean_factor(bags: list[list[bool]]) -> None:
    factor = Compaction(*parts(bags)).mean_factor()
    partial = [bag for bag in bags if 0 < sum(bag) < len(bag)]
    assert (factor is None) == (not partial)
    if factor is not None:
        expected = [sum(bag) / len(bag) if any(bag) else 1.0 for bag in bags]
        torch.testing.assert_close(factor, torch.tensor(expected, dtype=torch.float32))
