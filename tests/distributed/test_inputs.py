"""Inputs on two real ranks: lockstep whatever each of them keeps, in TorchRec's pipeline, resumed bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.distributed.ranks import run_ranks
from tests.inputs.samples import ids_of
from tests.inputs.test_stream import Broken, LastLane, Numbered, breaking, loader_of, stream_of
from tests.models import DIM, META, state_of
from tests.models import _BagSharder as BagSharder
from torchrec_slipstream import (
    AccessConfig,
    AccessProfile,
    FaeInputs,
    InputError,
    InputsConfig,
    Slipstream,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
    TableAccess,
    WeightedBatch,
)
from torchrec_slipstream.inputs.dealing import Lockstep
from torchrec_slipstream.inputs.tally import Tally

SIZE = 8
SLIPSTREAM = InputsConfig(
    method="slipstream",
    slipstream=SlipstreamInputs(
        snapshot_steps=4, sample_share=1.0, min_touches=1, max_threshold=None, search_window=0.1
    ),
)
FAE = InputsConfig(method="fae", fae=FaeInputs(hot_bytes=400 * (DIM * 4 + 4), window=5))

# ------------------------------------------------------------------------------------------------ the stream alone


def uneven(rank: int, world: int, lengths: list[int], shares: list[float], lanes: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(7)
    total = sum(lengths)
    begins = [sum(lengths[:r]) for r in range(world)]
    keep = torch.rand(total, generator=draw) < torch.tensor(shares).repeat_interleave(torch.tensor(lengths))
    lane = torch.randint(0, lanes, (total,), generator=draw).tolist()
    selector, tally = Numbered(keep.tolist(), lane), Tally()
    selector.lanes = lanes
    mine = range(begins[rank], begins[rank] + lengths[rank])
    stream = stream_of(loader_of(mine, SIZE), selector, LastLane(2), Lockstep(dist.GroupMember.WORLD), tally)
    return {
        "batches": [ids_of(batch) for batch in stream],
        "keep": keep.tolist(),
        "lane": lane,
        "left_over": tally.left_over,
    }


@pytest.mark.parametrize(
    ("lengths", "shares", "lanes"),
    [
        ([83, 83], [1.0, 0.0], 1),
        ([83, 31], [0.0, 1.0], 2),
        ([120, 0], [0.7, 0.7], 1),
        ([61, 100], [0.7, 0.7], 3),
        ([40, 40], [0.0, 0.0], 1),
    ],
)
def test_uneven_ranks_take_as_many_full_batches_and_every_sample_once(
    lengths: list[int], shares: list[float], lanes: int
) -> None:
    found = run_ranks(2, uneven, 2, lengths, shares, lanes)
    keep, lane = found[0]["keep"], found[0]["lane"]
    first, second = (one["batches"] for one in found)
    assert len(first) == len(second)
    seen = [i for one in found for ids in one["batches"] for i in ids]
    assert len(seen) == len(set(seen))
    missing = {i for i, kept in enumerate(keep) if kept} - set(seen)
    assert all(keep[i] for i in seen)
    assert len(missing) == sum(one["left_over"] for one in found) <= lanes
    short = 0
    for a, b in zip(first, second, strict=True):
        assert len({lane[i] for i in a + b}) == 1
        assert len(a) == len(b)
        short += len(a) < SIZE
    assert short <= 2 * lanes


def with_a_broken_loader(rank: int) -> tuple[str, str]:
    loader = breaking(range(20), SIZE) if rank == 1 else loader_of(range(100), SIZE)
    stream = stream_of(loader, Numbered([True] * 100), ranks=Lockstep(dist.GroupMember.WORLD))
    try:
        for _ in stream:
            pass
    except (Broken, InputError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_a_loader_that_raises_stops_both_ranks() -> None:
    healthy, broken = run_ranks(2, with_a_broken_loader)
    assert broken == ("Broken", "the disk is gone")
    assert healthy[0] == "InputError"
    assert "rank 1 could not read" in healthy[1]


# ---------------------------------------------------------------------------------------------- a model in training


class Ranker(nn.Module):
    """Two tables and a linear layer; gives the loss, with the numbers of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = EmbeddingBagCollection(
            device=META,
            tables=[
                EmbeddingBagConfig(name=f"t{k}", embedding_dim=DIM, num_embeddings=900, feature_names=[f"f{k}"])
                for k in range(2)
            ],
        )
        self.over = nn.Linear(2 * DIM + 1, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pooled = self.tables(batch.sparse_features).values()
        logits = self.over(torch.cat([pooled, batch.dense_features / 400], dim=1)).squeeze(1)
        weights = batch.weights if isinstance(batch, WeightedBatch) else None
        return binary_cross_entropy_with_logits(logits, batch.labels, weight=weights), batch.dense_features


def parallel(sharding: str, seed: int) -> DistributedModelParallel:
    torch.manual_seed(seed)
    model = Ranker()
    apply_optimizer_in_backward(RowWiseAdagrad, model.tables.parameters(), {"lr": 0.1, "eps": 1e-8})
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device="cpu"),
        constraints={
            f"t{k}": ParameterConstraints(sharding_types=[sharding], compute_kernels=["fused"]) for k in range(2)
        },
        debug=False,
    )
    sharders = [BagSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def popular() -> AccessProfile:
    """The look-ups of samples 0 to 99 are of popular rows: see `numbered`."""
    counts = np.where(np.arange(900) < 200, 10, 1).astype(np.int32)
    tables = [TableAccess(f"t{k}", 900, DIM, counts, lookups=int(counts.sum()), optimizer_bytes=4) for k in range(2)]
    return AccessProfile(tables, 100, 1)


class Training:
    """A run of one rank: model, optimizer, session, TorchRec's pipeline."""

    def __init__(self, config: InputsConfig, sharding: str, seed: int = 0) -> None:
        self.model = parallel(sharding, seed)
        dense = dict(in_backward_optimizer_filter(self.model.named_parameters()))
        self.optimizer = torch.optim.SGD(list(dense.values()), lr=0.1, momentum=0.9)
        staleness = StalenessConfig(where="everywhere", warmup_steps=4, interval=3, min_touches=1)
        access = AccessConfig(counter="exact")
        self.slip = Slipstream(self.model, SlipstreamConfig(inputs=config, staleness=staleness, access=access))
        self.pipeline = TrainPipelineSparseDist(self.model, self.optimizer, torch.device("cpu"))
        self.things: dict[str, Any] = {}
        if config.method == "fae":
            self.things = {"profile": popular(), "test_loss": lambda: float(self.model.module.over.weight.abs().sum())}

    def inputs(self, loader: list[Batch]) -> Iterator[Batch]:
        return self.slip.inputs(loader, **self.things)

    def train(self, stream: Iterator[Batch], steps: int | None = None) -> list[list[int]]:
        order = []
        while steps is None or len(order) < steps:
            try:
                ids = self.pipeline.progress(stream)
            except StopIteration:
                break
            self.slip.step()
            order.append([int(i) for i in ids.view(-1).tolist()])
        return order

    def save(self) -> bytes:
        file = io.BytesIO()
        plain = {
            k: v.clone() for k, v in self.model.state_dict().items() if isinstance(v, Tensor) and k.startswith("o")
        }
        dense = self.optimizer.state_dict()
        whole = {"shards": state_of(self.model), "plain": plain, "optimizer": dense, "slip": self.slip.state_dict()}
        torch.save(whole, file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        whole = torch.load(io.BytesIO(content), weights_only=True)
        optimizer = self.model.fused_optimizer.state_dict()["state"]
        named = [*self.model.state_dict().items(), *(item for one in optimizer.values() for item in one.items())]
        for name, value in named:
            for shard in getattr(value, "local_shards", list)():
                shard.tensor.copy_(whole["shards"][f"{name}@{shard.metadata.shard_offsets}"])
            if name in whole["plain"]:
                value.copy_(whole["plain"][name])
        self.optimizer.load_state_dict(whole["optimizer"])
        self.slip.load_state_dict(whole["slip"])

    def bits(self) -> dict[str, Tensor]:
        dense = [one["momentum_buffer"].clone() for one in self.optimizer.state.values()]
        parts = {f"momentum {i}": one for i, one in enumerate(dense)}
        parts |= {f"dense {i}": one.detach().clone() for i, one in enumerate(self.model.module.over.parameters())}
        return state_of(self.model) | parts


def data(rank: int, epoch: int) -> list[Batch]:
    """Of two ranks 150 and 90 samples an epoch, in an order of each epoch's own."""
    length, begin = ((150, 0), (90, 150))[rank]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(epoch)) + begin
    return loader_of(order.tolist(), SIZE)


def resumed(rank: int, config: InputsConfig, sharding: str, stops: list[int]) -> dict[str, Any]:
    whole = Training(config, sharding)
    want = [whole.train(whole.inputs(data(rank, epoch))) for epoch in range(2)]
    steps = len(want[0]) + len(want[1])
    report = whole.slip.report()
    found = {"want": want, "bits": True, "orders": [], "report": str(report), "inputs": report.inputs}
    for stop in stops:
        first = Training(config, sharding)
        head: list[list[int]] = []
        for epoch in range(1 if stop <= len(want[0]) else 2):
            head += first.train(first.inputs(data(rank, epoch)), stop - len(head))
        content = first.save()

        second = Training(config, sharding, seed=5)
        second.load(content)
        tail: list[list[int]] = []
        for epoch in range(0 if stop < len(want[0]) else 1, 2):  # after an epoch's last step comes the next
            tail += second.train(second.inputs(data(rank, epoch)))
        assert len(head) == stop
        assert len(head) + len(tail) == steps, (len(head), len(tail), steps)
        found["orders"].append(head + tail)
        ours, theirs = whole.bits(), second.bits()
        assert ours.keys() == theirs.keys()
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, (stop, different)
        assert second.slip.report().inputs == report.inputs
    return found


@pytest.mark.parametrize(
    ("config", "sharding", "stops"),
    [
        (InputsConfig(method="negatives", drop_share=0.3), "table_wise", [3, 17]),
        (InputsConfig(method="random", drop_share=0.4), "row_wise", [1, 9, 10]),  # of 9 steps an epoch
        (SLIPSTREAM, "row_wise", [3, 12]),
        (FAE, "table_wise", [2, 8, 15]),
    ],
)
def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one(
    config: InputsConfig, sharding: str, stops: list[int]
) -> None:
    found = run_ranks(2, resumed, config, sharding, stops)
    for one in found:
        for order in one["orders"]:
            assert order == one["want"][0] + one["want"][1]
    for epoch in range(2):
        first, second = (one["want"][epoch] for one in found)
        assert len(first) == len(second)
        seen = [i for order in (first, second) for ids in order for i in ids]
        assert len(seen) == len(set(seen))
        lanes = 2 if config.method == "fae" else 1
        assert [len(ids) for ids in first] == [len(ids) for ids in second]
        assert sum(len(ids) < SIZE for ids in first) <= 2 * lanes
    inputs = found[0]["inputs"]
    assert inputs == found[1]["inputs"]
    assert inputs.read == 2 * 240
    assert inputs.epochs == 2
    assert inputs.used + inputs.dropped + inputs.left_over == inputs.read
    assert inputs.used == sum(len(ids) for one in found for epoch in one["want"] for ids in epoch)
    if config.method == "fae":
        assert inputs.dropped == 0
        batches = [ids for one in found for order in one["want"] for ids in order]
        assert {len({i < 100 for i in ids}) for ids in batches} == {1}  # all hot, or all cold
    elif config.method == "slipstream":
        assert 0 < inputs.dropped_share < 0.5
    else:
        assert inputs.dropped_share == pytest.approx(config.drop_share, abs=0.06)
    assert f"{inputs.read:,} samples read" in found[0]["report"]
