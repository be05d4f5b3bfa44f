"""Compaction against a loop over the look-ups, counted at once and with padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.tbe.compaction import Compaction, Counted, Padded, positions_of

bags_of_live = st.lists(st.lists(st.booleans(), max_size=5), min_size=1, max_size=20)


def parts(bags: list[list[bool]], dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    live = torch.tensor([one for bag in bags for one in bag], dtype=torch.bool)
    offsets = torch.tensor([0, *torch.tensor([len(bag) for bag in bags]).cumsum(0).tolist()], dtype=dtype)
    return live, offsets


@pytest.mark.parametrize("kind", [Counted, Padded])
@given(bags=bags_of_live, dtype=st.sampled_from([torch.int32, torch.int64]))
def test_positions_offsets_and_counts(
    kind: type[Counted] | type[Padded], bags: list[list[bool]], dtype: torch.dtype
) -> None:
    live, offsets = parts(bags, dtype)
    compaction = kind(live, offsets)
    expected = [i for i, one in enumerate(live.tolist()) if one]
    assert compaction.positions.tolist() == expected
    assert compaction.count == len(expected)
    assert compaction.lookups == live.numel()
    assert compaction.offsets().dtype == dtype
    assert compaction.offsets().tolist() == [sum(sum(bag) for bag in bags[:i]) for i in range(len(bags) + 1)]
    assert compaction.ranks.tolist() == [sum(live[:i].tolist()) for i in range(live.numel())]
    rows = torch.arange(live.numel() * 2).view(-1, 2)
    assert torch.equal(compaction.take(rows), rows[live])
    assert positions_of(live).tolist() == expected


@given(bags=bags_of_live)
def test_padding(bags: list[list[bool]]) -> None:
    """Behind the live look-ups, up to the batch's length: any positions that can be read, and a mask that tells."""
    live, offsets = parts(bags)
    compaction = Padded(live, offsets)
    padded = compaction.padded_positions
    assert padded.numel() == live.numel()
    assert padded[compaction.valid].tolist() == compaction.positions.tolist()
    assert bool(((padded >= 0) & (padded < max(1, live.numel()))).all())
    counted = Counted(live, offsets)
    assert counted.valid is None
    assert torch.equal(counted.padded_positions, counted.positions)


def test_a_cpu_counts_at_once() -> None:
    assert isinstance(Compaction.of(*parts([[True, False]])), Counted)


@given(bags=bags_of_live)
def test_mean_factor(bags: list[list[bool]]) -> None:
    factor = Counted(*parts(bags)).mean_factor()
    partial = [bag for bag in bags if 0 < sum(bag) < len(bag)]
    assert (factor is None) == (not partial)
    expected = torch.tensor([sum(bag) / len(bag) if any(bag) else 1.0 for bag in bags], dtype=torch.float32)
    for got in (factor, Padded(*parts(bags)).mean_factor()):
        if got is not None:
            torch.testing.assert_close(got, expected)
