"""Numbers of look-ups' rows, by one broadcast or feature by feature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.tbe.compaction import are_single
from torchrec_slipstream.tbe.row_space import RowSpace

ROWS = [5, 3, 7]
FEATURE_TABLE = [0, 0, 1, 2]


@given(
    lengths=st.one_of(
        st.lists(st.integers(0, 6), min_size=4, max_size=4), st.integers(0, 6).map(lambda length: [length] * 4)
    ),
    own=st.lists(st.booleans(), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_numbers_are_those_counted_by_hand(
    lengths: list[int], own: list[bool], dtype: torch.dtype, strided: bool, seed: int
) -> None:
    space = RowSpace(ROWS, own, FEATURE_TABLE, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    indices = [
        torch.randint(ROWS[table], (length,), generator=generator).tolist()
        for table, length in zip(FEATURE_TABLE, lengths, strict=True)
    ]
    expected = [
        space.begins[table] + (row if own[table] else 0)
        for table, rows in zip(FEATURE_TABLE, indices, strict=True)
        for row in rows
    ]
    flat = torch.tensor([row for rows in indices for row in rows], dtype=dtype)
    if strided:
        flat = flat.repeat_interleave(2)[::2]
    numbers = space.of_lookups(flat, torch.tensor(lengths, dtype=dtype))
    assert numbers.dtype == torch.int64
    assert numbers.tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("own", [[True, True, True], [True, False, True]])
def test_on_a_gpu_a_pruned_lookup_stays_within_its_table(own: list[bool]) -> None:
    space = RowSpace(ROWS, own, FEATURE_TABLE, torch.device("cuda"))
    numbers = space.of_lookups(torch.tensor([-1, 2, -1, 1, -1], device="cuda"), torch.tensor([2, 1, 1, 1]).cuda())
    assert numbers.tolist() == [0, 2, 0, space.begins[1] + own[1], space.begins[2]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bags_of_one_lookup_are_told_from_others(dtype: torch.dtype) -> None:
    def single(offsets: list[int], lookups: int) -> bool:
        return are_single(torch.tensor(offsets, dtype=dtype), lookups)

    assert single([0, 1, 2, 3], 3)
    assert single([0], 0)
    assert not single([0, 2, 2, 3], 3), "as many bags as look-ups, but not one each"
    assert not single([0, 1, 2], 3)
    assert not single([0, 0], 0)
