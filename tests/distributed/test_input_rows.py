"""The input classifiers on real ranks: sets of rows from shards of every kind, Slipstream's search, hot batches."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor

from tests.distributed.mixed import ROWS as MIXED_ROWS
from tests.distributed.mixed import Mixed
from tests.distributed.ranks import run_ranks
from tests.distributed.test_overlay import compare, only_hot
from tests.models import DIM, ROWS, TwoCollections, batches_for, placement_of, sharded, state_of
from torchrec_slipstream import (
    AccessConfig,
    FaeInputs,
    InputsConfig,
    Slipstream,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
)
from torchrec_slipstream.inputs.dealing import Lockstep
from torchrec_slipstream.inputs.fae import COLD, HOT, FaeSelector, ShuffleScheduler
from torchrec_slipstream.inputs.hot import hot_of_overlays, hot_of_placement
from torchrec_slipstream.inputs.queues import HandedOut
from torchrec_slipstream.inputs.rows import RowSets, ShardRows
from torchrec_slipstream.inputs.slipstream import SlipstreamSelector
from torchrec_slipstream.inputs.stream import InputStream
from torchrec_slipstream.inputs.tally import Tally
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe import TableShard, find_tbes
from torchrec_slipstream.tbe.features import ModelTable, model_tables
from torchrec_slipstream.tbe.watched import watched_shards

pytestmark = pytest.mark.slow  # every test starts processes


@dataclass
class Pair:
    """A batch of :class:`TwoCollections`."""

    bags: KeyedJaggedTensor
    sequences: KeyedJaggedTensor


# ----------------------------------------------------------------------------------------------- tables and sets


def _tables(rank: int, sharding: dict[str, str]) -> tuple[ModelTable, ...]:
    return model_tables(sharded(TwoCollections(), sharding))


def test_tables_of_a_sharded_model() -> None:
    """The same on a rank that holds nothing of a table."""
    sharding = {"b0": "row_wise", "b1": "data_parallel", "s0": "table_wise", "s1": "table_wise"}
    first, second = run_ranks(2, _tables, sharding)
    assert first == second
    assert first == tuple(
        ModelTable(f"{path}.{kind}{i}", f"{kind}{i}", (f"f{kind}{i}",), rows, DIM, replicated=f"{kind}{i}" == "b1")
        for path, kind in (("bags", "b"), ("sequences", "s"))
        for i, rows in enumerate(ROWS)
    )


def _gathered(rank: int) -> tuple[dict[str, list[bool]], list[tuple[str, int]]]:
    """The sets by table, and this rank's shards: their tables and first columns."""
    model = Mixed()
    parallel = sharded(model, model.shardings())
    shards = [shard for one in find_tbes(parallel) for shard in one.shards]
    mine = [ShardRows.of(one, in_shard(one).numpy()) for one in shards]
    sets = RowSets.gathered(model_tables(parallel), mine, Ranks(dist.group.WORLD))
    return {fqn: sets.of(fqn).tolist() for fqn in sets.tables}, [(one.fqn, one.col_offset) for one in shards]


def in_shard(shard: TableShard) -> Tensor:
    """bool ``[rows]``, so that each column shard has an opinion of its own."""
    return torch.tensor([is_in(row + shard.row_offset, shard.col_offset) for row in range(shard.rows)])


def is_in(row: int, column: int) -> bool:
    return row * 7 % (5 + column) > 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_sets_of_all_shardings(world_size: int) -> None:
    ranks = run_ranks(world_size, _gathered)
    columns: dict[str, set[int]] = {}
    for fqn, column in itertools.chain(*(shards for _, shards in ranks)):
        columns.setdefault(fqn, set()).add(column)
    assert len(columns) > 10
    assert max(map(len, columns.values())) >= world_size
    for found, _ in ranks:
        assert found == {
            fqn: [all(is_in(row, column) for column in columns[fqn]) for row in range(MIXED_ROWS)] for fqn in columns
        }


# ----------------------------------------------------------------------------------------------- Slipstream

KNOBS = SlipstreamInputs(
    start=4, snapshot_steps=20, sample_share=1.0, min_touches=2, search_window=0.02, max_threshold=1.0
)


def _train(rank: int, sharding: dict[str, str], knobs: SlipstreamInputs) -> dict[str, Any]:
    """What an oracle needs of one rank, and what its selector found."""
    parallel = sharded(TwoCollections(), sharding)
    replicated = tuple(name for name, kind in sharding.items() if kind == "data_parallel")
    staleness = StalenessConfig(target_share=0.0, exclude_tables=replicated)
    config = SlipstreamConfig(staleness=staleness, access=AccessConfig(counter="exact"))
    session = Slipstream(parallel, config)
    shards = watched_shards(session._filters)
    selector = SlipstreamSelector(knobs, model_tables(parallel), shards, None, Ranks(dist.group.WORLD), drop_share=0.3)
    weights, batches, kept = {}, [], []
    for step, (bags, sequences) in enumerate(batches_for(TwoCollections(), steps=40, rank=rank)):
        if step in (knobs.start, knobs.start + knobs.snapshot_steps):
            weights[step] = state_of(parallel)
        kept.append(selector.choose(Pair(bags, sequences)).keep.tolist())
        parallel(bags, sequences).square().sum().backward()
        session.step()
        selector.step(step + 1)
        batches.append({key: one[key].to_dense() for one in (bags, sequences) for key in _keys(one)})
    assert selector.stale is not None
    (search,) = selector.searches
    return {
        "weights": weights, "kept": kept, "threshold": search.found.threshold, "share": search.found.share,
        "batches": [{k: [bag.tolist() for bag in v] for k, v in batch.items()} for batch in batches],
        "stale": {fqn: selector.stale.of(fqn).tolist() for fqn in selector.stale.tables},
        "samples": search.found.samples,
    }  # fmt: skip


def _keys(features: KeyedJaggedTensor) -> list[str]:
    return features.keys()


def whole_tables(ranks: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
    """Weights of all shards of all ranks, by table."""
    tables = {f"{kind}{i}": torch.full((rows, DIM), torch.nan) for kind in "bs" for i, rows in enumerate(ROWS)}
    for rank in ranks:
        for name, value in rank["weights"][step].items():
            path, at = name.split("@")
            if path.endswith(".weight"):
                row, column = (int(part) for part in at.strip("[]()").removeprefix("torch.Size([").split(","))
                tables[path.split(".")[-2]][row : row + value.shape[0], column : column + value.shape[1]] = value
    return tables


@pytest.mark.parametrize(
    ("sharding", "variant"),
    [
        ({"b0": "row_wise", "b1": "column_wise", "s0": "table_wise", "s1": "row_wise"}, {}),
        ({"b0": "row_wise", "b1": "data_parallel", "s0": "table_wise", "s1": "row_wise"}, {"stale_lookups": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore:Slipstream's search")
def test_slipstream_agrees_over_ranks(sharding: dict[str, str], variant: dict[str, Any]) -> None:
    knobs = replace(KNOBS, **variant)
    ranks = run_ranks(2, _train, sharding, knobs)
    assert ranks[0]["stale"] == ranks[1]["stale"]
    end = knobs.start + knobs.snapshot_steps
    first, last = whole_tables(ranks, knobs.start), whole_tables(ranks, end)
    touches: Counter[tuple[str, int]] = Counter()
    for rank, step in itertools.product(ranks, range(knobs.start, end)):
        for feature, bags in rank["batches"][step].items():
            touches.update((feature[1:], row) for bag in bags for row in bag)
    watched = [name for name, kind in sharding.items() if kind != "data_parallel"]
    moved = {
        (name, row): float((last[name][row] - first[name][row]).abs().max()) if touches[name, row] >= 2 else 9.0
        for name in watched
        for row in range(len(first[name]))
    }

    def is_stale(batch: dict[str, list[list[int]]], sample: int, threshold: float) -> bool:
        bags = [(feature[1:], bags[sample]) for feature, bags in batch.items() if feature[1:] in watched]
        rows = [moved[name, row] < threshold for name, bag in bags for row in bag]
        return bool(rows) and sum(rows) >= (knobs.stale_lookups or len(rows))

    sampled = [(batch, i) for rank in ranks for batch in rank["batches"][:end] for i in range(8)]
    low, high, best, nearest = 0.0, 1.0, 0.0, 0.3
    for _ in range(25):
        middle = (low + high) / 2
        share = sum(is_stale(batch, i, middle) for batch, i in sampled) / len(sampled)
        if abs(share - 0.3) < nearest:
            best, nearest = middle, abs(share - 0.3)
        if abs(share - 0.3) <= 0.02:
            best = middle
            break
        low, high = (middle, high) if share < 0.3 else (low, middle)
    assert best > 0
    dropped = 0
    for rank in ranks:
        assert (rank["threshold"], rank["samples"]) == (best, len(sampled))
        assert rank["stale"].keys() == {f"{'bags' if name[0] == 'b' else 'sequences'}.{name}" for name in watched}
        for fqn, rows in rank["stale"].items():
            name = fqn.split(".")[1]
            assert rows == [moved[name, row] < best for row in range(len(rows))], name
        for step, (keep, batch) in enumerate(zip(rank["kept"], rank["batches"], strict=True)):
            assert keep == [step < end or not is_stale(batch, i, best) for i in range(8)]
            dropped += 8 - sum(keep)
    assert dropped > 20


# ----------------------------------------------------------------------------------------------- FAE


def _hot_batches(rank: int) -> dict[str, int]:
    stock, ours = (sharded(TwoCollections(), "row_wise") for _ in range(2))
    placement = placement_of(ours, 0.5)
    session = Slipstream(ours, only_hot(), placement=placement)
    hot = hot_of_placement(model_tables(ours), placement)
    now = hot_of_overlays(model_tables(ours), session._filters, placement, Ranks(dist.group.WORLD))
    assert now.digest == hot.digest
    loader = [Pair(*batch) for batch in batches_for(TwoCollections(), steps=60, rank=rank, longest=1)]
    losses: list[float] = []

    def test_loss() -> float:
        """A forward that all ranks have to make, in the middle of reading."""
        with torch.no_grad():
            outputs = ours(*next(batches_for(TwoCollections(), steps=1, rank=9, longest=1)))
        losses.append(float(outputs.square().mean()))
        return losses[-1]

    scheduler = ShuffleScheduler(FaeInputs(window=12), test_loss, Ranks(dist.group.WORLD).total)
    stream = InputStream(loader, FaeSelector(hot), scheduler, Lockstep(dist.group.WORLD), Tally(), HandedOut())
    counts: Counter[str] = Counter()
    for batch in stream:
        before = served(session)
        for model in (stock, ours):
            model(batch.bags, batch.sequences).square().sum().backward()
        session.step()
        lookups, hits = served(session) - before
        samples = hot.samples([batch.bags, batch.sequences]).all_inside
        lane = HOT if bool(samples.all()) else COLD
        assert lane == HOT or not samples.any()  # never mixed
        if lane == HOT:
            assert hits == lookups
            assert all(one.tbe._indices.numel() == 0 for one in session._filters)
        counts["hot" if lane == HOT else "cold"] += 1
        counts["hits"] += int(hits)
        counts["misses"] += int(lookups - hits)
        counts["samples"] += len(samples)
    exact, rounded = compare(state_of(stock), state_of(ours))
    assert rounded == 0
    return {**counts, "exact": exact, "asked": len(losses)}


def served(session: Slipstream) -> Tensor:
    """int64 ``[2]``: look-ups so far, and those that overlays served."""
    overlays = [one.overlay for one in session._filters]
    hits = sum(int(one.hits.sum()) for one in overlays if one is not None)
    return torch.tensor([sum(int(one.lookups.sum()) for one in session._filters), hits])


def test_hot_batches_touch_the_overlay_only() -> None:
    first, second = run_ranks(2, _hot_batches)
    for result in (first, second):
        assert result["hot"] > 5
        assert result["cold"] > 5
        assert result["hits"] > 100
        assert result["misses"] > 100
        assert result["exact"] >= 8
        assert result["asked"] > 3
    assert first["hot"] == second["hot"]
    assert 2 * 60 * 8 - 3 <= first["samples"] + second["samples"] <= 2 * 60 * 8


def _hot_batches_through_re_plans(rank: int) -> dict[str, Any]:
    """Rows of all shardings become hot and cold, of other look-ups on each rank; nothing is known at first."""
    model = sharded(TwoCollections(), {"b0": "row_wise", "b1": "column_wise", "s0": "table_wise", "s1": "row_wise"})
    plain = only_hot(hbm_budget=2500, replan_every=6)
    session = Slipstream(model, replace(plain, inputs=InputsConfig(method="fae", fae=FaeInputs(window=3))))
    reads: list[int] = []  # by input batch, the re-plans before it was read

    def loader() -> Iterator[Pair]:
        for bags, sequences in batches_for(TwoCollections(), steps=80, rank=rank, longest=1):
            reads.append(sum(one.moved for one in session._hot.replans))
            fewer = 3 if len(reads) < 45 else 2
            yield Pair(_popular(bags, fewer), _popular(sequences, fewer))

    counts: Counter[str] = Counter()
    digests = []
    for batch in session.inputs(loader()):
        is_known = sum(one.moved for one in session._hot.replans) == reads[max(0, len(reads) - 3)]
        before = served(session)
        model(batch.bags, batch.sequences).square().sum().backward()
        lookups, hits = served(session) - before
        selector = session._inputs._method[0]
        of_mine = bool(selector.hot.samples([batch.bags, batch.sequences]).all_inside.all())
        of_all = torch.tensor(int(of_mine))  # this rank's tables serve all ranks' look-ups
        torch.distributed.all_reduce(of_all, torch.distributed.ReduceOp.MIN)
        is_hot = bool(of_all)
        digests.append(selector.hot.digest)
        if is_known and is_hot:
            assert hits == lookups
            assert all(one.tbe._indices.numel() == 0 for one in session._filters)
            counts["hot"] += 1
        session.step()
    return {**counts, "digests": digests, "moves": sum(one.moved for one in session._hot.replans)}


def _popular(features: KeyedJaggedTensor, power: int) -> KeyedJaggedTensor:
    """The same with few rows most of the time."""
    values = features.values()
    share = (values % 97).double() / 97
    return KeyedJaggedTensor(
        features.keys(), (values.double() * share**power).long(), lengths=features.lengths(), stride=features.stride()
    )


def test_hot_batches_follow_re_plans_on_all_ranks_alike() -> None:
    first, second = run_ranks(2, _hot_batches_through_re_plans)
    assert first["digests"] == second["digests"]
    assert len({*first["digests"]}) > 4
    assert first["moves"] == second["moves"] > 4
    assert min(first["hot"], second["hot"]) > 5
