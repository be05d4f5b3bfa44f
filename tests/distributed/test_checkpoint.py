"""Checkpoints with overlays: one logical table with plain names and shapes, saved and loaded as TorchRec has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torchrec.optim import RowWiseAdagrad

from tests.distributed.checkpoints import (
    Whole,
    assert_busy,
    assert_same,
    attach,
    both,
    copied,
    load,
    train,
)
from tests.distributed.ranks import run_ranks
from tests.models import TwoCollections, sharded

pytestmark = pytest.mark.slow  # nearly every test uses other processes

STEPS = 11
MORE_STEPS = 6


def whole_tables(ranks: list[Whole]) -> Whole:
    """Tables and states put together from all ranks' shards."""
    tables: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    for rank in ranks:
        for name, value in rank.items():
            table, _, at = name.partition("@")
            if at:
                tables.setdefault(table, []).append((tuple(int(n) for n in at.strip("(),").split(",")), value))
    result = {}
    for table, shards in tables.items():
        ends = [max(a[i] + v.shape[i] for a, v in shards) for i in range(shards[0][1].ndim)]
        result[table] = np.full(ends, np.nan, dtype=np.float32)
        for at, value in shards:
            result[table][tuple(slice(a, a + n) for a, n in zip(at, value.shape, strict=True))] = value
        assert not np.isnan(result[table]).any(), table
    return result


# ------------------------------------------------------------------------------------------- saved here, loaded there


def _save(rank: int, folder: str, sharding: str, optimizer: type, with_overlay: bool) -> Whole:
    """Train and save; return what stock TorchRec has after the same steps."""
    stock = sharded(TwoCollections(), sharding, optimizer=optimizer)
    train(stock, range(STEPS), rank)
    model = stock
    if with_overlay:
        model = sharded(TwoCollections(), sharding, optimizer=optimizer)
        session = attach(model)
        train(model, range(STEPS), rank, session)
        assert [one.moved for one in session._hot.replans] == [True, True]
        assert_busy(session)
    dcp.save(both(model), checkpoint_id=folder)
    return copied(both(stock))


def _load(rank: int, folder: str, sharding: str, optimizer: type, with_overlay: bool) -> tuple[Whole, Whole]:
    """Load and train on; return what was loaded. What trains on is compared with stock TorchRec here."""
    stock, model = (sharded(TwoCollections(), sharding, seed=9, optimizer=optimizer) for _ in range(2))
    session = None
    if with_overlay:
        session = attach(model, seed=3)
        train(model, range(3), rank, session)
        assert_busy(session)
    for one in (model, stock):
        state = both(one)
        dcp.load(state, checkpoint_id=folder)
        load(one, state)
    loaded = copied(both(model))
    train(stock, range(STEPS, STEPS + MORE_STEPS), rank)
    train(model, range(STEPS, STEPS + MORE_STEPS), rank, session)
    if session is not None:
        assert_busy(session)
    after = copied(both(model))
    assert_same(after, copied(both(stock)))
    return loaded, after


@pytest.mark.parametrize(
    ("sharding", "optimizer", "ranks", "saves", "loads"),
    [
        ("row_wise", RowWiseAdagrad, (2, 1), True, False),
        ("row_wise", RowWiseAdagrad, (1, 2), False, True),
        ("row_wise", torch.optim.Adagrad, (2, 1), True, True),
        ("table_wise", RowWiseAdagrad, (2, 1), True, True),
        ("table_wise", torch.optim.Adagrad, (1, 2), True, False),
        ("table_wise", torch.optim.SGD, (2, 2), True, False),
        ("column_wise", RowWiseAdagrad, (2, 1), True, True),
        ("column_wise", torch.optim.Adagrad, (1, 2), False, True),
    ],
)
def test_loaded_elsewhere(
    tmp_path: Path, sharding: str, optimizer: type, ranks: tuple[int, int], saves: bool, loads: bool
) -> None:
    """Overlay to stock, stock to overlay, overlay to overlay; at another number of ranks; states included."""
    saved = run_ranks(ranks[0], _save, str(tmp_path), sharding, optimizer, saves)
    loaded = run_ranks(ranks[1], _load, str(tmp_path), sharding, optimizer, loads)
    want = whole_tables(saved)
    assert len(want) >= (4 if optimizer is torch.optim.SGD else 8)
    assert_same(whole_tables([first for first, _ in loaded]), want)
    after = whole_tables([second for _, second in loaded])
    assert all((after[name] != value).any() for name, value in want.items())


def _describe(rank: int, folder: str, sharding: str) -> tuple[Any, Any]:
    """All that a reader sees of a checkpoint but its values, of stock and of a model with overlays."""
    described = []
    for with_overlay in (False, True):
        model = sharded(TwoCollections(), sharding)
        session = attach(model) if with_overlay else None
        train(model, range(3), rank, session)
        state = both(model)
        here = [
            (name, type(value), getattr(value, "metadata", lambda: None)(), value.dtype, tuple(value.shape))
            for name, value in [
                *state["model"].items(),
                *((f"{p}/{s}", v) for p, of in state["optimizer"]["state"].items() for s, v in of.items()),
            ]
        ]
        place = f"{folder}/{with_overlay}"
        dcp.save(state, checkpoint_id=place)
        file = FileSystemReader(place).read_metadata()
        described.append((here, list(state["optimizer"]), file.state_dict_metadata, file.planner_data))
    return described[0], described[1]


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_names_and_shapes_are_plain(tmp_path: Path, sharding: str) -> None:
    for stock, ours in run_ranks(2, _describe, str(tmp_path), sharding):
        assert stock == ours
        assert len(stock[0]) >= 6
