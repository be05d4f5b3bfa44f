"""A session with hot rows on gloo ranks: beside staleness, with odd ranks and tables, reported, refused, resumed."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.distributed.mixed import move_at_random
from tests.distributed.ranks import run_ranks
from tests.distributed.test_overlay import NO_STALENESS, compare, only_hot
from tests.models import ROWS, TwoCollections, batches_for, placement_of, sharded, state_of
from torchrec_slipstream import (
    AccessConfig,
    AttachError,
    Slipstream,
    SlipstreamConfig,
    SlipstreamPlanner,
    StalenessConfig,
    StateError,
)
from torchrec_slipstream.access import AccessProfile, TableAccess
from torchrec_slipstream.placement import Placement
from torchrec_slipstream.report.placement import PlacementReport
from torchrec_slipstream.report.report import Report

pytestmark = pytest.mark.slow  # every test starts processes


def train(model: nn.Module, session: Slipstream | None, steps: range, rank: int, *, longest: int = 1) -> None:
    for step, batch in enumerate(batches_for(TwoCollections(), steps=steps.stop, rank=rank, longest=longest)):
        if step in steps:
            model(*batch).square().sum().backward()
            if session is not None:
                session.step()


# --------------------------------------------------------------------------------------- beside staleness


def _stale(rank: int, selection: str, longest: int) -> dict[str, Any]:
    """Rows that move against rows that do not: what is left out may not depend on where a row is."""
    staleness = StalenessConfig(
        where="everywhere",
        target_share=0.5,
        selection=selection,
        interval=10,
        warmup_steps=20,
        min_touches=3,
        max_table_share=1.0,
    )
    config = SlipstreamConfig(staleness=staleness, access=AccessConfig(counter="exact"))
    runs = []
    for forced in (False, True):
        model = sharded(TwoCollections(), "row_wise")
        # Without moves there is no overlay at all.
        session = Slipstream(model, config, placement=placement_of(model, 0.3) if forced else None)
        moved = 0
        for step, batch in enumerate(batches_for(TwoCollections(), steps=60, rank=rank, longest=longest)):
            model(*batch).square().sum().backward()
            session.step()
            if forced and step in (25, 35, 45):
                moved += move_at_random(session, step + rank)
        patterns = [one.patterns.clone() for one in session._filters]
        runs.append((state_of(model), session.report(), patterns, moved))
    (plain, first, before, _), (moving, second, after, moved) = runs
    assert first.decisions != []
    if longest == 1:
        compare(plain, moving)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert first.tables == second.tables
    else:
        for name, want in plain.items():
            torch.testing.assert_close(moving[name], want, rtol=1e-3, atol=1e-4 * float(want.abs().amax()))
    assert second.placement is not None
    stale = [sum(one.stale_rows for one in report.tables.values()) for report in (first, second)]
    return {"skipped": first.total.skipped, "again": second.total.skipped, "stale": stale, "moved": moved,
            "hits": second.placement.total.hits}  # fmt: skip


@pytest.mark.parametrize(("selection", "longest"), [("threshold", 1), ("duty", 1), ("sampling", 1), ("sampling", 3)])
def test_staleness_does_not_depend_on_where_rows_are(selection: str, longest: int) -> None:
    for result in run_ranks(2, _stale, selection, longest):
        assert result["moved"] > 50
        assert result["hits"] > 100
        assert result["skipped"] > 100
        assert result["again"] == pytest.approx(result["skipped"], rel=0.0 if longest == 1 else 0.01)
        assert result["stale"][0] > 10


# --------------------------------------------------------------------------------------- odd ranks and tables


class _OneTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        configs = TwoCollections().bags.embedding_bag_configs()
        self.bags = TwoCollections().bags.__class__(device=torch.device("meta"), tables=configs[:1])

    def forward(self, bags: Any, sequences: Any) -> torch.Tensor:
        return self.bags(bags.split([1, 1])[0]).values()


def _table_on_one_rank(rank: int) -> tuple[int, int, bool]:
    """A rank without a table takes part in re-plans and report."""
    stock, ours = (sharded(_OneTable()) for _ in range(2))
    session = Slipstream(ours, only_hot(hbm_budget=2000, replan_every=10))
    train(stock, None, range(40), rank)
    train(ours, session, range(40), rank)
    compare(state_of(stock), state_of(ours))
    session.load_state_dict(session.state_dict())
    report = session.report().placement
    assert report is not None
    return len(session._filters), report.moved_rows, report.total.hit_rate > 0.3


def test_rank_without_a_table() -> None:
    first, second = run_ranks(2, _table_on_one_rank)
    assert {first[0], second[0]} == {0, 1}
    assert first[1:] == second[1:]
    assert first[1] > 10
    assert first[2]


def _moves_on_one_rank(rank: int) -> tuple[int, list[bool], dict[str, int]]:
    """Rank 1 has hot rows, and moves them; rank 0 has no overlay, by a placement with hot rows of rank 1 alone."""
    stock, ours = (sharded(TwoCollections(), "row_wise") for _ in range(2))
    placement = placement_of(ours, 0.4)
    none = np.empty(0, dtype=np.int64)
    shards = tuple(s if s.rank else dataclasses.replace(s, hot_rows=none) for s in placement.shards)
    session = Slipstream(ours, only_hot(replan_every=10), placement=dataclasses.replace(placement, shards=shards))
    train(stock, None, range(30), rank)
    train(ours, session, range(30), rank)
    moved = move_at_random(session, rank)
    train(stock, None, range(30, 60), rank)
    train(ours, session, range(30, 60), rank)
    compare(state_of(stock), state_of(ours))
    report = session.report().placement
    assert report is not None
    return moved, [one is None for one in session._hot.overlays], {n: t.hits for n, t in report.tables.items()}


def test_rank_with_an_empty_overlay_beside_one_that_moves() -> None:
    (moved, none, hits), (also, some, same) = run_ranks(2, _moves_on_one_rank)
    assert (moved, none) == (0, [True] * 3)
    assert also > 20
    assert some == [False] * 3
    assert hits == same
    assert min(hits.values()) > 0


def _odd_tables(rank: int) -> dict[str, tuple[int, int, int]]:
    """One table data-parallel and excluded, one excluded, one sketched, one as usual."""
    types = {"b0": "row_wise", "b1": "data_parallel", "s0": "row_wise", "s1": "row_wise"}
    config = only_hot(hbm_budget=3000, replan_every=10)
    config = dataclasses.replace(
        config,
        staleness=dataclasses.replace(NO_STALENESS, exclude_tables=("b1", "s0")),
        access=AccessConfig(counter="exact", sketch_tables=("s1",)),
    )
    stock, ours = (sharded(TwoCollections(), types) for _ in range(2))
    session = Slipstream(ours, config)
    train(stock, None, range(40), rank)
    train(ours, session, range(40), rank)
    compare(state_of(stock), state_of(ours))
    report = session.report().placement
    assert report is not None
    for overlay in session._hot.overlays:  # a row that cannot become hot has no slot word
        assert overlay is None or sum(overlay.space.own) == sum(s.table != "s1" for s in overlay.shards)
    assert session._hot.hbm_bytes <= 3000
    session.load_state_dict(session.state_dict())
    return {name: (table.rows, table.hot_rows, table.hits) for name, table in report.tables.items()}


def test_sketched_excluded_and_data_parallel_tables() -> None:
    first, second = run_ranks(2, _odd_tables)
    assert first == second
    assert first["bags.b0"][1] > 10
    assert first["bags.b0"][2] > 50
    assert first["sequences.s0"][2] > 0  # excluded from staleness, in a TBE with another table
    assert first["sequences.s1"] == (40, 0, 0)  # its rows are not counted one by one
    assert "bags.b1" not in first


# --------------------------------------------------------------------------------------- the report


class _Writer:
    """What TensorBoard's SummaryWriter is to us."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert isinstance(scalar_value, (int, float))
        self.scalars.append((tag, scalar_value, global_step))


def _reported(rank: int, folder: str) -> dict[str, Any]:
    writer, hit, seen = _Writer(), 0, 0
    model = sharded(TwoCollections(), "row_wise")
    session = Slipstream(model, only_hot(hbm_budget=3000, replan_every=20, record_every=10), writer=writer)
    for batch in batches_for(TwoCollections(), steps=60, rank=rank):
        hot = [[o.hot_rows(p) for p in range(len(o.shards))] for o in session._hot.overlays if o is not None]
        before = [one.counts.touches.clone() for one in session._filters]
        model(*batch).square().sum().backward()
        for one, old, rows in zip(session._filters, before, hot, strict=True):
            new = one.counts.touches - old
            seen += int(new.sum())
            hit += sum(int(new[s.slots][own].sum()) for s, own in zip(one.shards, rows, strict=True))
        session.step()
    report = session.report()
    placement = report.placement
    assert placement is not None
    text = json.dumps(report.to_dict(), allow_nan=False)
    again = Report.from_dict(json.loads(text))
    assert again.to_dict() == report.to_dict()
    assert str(again) == str(report)
    assert PlacementReport.from_dict(placement.to_dict()) == placement
    picture = Path(folder) / f"{rank}.png"
    placement.plot(picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    return {"report": placement, "text": str(report), "hit": hit, "seen": seen, "writer": writer.scalars}


def test_report_over_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, _reported, str(tmp_path))
    placement = first["report"]
    # Seconds a step are each rank's own.
    same = [dataclasses.replace(one["report"], seconds=1.0, step_ms=1.0) for one in (first, second)]
    assert same[0] == same[1]
    assert placement.total.lookups == first["seen"] + second["seen"]
    assert placement.total.hits == first["hit"] + second["hit"] > 500
    assert {name: table.rows for name, table in placement.tables.items()} == {
        "bags.b0": 120, "bags.b1": 40, "sequences.s0": 120, "sequences.s1": 40,
    }  # fmt: skip
    assert placement.total.hot_bytes == placement.total.hot_rows * (8 * 4 + 4)
    assert placement.hbm_bytes <= 2 * 3000
    assert [point.step for point in placement.points] == [10, 20, 30, 40, 50, 60]
    assert placement.points[-1].hits == placement.total.hits
    assert [one.step for one in placement.replans] == [20, 40, 60]
    assert 0.0 < placement.stall_share < 0.5
    for words in (
        "hot rows",
        "bags.b0",
        "fast memory for hot rows and slot words",
        "3 re-plans",
        "hit rate at step 10",
    ):
        assert words in first["text"]
    moved = 0.0
    for one in (first, second):
        scalars = {(tag, step): value for tag, value, step in one["writer"]}
        assert {tag for tag, _ in scalars} == {
            "slipstream/skipped_share", "slipstream/hit_rate", "slipstream/moved_rows", "slipstream/stall_seconds",
        }  # fmt: skip
        assert 0.2 < scalars["slipstream/hit_rate", 60] < 1.0
        assert ("slipstream/hit_rate", 10) not in scalars
        moved += scalars["slipstream/moved_rows", 60]
    assert moved == placement.moved_rows > 10


def _planned(rank: int) -> tuple[PlacementReport, int]:
    """What SlipstreamPlanner says for GPUs, on a CPU with the same sharding. Two tables are too rare to be hot, one of
    them in a TBE with another that is."""
    stock, ours = (sharded(TwoCollections(), "row_wise") for _ in range(2))
    tables = [
        TableAccess(f"{path}{i}", rows, 8, (1 + weight * np.arange(rows) // 10).astype(np.int32), optimizer_bytes=4)
        for path, weights in (("bags.b", (9, 0)), ("sequences.s", (9, 0)))
        for i, (rows, weight) in enumerate(zip(ROWS, weights, strict=True))
    ]
    planner = SlipstreamPlanner(
        profile=AccessProfile(tables, 500),
        topology=Topology(world_size=2, local_world_size=2, compute_device="cuda"),
        hbm_budget=1300,
        batch_size=8,
        backing="uvm",
        constraints={name: ParameterConstraints(sharding_types=["row_wise"]) for name in ("b0", "b1", "s0", "s1")},
    )
    sharders: list[Any] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    unsharded = TwoCollections()
    apply_optimizer_in_backward(RowWiseAdagrad, unsharded.parameters(), {"lr": 0.1})
    planner.collective_plan(unsharded, sharders, torch.distributed.GroupMember.WORLD)
    assert planner.placement is not None
    session = Slipstream(ours, only_hot(), placement=planner.placement)
    train(stock, None, range(30), rank)
    train(ours, session, range(30), rank)
    compare(state_of(stock), state_of(ours))
    report = session.report().placement
    assert report is not None
    assert sum(len(shard.hot_rows) for shard in planner.placement.on(rank)) > 5
    return report, planner.placement.hbm_budget


def test_a_planners_placement_takes_the_bytes_that_it_says() -> None:
    (first, budget), (second, _) = run_ranks(2, _planned)
    assert first.tables == second.tables
    # On each rank one slot word more, which the rows of the table without hot ones share.
    assert first.hbm_bytes == first.predicted_bytes + 2 * 4
    assert first.total.hot_bytes <= 2 * budget  # slot words are planned besides
    assert first.tables["bags.b0"].hot_rows > 5
    assert first.tables["sequences.s0"].hot_rows > 5
    assert first.tables["sequences.s1"].hot_rows == 0
    assert "planned" in str(first)


# --------------------------------------------------------------------------------------- what is refused


def _refused(rank: int, case: str) -> str:
    """The message; asserts that the model then trains as stock, and that nothing of the attempt is left."""
    stock, ours = (sharded(TwoCollections(), "row_wise") for _ in range(2))
    good = placement_of(ours, 0.3)
    config, placement = only_hot(), good
    first = good.shards[0]
    if case == "rank":  # only rank 1 has another shard than the placement says
        last = good.shards[1]
        assert last.rank == 1
        wrong = dataclasses.replace(last, rows=last.rows + 1)
        placement = dataclasses.replace(good, shards=(first, wrong, *good.shards[2:]))
    elif case == "rows":
        wrong = dataclasses.replace(first, hot_rows=np.array([3, 60], dtype=np.int64))
        placement = dataclasses.replace(good, shards=(wrong, *good.shards[1:]))
    elif case == "order":
        wrong = dataclasses.replace(first, hot_rows=np.array([5, 3], dtype=np.int64))
        placement = dataclasses.replace(good, shards=(wrong, *good.shards[1:]))
    elif case == "model":
        shards = tuple(dataclasses.replace(s, table=f"other.{s.table}") for s in good.shards)
        tables = {f"other.{name}": table for name, table in good.tables.items()}
        placement = dataclasses.replace(good, shards=shards, tables=tables)
    elif case == "sharding":
        placement = placement_of(sharded(TwoCollections(), "table_wise"), 0.3)
    elif case == "caching":
        placement = placement_of(ours, 0.3, backing="caching")
    elif case == "budget":
        config = only_hot(hbm_budget=640, replan_every=10)
    elif case == "both":
        config = only_hot(hbm_budget=6000, replan_every=10)
    elif case == "sketched":
        config = only_hot(hbm_budget=6000, replan_every=10)
        access = AccessConfig(counter="exact", sketch_tables=("b0", "b1", "s0", "s1"))
        config = dataclasses.replace(config, access=access)
    given: Placement | None = None if case in ("budget", "sketched") else placement
    made = _overlays_alive()
    gc.disable()
    try:
        with pytest.raises(AttachError) as caught:
            Slipstream(ours, config, placement=given)
        message = str(caught.value)
        del caught
        assert _overlays_alive() == made, "an overlay outlived the refusal"
    finally:
        gc.enable()
    for model in (stock, ours):
        train(model, None, range(5), rank)
    compare(state_of(stock), state_of(ours))
    session = Slipstream(ours, only_hot(), placement=good)  # and can be attached to
    train(stock, None, range(5, 10), rank)
    train(ours, session, range(5, 10), rank)
    compare(state_of(stock), state_of(ours))
    session.detach()
    return message


_OVERLAYS: weakref.WeakSet[Any] = weakref.WeakSet()


def _overlays_alive() -> int:
    """Of those made since the first call."""
    from torchrec_slipstream.tbe.overlay import Overlay

    if not hasattr(Overlay, "_watched_by_test"):
        stock = Overlay.__init__

        def watched(self: Overlay, *arguments: Any, **more: Any) -> None:
            stock(self, *arguments, **more)
            _OVERLAYS.add(self)

        Overlay.__init__ = watched  # type: ignore[method-assign]
        Overlay._watched_by_test = True  # type: ignore[attr-defined]
    return len(_OVERLAYS)


REFUSED = {
    "rank": ["other rank(s) cannot have", "b0"],
    "rows": ["not ascending rows of its 60", "other rank(s)"],
    "order": ["not ascending rows of its 60"],
    "model": ["'other.", "planned together"],
    "sharding": ["plan again for this model", "the model one of 60 x 8"],
    "caching": ["backing='caching'", "backing='uvm'"],
    "budget": ["hbm_budget=640", "Give more than"],
    "both": ["hbm_budget=6000", "Leave one out"],
    "sketched": ["hbm_budget=6000", "sketches", "Leave hbm_budget out"],
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_on_all_ranks_and_nothing_changed(case: str) -> None:
    both = "\n".join(run_ranks(2, _refused, case))
    for words in REFUSED[case]:
        assert words in both


# --------------------------------------------------------------------------------------- its state


def _resumed(rank: int, min_age: int, split: int) -> int:
    config = only_hot(hbm_budget=2500, replan_every=6, min_age=min_age, chunk_bytes=200)
    whole = sharded(TwoCollections(), "row_wise")
    uninterrupted = Slipstream(whole, config)
    train(whole, uninterrupted, range(60), rank, longest=3)
    begun = sharded(TwoCollections(), "row_wise")
    session = Slipstream(begun, config)
    train(begun, session, range(split), rank, longest=3)
    saved = copy.deepcopy((begun.state_dict(), begun.fused_optimizer.state_dict(), session.state_dict()))
    second = sharded(TwoCollections(), "row_wise", seed=5)
    resumed = Slipstream(second, config)
    train(second, resumed, range(7), 5 + rank)  # which has been somewhere else
    second.load_state_dict(saved[0])
    second.fused_optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(second, resumed, range(split, 60), rank, longest=3)
    want, got = state_of(whole), state_of(second)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    for a, b in zip(uninterrupted._hot.overlays, resumed._hot.overlays, strict=True):
        assert a is not None
        assert b is not None
        for place in range(len(a.shards)):
            assert torch.equal(a.hot_rows(place), b.hot_rows(place))
        assert torch.equal(a.hits, b.hits)
    told, again = (one.report().placement for one in (uninterrupted, resumed))
    assert told is not None
    assert again is not None
    assert told.tables == again.tables
    assert told.points == again.points
    timeless = [[dataclasses.replace(one, seconds=0.0) for one in report.replans] for report in (told, again)]
    assert timeless[0] == timeless[1]
    late = [one for one in told.replans if one.step > split]
    return sum(one.demoted for one in late)


@pytest.mark.parametrize(("min_age", "split"), [(1, 21), (3, 33)])
def test_resumed_run_equals_an_uninterrupted_one(min_age: int, split: int) -> None:
    assert min(run_ranks(2, _resumed, min_age, split)) > 3


def _state_refused(rank: int) -> None:
    model = sharded(TwoCollections(), "row_wise")
    session = Slipstream(model, only_hot(hbm_budget=3000, replan_every=5))
    train(model, session, range(12), rank)
    state = session.state_dict()
    key = next(iter(state["placement"]["shards"]))

    def broken(*path: str, value: Any) -> dict[str, Any]:
        copied = copy.deepcopy(state)
        at = copied["placement"]
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        return copied

    hot = state["placement"]["shards"][key]["hot"]
    before = copy.deepcopy(session.state_dict())
    for bad, words in (
        (broken("shards", key, "hot", value=hot.flip(0)), "not ascending"),
        (broken("shards", key, "hot", value=hot + 200), "not ascending rows of"),
        (broken("shards", key, "hot", value=None), "does not say which rows"),
        (broken("shards", key, "hot", value=torch.arange(60)), "slots"),
        (broken("shards", key, "hits", value=torch.zeros(3)), "how often"),
        (broken("shards", value={}), "does not say which rows"),
        (broken("replanners", value={}), "re-plans does not belong"),
        (broken("replans", value=[{}]), "replans is not a list"),
        (broken("points", value=None), "points is not a list"),
        (broken("looked_up", value=None), "looked_up"),
        (broken("planned_at", value=None), "planned_at"),
        (broken("config", "replan_every", value=7), "replan_every"),
    ):
        with pytest.raises(StateError, match=words):
            session.load_state_dict(bad)
        assert str(session.state_dict()) == str(before)


def test_state_that_does_not_fit_changes_nothing() -> None:
    run_ranks(2, _state_refused)


def _keys(rank: int) -> set[str]:
    model = sharded(TwoCollections(), "row_wise")
    state = Slipstream(model, only_hot(hbm_budget=3000, replan_every=5)).state_dict()["placement"]
    return {*state["shards"], *(f"replanner {key}" for key in state["replanners"])}


def test_state_keys_of_two_ranks_are_distinct() -> None:
    first, second = run_ranks(2, _keys)
    assert len(first) == len(second) == 4 + 3
    assert not first & second
