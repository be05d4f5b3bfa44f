"""Histograms of counts against counting one by one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.access import CountHistogram, histogram


@given(
    counts=st.lists(st.integers(0, 5) | st.sampled_from([65_535, 65_536, 65_537, 2**31 - 1]), max_size=40),
    untouched=st.integers(0, 3),
    dtype=st.sampled_from([np.int32, np.int64]),
    chunk=st.sampled_from([1, 7, 1 << 24]),
)
def test_counts_rows(counts: list[int], untouched: int, dtype: type, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(histogram, "_CHUNK", chunk)
        found = CountHistogram.of(np.array(counts, dtype=dtype), untouched)
    expected = Counter(counts)
    expected[0] += untouched
    assert dict(zip(found.counts.tolist(), found.rows.tolist(), strict=True)) == {
        c: n for c, n in expected.items() if n
    }
    assert (np.diff(found.counts) < 0).all()
    assert found.total_rows == len(counts) + untouched
    assert found.lookups == sum(counts)
    assert found.counts.dtype == found.rows.dtype == np.int64
