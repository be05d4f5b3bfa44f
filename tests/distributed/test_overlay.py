"""Hot rows in an overlay against stock TorchRec: real DistributedModelParallel on gloo ranks, rows forced to move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim import RowWiseAdagrad
from torchrec.streamable import Pipelineable

from tests.distributed.mixed import POOLED, SEQUENCES, WEIGHTED, Mixed, move_at_random
from tests.distributed.ranks import run_ranks
from tests.models import ROWS, TwoCollections, batches_for, placement_of, sharded, state_of
from torchrec_slipstream import AccessConfig, PlacementConfig, Slipstream, SlipstreamConfig, StalenessConfig

pytestmark = pytest.mark.slow  # every test starts processes

STEPS, MOVES = 200, (50, 100, 150)
NO_STALENESS = StalenessConfig(target_share=0.0)


def only_hot(**placement: Any) -> SlipstreamConfig:
    """A session that skips no update; re-plans, if any, by exact counts and no clock."""
    more = {"min_gain": 0.0, "move_cost": 0.0, "max_stall_share": None, "record_every": 10}
    return SlipstreamConfig(
        staleness=NO_STALENESS, access=AccessConfig(counter="exact"), placement=PlacementConfig(**more | placement)
    )


def compare(stock: dict[str, Tensor], ours: dict[str, Tensor]) -> tuple[int, int]:
    """Asserts that two states are equal: bit for bit where bags have one look-up. How many tensors of either kind."""
    assert stock.keys() == ours.keys()
    exact = rounded = 0
    for name, want in stock.items():
        assert bool(want.isfinite().all())
        if "_many" in name:
            torch.testing.assert_close(ours[name], want, rtol=1e-5, atol=1e-6 * float(want.abs().amax()))
            rounded += 1
        else:
            assert torch.equal(ours[name], want), name
            exact += 1
    return exact, rounded


def _mixed(rank: int, groups: tuple[str, ...], optimizer: type[torch.optim.Optimizer]) -> dict[str, Any]:
    rate = 0.01 if optimizer is torch.optim.SGD else 0.1
    stock, ours = (
        sharded(model, model.shardings(), optimizer=optimizer, learning_rate=rate)
        for model in (Mixed(groups), Mixed(groups))
    )
    slip = Slipstream(ours, only_hot(), placement=placement_of(ours, 0.3))
    moved = []
    for step, batch in enumerate(Mixed(groups).batches(STEPS, rank)):
        outputs = [model(*batch) for model in (stock, ours)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        for output in outputs:
            output.square().sum().backward()
        slip.step()
        if step in MOVES:
            moved.append(move_at_random(slip, step + rank))
    exact, rounded = compare(state_of(stock), state_of(ours))
    report = slip.report().placement
    assert report is not None
    slip.detach()
    compare(state_of(stock), state_of(ours))
    return {
        "moved": moved, "exact": exact, "rounded": rounded,
        "hits": {name: table.hits for name, table in report.tables.items()},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("world_size", "optimizer"),
    [(1, torch.optim.SGD), (1, torch.optim.Adagrad), (2, RowWiseAdagrad)],
)
def test_forced_migrations_leave_stock_training(world_size: int, optimizer: type[torch.optim.Optimizer]) -> None:
    """Table-, row-, column- and table-row-wise; sum, mean, weighted, sequence; in one model."""
    # Ranks wait for each other in every group, so on two of them only one of each sharding here.
    groups = POOLED + WEIGHTED + SEQUENCES if world_size == 1 else ("tw_sum", "rw_weighted", "cw_sum", "twrw_mean")
    ranks = run_ranks(world_size, _mixed, groups, optimizer)
    for result in ranks:
        assert len(result["moved"]) == len(MOVES)
        assert min(result["moved"]) > 50
        assert result["exact"] >= 6
        assert result["rounded"] >= 6
        assert result["hits"] == ranks[0]["hits"]
    assert min(ranks[0]["hits"].values()) > 100, ranks[0]["hits"]


def _replanned(rank: int, sharding: str) -> dict[str, Any]:
    stock, ours = (sharded(TwoCollections(), sharding) for _ in range(2))
    # What the counts find hot moves on every 40 steps, so that every re-plan has something to move.
    config = only_hot(hbm_budget=2000, replan_every=20)
    slip = Slipstream(ours, config)
    for step, batch in enumerate(batches_for(TwoCollections(), steps=100, rank=rank, longest=1)):
        drifted = tuple(_shifted(one, 9 * (step // 40)) for one in batch)
        for model in (stock, ours):
            model(*drifted).square().sum().backward()
        slip.step()
    compare(state_of(stock), state_of(ours))
    report = slip.report().placement
    assert report is not None
    return {
        "moved": [(one.demoted, one.promoted) for one in report.replans],
        "rates": report.hit_rates(),
        "mine": [one.moved for one in slip._hot.replans],
        "bytes": slip._hot.hbm_bytes,
    }


def _shifted(batch: KeyedJaggedTensor, by: int) -> KeyedJaggedTensor:
    """Other rows popular: each feature's ids turned by ``by``."""
    values = [(batch[key].values() + by) % rows for key, rows in zip(batch.keys(), ROWS, strict=True)]
    return KeyedJaggedTensor(batch.keys(), torch.cat(values), lengths=batch.lengths())


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_replans_leave_stock_training(sharding: str) -> None:
    """Rows found hot by counts; both ranks tell the same story, and each keeps to the budget."""
    first, second = run_ranks(2, _replanned, sharding)
    assert (first["moved"], first["rates"], first["mine"]) == (second["moved"], second["rates"], second["mine"])
    assert len(first["moved"]) == 5
    assert sum(demoted + promoted > 0 for demoted, promoted in first["moved"]) >= 3
    assert sum(demoted for demoted, _ in first["moved"]) > 5
    assert max(first["bytes"], second["bytes"]) <= 2000
    assert min(first["bytes"], second["bytes"]) > 1500
    assert first["rates"][0][1] == 0.0
    assert max(rate for _, rate in first["rates"]) > 0.3


@dataclass
class _Batch(Pipelineable):
    bags: KeyedJaggedTensor
    sequences: KeyedJaggedTensor

    def to(self, device: torch.device, non_blocking: bool = False) -> _Batch:
        return _Batch(self.bags.to(device), self.sequences.to(device))

    def record_stream(self, stream: Any) -> None:
        pass

    def pin_memory(self) -> _Batch:
        return self


class _Pipelined(nn.Module):
    """What TorchRec's pipelines take: traceable, one batch in, losses and output out."""

    def __init__(self) -> None:
        super().__init__()
        self.both = TwoCollections()

    def forward(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        pooled = self.both.bags(batch.bags).values()
        sequences = self.both.sequences(batch.sequences)
        rows = torch.cat([sequences["fs0"].values(), sequences["fs1"].values()])
        return pooled.square().sum() + rows.square().sum(), pooled.detach()


def _pipelined(rank: int, pipeline: type[Any], sharding: str) -> int:
    states, moved = [], 0
    for with_overlay in (False, True):
        model = sharded(_Pipelined(), sharding)
        slip = Slipstream(model, only_hot(), placement=placement_of(model, 0.3)) if with_overlay else None
        dense = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        runs = pipeline(model, dense, torch.device("cpu"))
        batches = iter([_Batch(*one) for one in batches_for(TwoCollections(), steps=40, rank=rank, longest=1)])
        for step in range(40):
            runs.progress(batches)
            if slip is not None:
                slip.step()
                if step % 10 == 5:  # while the pipeline holds the coming batches
                    moved += move_at_random(slip, step + rank)
        with pytest.raises(StopIteration):
            runs.progress(batches)
        states.append(state_of(model))
    compare(*states)
    return moved


@pytest.mark.parametrize("pipeline", [TrainPipelineBase, TrainPipelineSparseDist])
def test_under_torchrecs_pipelines(pipeline: type[Any]) -> None:
    """PrefetchTrainPipelineSparseDist refuses a CPU by itself, without a session as well: see tests/gpu."""
    assert min(run_ranks(2, _pipelined, pipeline, "row_wise")) > 50


class _Bags(nn.Module):
    """TorchRec 1.8 has variable batches on a CPU only where one TBE serves the whole collection."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = TwoCollections().bags.__class__(
            device=torch.device("meta"), tables=TwoCollections(weighted=True).bags.embedding_bag_configs()
        )

    def forward(self, bags: KeyedJaggedTensor) -> Tensor:
        values: Tensor = self.bags(bags).values()
        return values


def _variable_batches(steps: int, rank: int) -> Iterator[KeyedJaggedTensor]:
    """Batches of another size a feature, of one look-up a bag."""
    for step in range(steps):
        # Ranks draw the same sizes, since gloo cannot gather different ones.
        sizes = [3 + (step * (1 + f)) % 6 for f in range(len(ROWS))]
        generator = torch.Generator().manual_seed(1000 * rank + step)
        lengths = [torch.randint(0, 2, (size,), generator=generator) for size in sizes]
        values = [
            (rows ** torch.rand(int(length.sum()), generator=generator)).long().clamp(max=rows) - 1
            for rows, length in zip(ROWS, lengths, strict=True)
        ]
        keys = [f"fb{i}" for i in range(len(ROWS))]
        inverse = torch.stack([torch.randint(0, size, (8,), generator=generator) for size in sizes])
        yield KeyedJaggedTensor(
            keys, torch.cat(values), lengths=torch.cat(lengths), stride_per_key_per_rank=[[size] for size in sizes],
            inverse_indices=(keys, inverse),
        )  # fmt: skip


def _variable(rank: int, sharding: str) -> int:
    stock, ours = (sharded(_Bags(), sharding, optimizer=torch.optim.SGD, learning_rate=0.01) for _ in range(2))
    slip = Slipstream(ours, only_hot(), placement=placement_of(ours, 0.3))
    moved = 0
    for step, batch in enumerate(_variable_batches(40, rank)):
        assert batch.variable_stride_per_key()
        for model in (stock, ours):
            model(batch).square().sum().backward()
        slip.step()
        if step % 10 == 5:
            moved += move_at_random(slip, step + rank)
    compare(state_of(stock), state_of(ours))
    return moved


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise", "table_row_wise"])
def test_variable_batches(sharding: str) -> None:
    assert min(run_ranks(2, _variable, sharding)) > 20
