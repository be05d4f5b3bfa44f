"""Checkpoints of a TBE of one's own, and what they cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.tables import make_lookups, make_tbe, move_rows, overlaid, table_states
from tests.watching import LargestTensor
from torchrec_slipstream.tbe import overlay as overlay_module
from torchrec_slipstream.tbe.checkpoint import ReleaseBeforeAccess


def test_bare_tbe_in_a_module() -> None:
    rows, dims = (200, 60), (8, 16)
    holders = [nn.ModuleDict({"tbe": make_tbe(rows, dims)}) for _ in range(3)]
    stock, ours, other = (holder["tbe"] for holder in holders)
    update_filter = overlaid(ours, {8: 50, 16: 20})
    assert update_filter.overlay is not None
    guard = ReleaseBeforeAccess(update_filter.found, update_filter.overlay)

    def steps(*tbes: Any, seed: int) -> None:
        for step in range(3):
            move_rows(update_filter.overlay, seed + step)
            lookups = make_lookups(rows, (20, 20), longest=1, seed=seed + step)
            for tbe in tbes:
                lookups.run(tbe).square().sum().backward()

    steps(stock, ours, seed=0)
    assert update_filter.overlay.dirty
    saved = [copy.deepcopy(holder.state_dict()) for holder in holders[:2]]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], value) for name, value in saved[1].items())
    steps(stock, ours, seed=10)
    for holder in holders:
        holder.load_state_dict(saved[1])
    steps(stock, ours, other, seed=20)
    for want, got, third in zip(*(table_states(tbe) for tbe in (stock, ours, other)), strict=True):
        for a, b, c in zip(want, got, third, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
    guard.remove()
    update_filter.detach()
    assert type(ours) is type(stock)
    assert not ours._state_dict_pre_hooks
    assert not ours._load_state_dict_pre_hooks


def test_no_copy_of_a_table_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to save nor to go on: rows are copied in chunks, whatever the share of the table that is hot."""
    rows, dim, chunk = 100_000, 32, 2**18
    monkeypatch.setattr(overlay_module, "_CHUNK_BYTES", chunk)
    tbe = make_tbe((rows,), (dim,))
    update_filter = overlaid(tbe, {dim: rows // 2})
    overlay = update_filter.overlay
    assert overlay is not None
    guard = ReleaseBeforeAccess(update_filter.found, overlay)
    overlay.promote(overlay.pools[0], torch.arange(0, rows, 2), torch.arange(rows // 2))
    lookups = make_lookups((rows,), (50,), seed=1)
    for _ in range(2):
        lookups.run(tbe).square().sum().backward()
        assert overlay.dirty
        with LargestTensor() as largest:
            tbe.state_dict()
            assert overlay.released
            overlay.hold()
        # A table is 12.8 MB. Row numbers, 8 bytes each, are not cut into chunks.
        assert chunk // 2 < largest.row_bytes <= chunk
        assert largest.bytes <= 8 * rows
    guard.remove()
