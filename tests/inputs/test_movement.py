"""What rows of several shards and ranks have moved, put together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchrec_slipstream.inputs.movement import Scale, ShardMovement, Snapshot, TableMovement, movements_of
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe import TableShard
from torchrec_slipstream.tbe.features import ModelTable

TABLES = {"t": ModelTable("t", "t", ("a",), 10, 8), "u": ModelTable("u", "u", ("b",), 4, 4)}


@dataclass
class Shard:
    """Part of a table, with weights and touches that a test writes."""

    table: str
    row_offset: int
    col_offset: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        self.at = TableShard(self.table, "", self.rows, self.columns, 0, self.row_offset, self.col_offset)
        self.device = torch.device("cpu")
        self.values = torch.zeros(self.rows, self.columns)
        self.counts = torch.zeros(self.rows, dtype=torch.int64)

    def weights(self, rows: Tensor) -> Tensor:
        return self.values[rows]

    def touches(self, rows: Tensor) -> Tensor:
        return self.counts[rows]


def moved(shard: Shard, rows: list[int], values: list[float]) -> ShardMovement:
    return ShardMovement(shard, np.array(rows), np.array(values, dtype=np.float32))


def test_a_row_moves_as_its_farthest_part_and_is_unknown_without_one() -> None:
    left, right = Shard("t", 0, 0, 10, 4), Shard("t", 0, 4, 10, 4)
    mine = [moved(left, [1, 2, 5], [0.5, 2.0, 1.0]), moved(right, [1, 2, 7], [1.0, 0.25, 1.0])]
    mine.append(moved(Shard("t", 0, 0, 10, 4), [1, 2, 5], [9.0, 9.0, 9.0]))  # a replica of the first
    mine.append(moved(Shard("u", 2, 0, 2, 4), [0, 1], [0.5, math.inf]))  # of the other rows nobody knows
    wanted = {"t": (np.array([1, 2, 5, 7, 8]), np.array([3, 1, 1, 1, 1])), "u": (np.arange(4), np.ones(4, np.int64))}
    found = movements_of(wanted, TABLES, mine, Ranks())
    assert found["t"].moved.tolist() == [1.0, 2.0, math.inf, math.inf, math.inf]
    assert found["t"].lookups.tolist() == [3, 1, 1, 1, 1]
    assert found["u"].moved.tolist() == [math.inf, math.inf, 0.5, math.inf]


def test_rows_that_were_not_tried_have_no_movement() -> None:
    shard = Shard("t", 0, 0, 10, 8)
    shard.values[:] = 2.0
    shard.values[4] = 0.0
    shard.counts[7] = 2**30 + 5
    before = Snapshot(shard, torch.arange(8))
    shard.counts[:7] += torch.tensor([0, 1, 2, 3, 4, 4, 4])
    shard.counts[7] = 6  # lowered, as counts near the end of int32 are
    shard.values[2:8, 3] += 1.0
    shard.values[5, 0] = math.nan
    inf = math.inf
    assert before.movement("plain", 2, 1).moved.tolist() == [inf, inf, 1.0, 1.0, 1.0, inf, 1.0, 1.0]
    assert before.movement("per_touch", 2, 1).moved[[2, 3, 6]].tolist() == [0.5, float(np.float32(1 / 3)), 0.25]
    assert before.movement("per_touch", 2, 2).moved[[1, 2]].tolist() == [0.0, 0.25]  # a touch stands for two
    assert before.movement("relative", 2, 1).moved[[2, 4]].tolist() == [0.5, inf]


def test_shares_of_a_tables_lookups() -> None:
    one = TableMovement(np.arange(4), np.array([1, 2, 1, 4]), np.array([0.3, 0.1, math.inf, 0.2]))
    scale = Scale.of(one)
    assert scale.shares(one).moved.tolist() == [6 / 8, 0.0, math.inf, 2 / 8]
    for share, threshold in ((0.0, 0.1), (1e-9, 0.2), (2 / 8, 0.2), (0.26, 0.3), (0.7, 0.3), (0.8, math.inf)):
        assert scale.threshold(share) == threshold
        assert [m < threshold for m in one.moved] == [m < share for m in scale.shares(one).moved]
