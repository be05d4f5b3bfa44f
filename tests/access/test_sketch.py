"""The sketch of a table that is too large to count: within its bounds, finds what is hot, goes on where it was."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream import AttachError
from torchrec_slipstream.access.sketch import PART_ROWS, RowSketch

ROWS = 20_000


def zipf(seed: int, size: int = 3000) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(np.random.default_rng(5).permutation(ROWS)[(generator.zipf(1.2, size) - 1) % ROWS])


def check_bounds(sketch: RowSketch, true: torch.Tensor) -> None:
    rows, counts = sketch.items()
    assert (np.diff(rows) > 0).all()
    assert (counts > 0).all()
    missing = true.clone()
    missing[rows] -= torch.from_numpy(counts)
    assert int(missing.min()) >= 0, "a count was too large"
    assert int(missing.max()) <= sketch.error


@given(seed=st.integers(0, 2**16), batches=st.integers(0, 12), size=st.integers(1, 3000), rows=st.integers(768, 5000))
def test_never_beyond_its_bounds(seed: int, batches: int, size: int, rows: int) -> None:
    sketch, true = RowSketch(rows), torch.zeros(ROWS, dtype=torch.int64)
    for batch in range(batches):
        # Half skewed, half uniform: the tail is what pushes rows out.
        generator = torch.Generator().manual_seed(seed + batch)
        looked_up = torch.cat([zipf(seed + batch, size), torch.randint(0, ROWS, (size,), generator=generator)])
        sketch.add(looked_up.int() if batch % 2 else looked_up)
        true += torch.bincount(looked_up, minlength=ROWS)
    check_bounds(sketch, true)
    assert sketch.total == int(true.sum())
    assert len(sketch.items()[0]) <= rows // PART_ROWS * PART_ROWS
    # Twice what DataSketches promises of a sketch that sees an even part: 3.5 / 2^10 of its look-ups.
    assert sketch.error <= 2 * 3.5 / 1024 * sketch.total / (rows // PART_ROWS) + true.max()


def test_exact_as_long_as_all_rows_fit() -> None:
    sketch = RowSketch(PART_ROWS)
    rows = torch.arange(700).repeat_interleave(torch.arange(700) % 5 + 1)
    sketch.add(rows)
    assert sketch.error == 0
    found, counts = sketch.items()
    assert found.tolist() == list(range(700))
    assert counts.tolist() == (torch.arange(700) % 5 + 1).tolist()


def test_finds_the_hot_rows() -> None:
    sketch, true = RowSketch(4 * PART_ROWS), torch.zeros(ROWS, dtype=torch.int64)
    for batch in range(60):
        sketch.add(zipf(batch))
        true += torch.bincount(zipf(batch), minlength=ROWS)
    rows, counts = sketch.items()
    hottest = rows[np.argsort(-counts)[:200]]
    assert float(true[hottest].sum() / true.topk(200).values.sum()) > 0.99
    assert sketch.error > 0, "rows were pushed out, or nothing was tested"
    assert sketch.nbytes < 4 * (1024 * 18 + 768 * 32) + 1


@pytest.mark.parametrize("split", [1, 17, 39])
def test_one_loaded_from_its_state_goes_on_alike(split: int) -> None:
    whole, first = RowSketch(3 * PART_ROWS), RowSketch(3 * PART_ROWS)
    for batch in range(40):
        whole.add(zipf(batch))
        if batch == 20:
            whole.halve(7, 0)
    for batch in range(split):
        first.add(zipf(batch))
        if batch == 20:
            first.halve(7, 0)
    state = copy.deepcopy(first.state())
    second = RowSketch(3 * PART_ROWS)
    second.add(zipf(99))  # what was there before does not matter
    second.load(state)
    assert str(second.state()) == str(state)
    for batch in range(split, 40):
        second.add(zipf(batch))
        if batch == 20:
            second.halve(7, 0)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name
    assert whole.error > 0


def test_halves_counts_and_what_may_be_missing() -> None:
    sketch = RowSketch(PART_ROWS)
    for batch in range(10):
        sketch.add(zipf(batch))
    (rows, before), error, total = sketch.items(), sketch.error, sketch.total
    sketch.halve(3, 1000)
    left, after = sketch.items()
    assert set(left) <= set(rows)
    assert sketch.error == error / 2
    assert sketch.total == total / 2
    old = dict(zip(rows.tolist(), before.tolist(), strict=True))
    assert all(abs(count - old[row] / 2) <= 0.5 for row, count in zip(left.tolist(), after.tolist(), strict=True))
    assert all(old[row] == 1 for row in set(rows.tolist()) - set(left.tolist()))
    assert abs(after.sum() - before.sum() / 2) < 0.1 * before.sum() / 2


def test_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(AttachError, match=r"pip install datasketches\. .*counter='sampled'"):
        RowSketch(768)
