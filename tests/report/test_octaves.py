"""Spreads in powers of two."""

from __future__ import annotations

import math

import pytest
import torch

from torchrec_slipstream.report import octaves
from torchrec_slipstream.report.octaves import Octaves


def test_values_lie_between_their_powers_of_two() -> None:
    values = torch.tensor([0.0, -3.0, math.nan, math.inf, 0.25, 0.49, 1.0, 1.99, 2.0, 3.9, 8.0])
    assert Octaves.of(values) == Octaves(-2, [2, 0, 2, 2, 0, 1])
    # 2^24 - 1 is an odd float32 whose logarithm rounds up to 24.
    assert Octaves.of(torch.tensor([[2**24 - 1, 2**24]], dtype=torch.int32)) == Octaves(23, [1, 1])
    assert Octaves.of(torch.tensor([1, 2, 3]), scale=8) == Octaves(3, [1, 2])
    assert Octaves.of(torch.tensor([1e-30, 1e30])).total == 2, "far ones count at the ends"
    assert Octaves.of(torch.zeros(3)) == Octaves.of(torch.empty(0)) == Octaves()


def test_parts_and_ranks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    values = 2 ** (8 * torch.rand(1000, generator=torch.Generator().manual_seed(0)) - 4)
    whole = Octaves.of(values)
    assert whole.total == 1000
    monkeypatch.setattr(octaves, "_PART", 7)
    assert Octaves.of(values) == whole
    assert Octaves.of(values[:300]) + Octaves.of(values[300:]) == whole
    assert Octaves(-3, [1]) + Octaves(2, [1, 5]) == Octaves(-3, [1, 0, 0, 0, 0, 1, 5])
    assert Octaves() + whole == whole + Octaves() == whole
    assert Octaves.from_dict(whole.to_dict()) == whole
