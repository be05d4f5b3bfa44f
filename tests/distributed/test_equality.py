"""Against stock TorchRec on real gloo ranks: live rows as stock, stale rows untouched, one decision for all ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from tests.distributed.ranks import run_ranks
from tests.models import TwoCollections, batches_for, sharded
from torchrec_slipstream import AccessConfig, AttachError, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.tbe.update_filter import ALWAYS_LIVE

pytestmark = pytest.mark.slow  # every test starts processes

SHARDINGS = ["table_wise", "row_wise", "column_wise"]


def config(**changes: Any) -> SlipstreamConfig:
    # Duty cycles: which rows are live in a step is known before it, so that it can be compared row by row.
    base: dict[str, Any] = {
        "where": "everywhere", "selection": "duty", "interval": 5, "warmup_steps": 10, "max_table_share": 1.0,
    }  # fmt: skip
    return SlipstreamConfig(staleness=StalenessConfig(**{**base, **changes}), access=AccessConfig(counter="exact"))


def _step_by_step(rank: int, sharding: str) -> dict[str, int]:
    """Every step from the same state on both models; all rows compared after each."""
    ours, stock = sharded(TwoCollections(), sharding), sharded(TwoCollections(), sharding)
    session = Slipstream(ours, config())
    filters = session._filters
    live_rows = stale_rows = 0
    for batch in batches_for(TwoCollections(), steps=30, rank=rank):
        stock.load_state_dict(copy.deepcopy(ours.state_dict()))
        stock.fused_optimizer.load_state_dict(copy.deepcopy(ours.fused_optimizer.state_dict()))
        live = [(one.patterns.long() >> one.phase) & 1 == 1 for one in filters]
        stock_weights = [one.tbe for one in Slipstream(stock, config())._filters]
        for tbe in stock_weights:
            tbe._slipstream.detach()
        before = [[w.clone() for w in one.tbe.split_embedding_weights()] for one in filters]
        momenta = [[s[0].clone() for s in one.tbe.split_optimizer_states()] for one in filters]
        outputs = [model(*copy.deepcopy(batch)) for model in (ours, stock)]
        assert torch.equal(outputs[0], outputs[1])
        for output in outputs:
            output.square().sum().backward()
        for one, twin, alive, was, momentum in zip(filters, stock_weights, live, before, momenta, strict=True):
            for i, shard in enumerate(one.shards):
                rows = alive[shard.row_begin : shard.row_begin + shard.rows]
                got, want = one.tbe.split_embedding_weights()[i], twin.split_embedding_weights()[i]
                # Rows of a mean-pooled table may differ by a rounding where a bag is live in part.
                if shard.table == "b1" and sharding != "row_wise":
                    torch.testing.assert_close(got[rows], want[rows], rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(got[rows], want[rows])
                assert torch.equal(got[~rows], was[i][~rows])
                assert torch.equal(one.tbe.split_optimizer_states()[i][0][~rows], momentum[i][~rows])
                live_rows += int(rows.sum())
                stale_rows += int((~rows).sum())
        session.step()
    return {"live": live_rows, "stale": stale_rows}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_step_equals_stock(world_size: int, sharding: str) -> None:
    counts = run_ranks(world_size, _step_by_step, sharding)
    assert sum(c["live"] for c in counts) > 0
    assert sum(c["stale"] for c in counts) > 0


def _train(rank: int, sharding: str, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    model = sharded(TwoCollections(), sharding)
    session = Slipstream(model, config(**changes))
    for batch in batches_for(TwoCollections(), steps=steps, rank=rank):
        model(*batch).square().sum().backward()
        session.step()
    scales = []
    for tbe in session._tracker._tbes:
        free = (tbe.pool.duty < 1.0) & (tbe.pool.duty > 0.0)
        scales += (tbe.pool.duty / tbe.pool.score)[free].tolist()
    stale_scores, live_scores = [], []
    for tbe in session._tracker._tbes:
        known = tbe.pool.score.isfinite()
        stale_scores += tbe.pool.score[known & (tbe.pool.duty == 0)].tolist()
        turn = tbe.thaw_turn(session._tracker._intervals)
        live_scores += tbe.pool.score[known & (tbe.pool.duty == 1) & ~turn].tolist()
    report = session.report()
    return {
        "scales": scales,
        "stale": stale_scores,
        "live": live_scores,
        "share": report.measured_share,
        "sampling": [(one.sampling.scale, one.sampling.least) for one in session._filters if one.sampling is not None],
        "decisions": [(d.step, d.pool_rows, d.stale_rows, d.measured_share) for d in report.decisions],
        "tables": {name: (t.rows, t.lookups, t.skipped) for name, t in report.tables.items()},
    }


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_ranks_agree_on_one_scale_and_one_report(sharding: str) -> None:
    first, second = run_ranks(2, _train, sharding, {}, 60)
    scales = torch.tensor(first["scales"] + second["scales"])
    assert len(first["scales"]) > 5
    assert len(second["scales"]) > 5
    torch.testing.assert_close(scales, scales[:1].expand_as(scales), rtol=1e-4, atol=0)
    assert first["decisions"] == second["decisions"]
    assert first["tables"] == second["tables"]
    assert {name: rows for name, (rows, _, _) in first["tables"].items()} == {
        "bags.b0": 120, "bags.b1": 40, "sequences.s0": 120, "sequences.s1": 40,
    }  # fmt: skip
    assert first["share"] == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("search", ["quantile", "bisection"])
def test_ranks_agree_on_one_threshold(search: str) -> None:
    changes = {"selection": "threshold", "signal": "movement", "search": search}
    first, second = run_ranks(2, _train, "row_wise", changes, 60)
    stale, live = first["stale"] + second["stale"], first["live"] + second["live"]
    assert stale
    assert live
    assert max(stale) <= min(live)


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_ranks_agree_on_one_sampling(sharding: str) -> None:
    first, second = run_ranks(2, _train, sharding, {"selection": "sampling"}, 60)
    assert len({*first["sampling"], *second["sampling"]}) == 1
    assert first["decisions"] == second["decisions"]
    assert first["tables"] == second["tables"]
    assert first["share"] == pytest.approx(0.5, abs=0.06)


def _resume(rank: int, sharding: str, selection: str, split: int, steps: int) -> int:
    """Asserts equality; how many of this rank's rows are stale at the end."""
    stale = 0

    def run(model: torch.nn.Module, session: Slipstream, of: range) -> None:
        for step, batch in enumerate(batches_for(TwoCollections(), steps=steps, rank=rank)):
            if step in of:
                model(*batch).square().sum().backward()
                session.step()

    whole = sharded(TwoCollections(), sharding)
    uninterrupted = Slipstream(whole, config(selection=selection))
    run(whole, uninterrupted, range(steps))
    first = sharded(TwoCollections(), sharding)
    session = Slipstream(first, config(selection=selection))
    run(first, session, range(split))
    saved = copy.deepcopy((first.state_dict(), first.fused_optimizer.state_dict(), session.state_dict()))
    second = sharded(TwoCollections(), sharding, seed=5)
    resumed = Slipstream(second, config(selection=selection))
    second.load_state_dict(saved[0])
    second.fused_optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    run(second, resumed, range(split, steps))
    for want, got in zip(uninterrupted._filters, resumed._filters, strict=True):
        for a, b in zip(want.tbe.split_embedding_weights(), got.tbe.split_embedding_weights(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(want.patterns, got.patterns)
        stale += int((want.patterns != ALWAYS_LIVE).sum())
    return stale


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
@pytest.mark.parametrize("selection", ["sampling", "duty"])
def test_resumed_run_on_two_ranks(sharding: str, selection: str) -> None:
    assert sum(run_ranks(2, _resume, sharding, selection, 33, 50)) > 0


def _keys(rank: int, sharding: str) -> list[str]:
    model = sharded(TwoCollections(), sharding)
    return sorted(Slipstream(model, config()).state_dict()["staleness"]["shards"])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_state_keys_of_two_ranks_are_distinct(sharding: str) -> None:
    """So that torch.distributed.checkpoint keeps every rank's."""
    first, second = run_ranks(2, _keys, sharding)
    assert first
    assert second
    assert not set(first) & set(second)


class _OneTable(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bags = EmbeddingBagCollection(
            device=torch.device("meta"),
            tables=[EmbeddingBagConfig(name="b0", embedding_dim=8, num_embeddings=120, feature_names=["fb0"])],
        )

    def forward(self, bags: Any) -> torch.Tensor:
        return self.bags(bags).values()


def _rank_without_a_table(rank: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for selection in ("sampling", "duty", "threshold"):
        model = sharded(_OneTable())
        session = Slipstream(model, config(selection=selection))
        for bags, _ in batches_for(TwoCollections(), steps=40, rank=rank):
            both = bags.split([1, 1])
            model(both[0]).square().sum().backward()
            session.step()
        report = session.report()
        session.load_state_dict(session.state_dict())
        result[selection] = (len(session._filters), report.measured_share, report.tables["bags.b0"].skipped)
    return result


def test_rank_without_a_table_takes_part() -> None:
    first, second = run_ranks(2, _rank_without_a_table)
    for selection, (filters, share, skipped) in first.items():
        assert filters + second[selection][0] == 1
        assert (share, skipped) == second[selection][1:]
        assert skipped > 0


def _exclude_one_table(rank: int) -> dict[str, int]:
    model = sharded(TwoCollections(), "table_wise")
    session = Slipstream(model, config(exclude_tables=("b0",)))
    for batch in batches_for(TwoCollections(), steps=30, rank=rank):
        model(*batch).square().sum().backward()
        session.step()
    return {name: table.skipped for name, table in session.report().tables.items()}


def test_excluded_table_may_lie_on_another_rank() -> None:
    first, second = run_ranks(2, _exclude_one_table)
    assert first == second
    assert first.get("bags.b0", 0) == 0
    assert sum(first.values()) > 0


def _exclude_no_table(rank: int) -> str:
    with pytest.raises(AttachError) as caught:
        Slipstream(sharded(TwoCollections(), "table_wise"), config(exclude_tables=("nowhere",)))
    return str(caught.value)


def test_unknown_excluded_table_is_refused_on_all_ranks_alike() -> None:
    first, second = run_ranks(2, _exclude_no_table)
    assert first == second
    assert "['nowhere'], which the model does not have; it has ['b0', 'b1', 's0', 's1']" in first
