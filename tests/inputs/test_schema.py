"""Batches that could not be joined are refused where they are read, so that no rank is left waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.inputs.samples import numbered
from tests.inputs.test_stream import Numbered, Threads, stream_of
from torchrec_slipstream import InputError
from torchrec_slipstream.inputs.batches import with_weights
from torchrec_slipstream.inputs.blind import KeepAll
from torchrec_slipstream.inputs.dealing import Lockstep


def renamed(batch: Batch, weights: torch.Tensor | None = None, key: str = "f0") -> Batch:
    kjt = batch.sparse_features
    kjt = KeyedJaggedTensor(
        keys=[key, "f1"], values=kjt.values(), weights=weights, lengths=kjt.lengths(), stride=kjt.stride()
    )
    return replace(batch, sparse_features=kjt)


ONE = numbered([0, 1, 2, 3], longest=0)
OTHERS = [
    (replace(ONE, labels=None), "batch's 'labels' is None, and was a tensor [B] in the loader's first batch"),
    (replace(ONE, dense_features=torch.zeros(4, 2)), "'dense_features' is a tensor [B, 2], and was a tensor [B, 1]"),
    (renamed(ONE, key="g"), "'sparse_features' is a KeyedJaggedTensor of g, f1 without weights, and was"),
    (renamed(ONE, weights=torch.ones(8)), "of f0, f1 with weights, and was a KeyedJaggedTensor of f0, f1 without"),
    (with_weights(ONE, torch.ones(4)), "batch is WeightedBatch, and was Batch"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS)
def test_a_batch_that_could_not_be_joined_stops_all_ranks_where_it_is_read(other: Batch, message: str) -> None:
    def train(rank: Lockstep) -> Any:
        mine = [numbered(range(4), longest=0) for _ in range(9)]
        if rank.rank == 1:
            mine[3] = other
        taken = 0
        try:
            # One in two goes: batches are joined from pieces, those of different batches among them.
            for _ in stream_of(mine, Numbered([True, False] * 2), ranks=rank):
                taken += 1
        except InputError as error:
            return taken, str(error)

    healthy, broken = Threads(2).run(train)
    assert healthy[0] == broken[0]
    assert healthy[1].startswith("rank 1 could not read its next input batch")
    assert message in broken[1]


@pytest.mark.parametrize("other", [other for other, _ in OTHERS])
def test_ranks_whose_batches_differ_are_refused_on_all(other: Batch) -> None:
    def train(rank: Lockstep) -> Any:
        mine = [other if rank.rank == 1 else ONE for _ in range(9)]
        return list(stream_of(mine if rank.rank < 2 else [], KeepAll(), ranks=rank))

    for error in Threads(3).run(train):
        assert isinstance(error, InputError)
        assert "the ranks' first batches differ in their fields" in str(error)


def test_a_resumed_stream_knows_its_first_batch() -> None:
    stream = stream_of([ONE] * 5, KeepAll())
    next(stream)
    resumed = stream_of([ONE, ONE, replace(ONE, labels=None)], KeepAll())
    resumed.load_state_dict(stream.state_dict())
    with pytest.raises(InputError, match=r"'labels' is None, and was a tensor \[B\]"):
        list(resumed)
